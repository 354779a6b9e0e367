"""Cross-entropy of a linear layer's logits without the logits: the rounding loss over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffseq.ops import reference
from pydiffseq.ops._extension import C, autocast, check_float, check_same_device, check_shape, library, pointer, use_kernel

library.define(
    "linear_cross_entropy(Tensor x, Tensor table, Tensor? bias, Tensor target, float label_smoothing, int ignore_index)"
    " -> (Tensor losses, Tensor lse)")
library.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor table, Tensor? bias, Tensor target, Tensor lse, "
    "float label_smoothing, int ignore_index) -> (Tensor grad_x, Tensor grad_table, Tensor? grad_bias)")


def linear_cross_entropy(x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, *,
                         label_smoothing: float = 0.0, ignore_index: int = -100) -> Tensor:
    """``-log softmax(x @ table.T + bias)[target]`` per row; the [M, V] logits are never in memory.

    The rounding loss of Diffusion-LM (Li et al. 2022, section 4.2, ``-log p(w | x_0)``) and of the models after it. The
    CPU kernel makes a block of logits at a time, in the cache, and makes it again in the backward pass.

    Args:
        x: float [M, d].
        table: float [V, d], the output embeddings, of x's dtype.
        bias: float [V] of x's dtype, or None.
        target: int64 [M] in 0..V-1, or ``ignore_index``.
        label_smoothing: in 0..1, as in ``torch.nn.functional.cross_entropy``: the weight of the uniform distribution.
        ignore_index: rows with this target cost nothing: their loss and gradient are 0.

    Returns:
        Losses [M] in nats: float32 (float64 for float64 inputs). Differentiable once in x, table and bias.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit, tensors are on different devices, or label_smoothing is outside 0..1.
        IndexError: a target is outside 0..V-1 and not ``ignore_index`` (CPU).
    """
    x, table, bias = autocast(x, table, bias)
    _check(x, table, bias, target, label_smoothing)
    return torch.ops.pydiffseq.linear_cross_entropy(x, table, bias, target, label_smoothing, ignore_index)[0]


def _check(x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float) -> None:
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [M, d], got {list(x.shape)}")
    if table.dim() != 2 or table.shape[1] != x.shape[1]:
        raise ValueError(f"table must have shape [V, {x.shape[1]}], d being that of x, got {list(table.shape)}")
    check_shape("target", target, (x.shape[0],))
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    for name, tensor in (("table", table), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if bias is not None:
        check_shape("bias", bias, (table.shape[0],))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in 0..1, got {label_smoothing}")
    check_same_device(x=x, table=table, bias=bias, target=target)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _forward_cpu(x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float,
                 ignore_index: int) -> tuple[Tensor, Tensor]:
    if not use_kernel(x, table, bias):
        return reference.linear_cross_entropy(x, table, bias, target, label_smoothing, ignore_index)
    losses, lse = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    x_, table_, bias_, target_ = _contiguous(x, table, bias, target)
    C.cross_entropy_forward(pointer(x_), pointer(table_), pointer(bias_), pointer(target_), x.dtype == torch.bfloat16,
                            x.shape[0], x.shape[1], table.shape[0], ignore_index, label_smoothing,
                            pointer(losses), pointer(lse))
    return losses, lse


def _backward_cpu(grad: Tensor, x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor,
                  label_smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    if not use_kernel(x, table, bias):
        return reference.linear_cross_entropy_backward(grad, x, table, bias, target, lse, label_smoothing, ignore_index)
    grad_, x_, table_, bias_, target_, lse_ = _contiguous(grad, x, table, bias, target, lse)
    grad_x, grad_table, grad_bias = _like(x, table, bias)
    C.cross_entropy_backward(pointer(x_), pointer(table_), pointer(bias_), pointer(target_), x.dtype == torch.bfloat16,
                             x.shape[0], x.shape[1], table.shape[0], ignore_index, label_smoothing, pointer(lse_),
                             pointer(grad_), pointer(grad_x), pointer(grad_table), pointer(grad_bias))
    return grad_x, grad_table, grad_bias


def _like(x: Tensor, table: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return (torch.empty_like(x, memory_format=torch.contiguous_format),
            torch.empty_like(table, memory_format=torch.contiguous_format),
            None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format))


library.impl("linear_cross_entropy", _forward_cpu, "CPU")
library.impl("linear_cross_entropy_backward", _backward_cpu, "CPU")
library.impl("linear_cross_entropy", reference.linear_cross_entropy, "CompositeExplicitAutograd")
library.impl("linear_cross_entropy_backward", reference.linear_cross_entropy_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::linear_cross_entropy", lib=library)
def _forward_fake(x, table, bias, target, label_smoothing, ignore_index):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


@torch.library.register_fake("pydiffseq::linear_cross_entropy_backward", lib=library)
def _backward_fake(grad, x, table, bias, target, lse, label_smoothing, ignore_index):
    return _like(x, table, bias)


def _setup_context(ctx, inputs, output) -> None:
    x, table, bias, target, ctx.label_smoothing, ctx.ignore_index = inputs
    ctx.save_for_backward(x, table, bias, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _grad_lse: Tensor | None):
    x, table, bias, target, lse = ctx.saved_tensors
    grads = torch.ops.pydiffseq.linear_cross_entropy_backward(
        grad, x, table, bias, target, lse, ctx.label_smoothing, ctx.ignore_index)
    return *grads, None, None, None


torch.library.register_autograd("pydiffseq::linear_cross_entropy", _backward, setup_context=_setup_context, lib=library)
