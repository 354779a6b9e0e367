"""Cross-entropy of a linear layer's logits without the logits: the rounding loss over the vocabulary."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import (
    C,
    autocast,
    check_float,
    check_same_device,
    check_shape,
    library,
    pointer,
    register_autograd,
    use_kernel,
)

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
    kernels make a block of logits at a time, in the cache or on the chip, and make it again in the backward pass. Both
    passes give the same bits every time. CUDA kernels: float16 and bfloat16, d <= 128; else plain torch by blocks of rows.

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
        IndexError: a target is outside 0..V-1 and not ``ignore_index`` (on the CPU; the CUDA kernels make its loss, and
            every gradient that it takes part in, NaN).
    """
    x, table, bias = autocast(x, table, bias)
    _check(x, table, bias, target, label_smoothing)
    return torch.ops.pydiffseq.linear_cross_entropy(x, table, bias, target, label_smoothing, ignore_index)[0]


def linear_logsumexp(x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Log-sum-exp [M] of ``x @ table.T + bias`` without the [M, V] logits, in float32 (float64 for float64 inputs).

    What turns scores of :func:`pydiffseq.ops.nearest_topk` (``metric="dot"``) into probabilities. Not differentiable;
    arguments and errors as in :func:`linear_cross_entropy`.
    """
    target = x.new_zeros(x.shape[:1], dtype=torch.int64)
    with torch.no_grad():
        x, table, bias = autocast(x, table, bias)
        _check(x, table, bias, target, 0.0)
        return torch.ops.pydiffseq.linear_cross_entropy(x, table, bias, target, 0.0, -100)[1]


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


# --- CUDA kernels (csrc/cuda/cross_entropy.cu, whose constants these are) ---

_TILE, _GRADIENT_TILE, _MOST_FEATURES = 128, 64, 128


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous rows that start at multiples of 16 bytes, with zeros behind their end."""
    tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 8)).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _kernel_inputs(x: Tensor, table: Tensor, bias: Tensor | None,
                   target: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """(x, table, float32 bias, target) as the kernels take them, and (rows, vocab, features with padding)."""
    vocab = table.shape[0]
    padded = x.new_full((_blocks(vocab, _TILE) * _TILE,), -torch.inf, dtype=torch.float32)
    padded[:vocab] = 0.0 if bias is None else bias
    x, table = _aligned(x), _aligned(table)
    return (x, table, padded, target.contiguous()), (x.shape[0], vocab, table.shape[1])


def _forward_kernel(x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float,
                    ignore_index: int) -> tuple[Tensor, Tensor]:
    losses, lse, at_target = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    inputs, (rows, vocab, stride) = _kernel_inputs(x, table, bias, target)
    parts = C.tile_parts_cuda(rows, _blocks(vocab, _TILE), x.device.index or 0)
    sums = x.new_empty(rows, parts, 2, 3, dtype=torch.float32)
    _cuda.launch(C.cross_entropy_forward_cuda, x.device, tuple(map(pointer, inputs)), (rows, vocab, x.shape[1], stride),
                 ignore_index, label_smoothing, (pointer(losses), pointer(lse)), (pointer(sums), pointer(at_target)), parts,
                 _cuda.DTYPES[x.dtype])
    return losses, lse


def _backward_kernel(grad: Tensor, x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor,
                     label_smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    dim, device = x.shape[1], x.device.index or 0
    if x.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(table), None if bias is None else torch.zeros_like(bias)
    grad_x, grad_table, grad_bias = _like(x, table, bias)
    x = x.masked_fill((target == ignore_index)[:, None], 0.0)  # whatever these rows hold
    inputs, (rows, vocab, stride) = _kernel_inputs(x, table, bias, target)
    grad, lse = grad.float().contiguous(), lse.contiguous()
    parts_x = C.tile_parts_cuda(rows, _blocks(vocab, _GRADIENT_TILE), device)
    parts_table = C.tile_parts_cuda(vocab, _blocks(rows, _GRADIENT_TILE), device)
    partial = max((parts * count for parts, count in ((parts_x, rows), (parts_table, vocab)) if parts > 1), default=0)
    workspace = (x.new_empty(_blocks(rows, _TILE) * _TILE, 4, dtype=torch.float32), grad.new_empty(1),
                 grad.new_empty(partial, dim), None if bias is None else grad.new_empty(parts_table, vocab))
    _cuda.launch(C.cross_entropy_backward_cuda, x.device, pointer(grad), tuple(map(pointer, inputs)),
                 (rows, vocab, dim, stride), ignore_index, label_smoothing, (0, pointer(lse)),
                 tuple(map(pointer, workspace)), (parts_x, parts_table),
                 tuple(map(pointer, (grad_x, grad_table, grad_bias))), _cuda.DTYPES[x.dtype])
    return grad_x, grad_table, grad_bias


def _cuda_cases(device: torch.device):
    """The self-check: both element types, one and two chunks of features, rows left out, and a tile that is not full."""
    for dtype, rows, vocab, dim in ((torch.float16, 150, 300, 40), (torch.bfloat16, 70, 500, 128)):
        seed = torch.tensor([dim])
        data = reference.philox_normal(seed, 1, rows + vocab, dim, 0, None, 3, torch.float32, device)[0].to(dtype)
        x, table, bias = data[:rows], data[rows:], data[rows:, 0].clone()
        target, grad = torch.arange(rows, device=device) * 7 % vocab, torch.linspace(1e-4, 2e-4, rows, device=device)
        target[::5] = -100
        ours, exact = (x, table, bias, target), (x.double(), table.double(), bias.double(), target)
        lse = reference.linear_cross_entropy(*exact, 0.1)[1]
        yield ("linear_cross_entropy", functools.partial(_forward_kernel, *ours, 0.1, -100),
               functools.partial(reference.linear_cross_entropy, *exact, 0.1), 1e-5)
        yield ("linear_cross_entropy_backward", functools.partial(_backward_kernel, grad, *ours, lse.float(), 0.1, -100),
               functools.partial(reference.linear_cross_entropy_backward, grad.double(), *exact, lse, 0.1), 0.01)


def _use_cuda(x: Tensor, table: Tensor) -> bool:
    return (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and 0 < x.shape[1] <= _MOST_FEATURES
            and table.shape[0] > 0 and _cuda.compiled() and _cuda.trusted("cross_entropy", x.device, _cuda_cases))


def _forward_cuda(x: Tensor, table: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    return (_forward_kernel if _use_cuda(x, table) else reference.linear_cross_entropy)(x, table, *arguments)


def _backward_cuda(grad: Tensor, x: Tensor, table: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    backward = _backward_kernel if _use_cuda(x, table) else reference.linear_cross_entropy_backward
    return backward(grad, x, table, *arguments)


library.impl("linear_cross_entropy", _forward_cpu, "CPU")
library.impl("linear_cross_entropy", _forward_cuda, "CUDA")
library.impl("linear_cross_entropy_backward", _backward_cpu, "CPU")
library.impl("linear_cross_entropy_backward", _backward_cuda, "CUDA")
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


register_autograd("linear_cross_entropy", _backward, _setup_context)
