"""Dropout whose mask is recomputed from a seed, so that nothing else is saved for the backward pass."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import (
    C,
    autocast_to_widest,
    check_float,
    check_same_device,
    check_shape,
    draw_seed,
    library,
    output_pointer,
    pointer,
    register_autograd,
    use_kernel,
)

library.define("dropout(Tensor x, float p, Tensor seed) -> Tensor")
library.define("dropout_add(Tensor x, Tensor residual, float p, Tensor seed) -> Tensor")


def dropout(x: Tensor, p: float, *, training: bool = True, seed: int | Tensor | None = None) -> Tensor:
    """Zeroes elements with probability p and scales the others by ``1 / (1 - p)`` (Srivastava et al. 2014).

    p is used in units of 2^-16 (0.1 is 6554 / 65536), and the scale is that of the rounded p, so the expectation is
    exact. Element i of the flattened x draws from Philox block i / 8 of the seed.

    Args:
        x: float, any shape.
        p: in 0..1.
        training: False returns x.
        seed: the 64-bit key, an int or an int64 tensor of one element; None: drawn from torch's generator.

    Returns:
        A tensor of x's shape and dtype. Differentiable in x, any number of times.

    Raises:
        TypeError: x is not floating point.
        ValueError: p is outside 0..1.
    """
    _check(x, p)
    if not training or p == 0:
        return x
    return _dropout_op(x, p, draw_seed(seed))


def dropout_add(x: Tensor, residual: Tensor, p: float, *, training: bool = True,
                seed: int | Tensor | None = None) -> Tensor:
    """``residual + dropout(x, p)`` in one pass, rounded once.

    Args:
        x: float, any shape.
        residual: of x's shape, dtype and device.
        p, training, seed: as in :func:`dropout`.

    Returns:
        A tensor of x's shape and dtype. Differentiable in x and residual, any number of times.

    Raises:
        TypeError: x is not floating point, or residual has another dtype.
        ValueError: p is outside 0..1, or residual has another shape or device.
    """
    x, residual = autocast_to_widest(x, residual)
    _check(x, p)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape:
        check_shape("residual", residual, tuple(x.shape))
    check_same_device(x=x, residual=residual)
    if not training or p == 0:
        return residual + x
    return _dropout_add_op(x, residual, p, draw_seed(seed))


_dropout_op = torch.ops.pydiffseq.dropout.default
_dropout_add_op = torch.ops.pydiffseq.dropout_add.default


def _check(x: Tensor, p: float) -> None:
    check_float("x", x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in 0..1, got {p}")


def _dropout_cpu(x: Tensor, p: float, seed: Tensor) -> Tensor:
    if not use_kernel(x):
        return reference.dropout(x, p, seed)
    x = x.contiguous()
    out = x.new_empty(x.shape)
    C.dropout(x.data_ptr(), 0, output_pointer(out), x.numel(), seed.data_ptr(), reference.dropout_threshold(p),
              x.dtype == torch.bfloat16)
    return out


def _dropout_add_cpu(x: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    if not use_kernel(x):
        return reference.dropout_add(x, residual, p, seed)
    x, residual = x.contiguous(), residual.contiguous()
    out = x.new_empty(x.shape)
    C.dropout(pointer(x), pointer(residual), output_pointer(out), x.numel(), pointer(seed), reference.dropout_threshold(p),
              x.dtype == torch.bfloat16)
    return out


# --- CUDA kernels (csrc/cuda/dropout.cu) ---


def _kernel(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    seed, on_device = _cuda.key_arguments(seed, x.device)
    out = x.new_empty(x.shape)
    _cuda.launch(C.dropout_cuda, x.device, pointer(x), pointer(residual), pointer(out), x.numel(), pointer(seed),
                 reference.dropout_threshold(p), _cuda.DTYPES[x.dtype], on_device)
    return out


def _cuda_cases(device: torch.device):
    """The self-check: every dtype, whole units and a rest, the seed on the host and on the device, limits of p."""
    seed = torch.tensor([-987654321])
    for dtype, n, p in ((dtype, n, p) for dtype in _cuda.DTYPES for n in (64, 77) for p in (0.1, 1.0)):
        x, residual = reference.philox_normal(seed, 2, 1, n, 0, None, 3, dtype, device)[:, 0]
        for y, key in ((None, seed), (residual, seed.to(device))):
            yield ("dropout" if y is None else "dropout_add", functools.partial(_kernel, x, y, p, key),
                   functools.partial(reference.dropout_add, x, y, p, key))


def _use_cuda(x: Tensor) -> bool:
    return (x.is_cuda and x.dtype in _cuda.DTYPES and _cuda.compiled()
            and _cuda.trusted("dropout", x.device, _cuda_cases))


def _dropout_cuda(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return _dropout_add_cuda(x, None, p, seed)


def _dropout_add_cuda(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    return (_kernel if _use_cuda(x) else reference.dropout_add)(x, residual, p, seed)


library.impl("dropout", _dropout_cpu, "CPU")
library.impl("dropout_add", _dropout_add_cpu, "CPU")
library.impl("dropout", _dropout_cuda, "CUDA")
library.impl("dropout_add", _dropout_add_cuda, "CUDA")
library.impl("dropout", reference.dropout, "CompositeExplicitAutograd")
library.impl("dropout_add", reference.dropout_add, "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::dropout", lib=library)
def _dropout_fake(x, p, seed):
    return x.new_empty(x.shape)


@torch.library.register_fake("pydiffseq::dropout_add", lib=library)
def _dropout_add_fake(x, residual, p, seed):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.p = inputs[-2]
    ctx.save_for_backward(inputs[-1])


def _dropout_grad(ctx, grad: Tensor):
    return _dropout_op(grad, ctx.p, ctx.saved_tensors[0]), None, None


def _dropout_add_grad(ctx, grad: Tensor):
    grad_x = _dropout_op(grad, ctx.p, ctx.saved_tensors[0]) if ctx.needs_input_grad[0] else None
    return grad_x, grad, None, None


register_autograd("dropout", _dropout_grad, _setup)
register_autograd("dropout_add", _dropout_add_grad, _setup)
