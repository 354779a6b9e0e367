"""GEGLU with the exact (erf) GELU, computed in float32 and rounded once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import C, check_float, library, output_pointer, pointer, register_autograd, use_kernel

library.define("geglu(Tensor x) -> Tensor")
library.define("geglu_backward(Tensor grad, Tensor x) -> Tensor")


def geglu(x: Tensor) -> Tensor:
    """``a * GELU(gate)`` of the two halves of the last dim, ``x = [a, gate]`` (Shazeer 2020, eq. 5), in one pass.

    ``GELU(g) = g * Phi(g)`` with the normal distribution function Phi, not its tanh approximation. Phi keeps its
    relative accuracy for negative g: 4e-7 in float32, and 1e-5 before the rounding to bfloat16.

    Args:
        x: float, ``[..., 2 F]``.

    Returns:
        ``[..., F]``, of x's dtype. Differentiable once; one kernel writes the gradients of both halves.

    Raises:
        TypeError: x is not floating point.
        ValueError: x has no last dim, or one of odd size.
    """
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x must have a last dim of even size (a and gate), got shape {list(x.shape)}")
    return _geglu_op(x)


_geglu_op = torch.ops.pydiffseq.geglu.default
_geglu_backward_op = torch.ops.pydiffseq.geglu_backward.default


def _geglu_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _geglu_cpu(x: Tensor) -> Tensor:
    if not use_kernel(x):
        return reference.geglu(x)
    x = x.contiguous()
    out = _geglu_fake(x)
    columns = out.shape[-1]
    C.geglu(0, pointer(x), output_pointer(out), out.numel() // max(1, columns), columns, x.dtype == torch.bfloat16)
    return out


def _geglu_backward_cpu(grad: Tensor, x: Tensor) -> Tensor:
    if not use_kernel(x):
        return reference.geglu_backward(grad, x)
    grad, x = grad.contiguous(), x.contiguous()
    out = x.new_empty(x.shape)
    columns = grad.shape[-1]
    C.geglu_backward(pointer(grad), pointer(x), output_pointer(out), grad.numel() // max(1, columns), columns,
                     x.dtype == torch.bfloat16)
    return out


# --- CUDA kernels (csrc/cuda/geglu.cu) ---


def _geglu_kernel(x: Tensor) -> Tensor:
    x, out = x.contiguous(), _geglu_fake(x)
    columns = out.shape[-1]
    _cuda.launch(C.geglu_cuda, x.device, 0, pointer(x), pointer(out), out.numel() // max(1, columns), columns,
                 _cuda.DTYPES[x.dtype])
    return out


def _geglu_backward_kernel(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out, columns = x.new_empty(x.shape), grad.shape[-1]
    _cuda.launch(C.geglu_backward_cuda, x.device, pointer(grad), pointer(x), pointer(out), grad.numel() // max(1, columns),
                 columns, _cuda.DTYPES[x.dtype])
    return out


def _cuda_cases(device: torch.device):
    """The self-check: every dtype, rows that allow 16-byte accesses and rows that do not."""
    for dtype, columns in ((dtype, columns) for dtype in _cuda.DTYPES for columns in (48, 37)):
        x = 3 * reference.philox_normal(torch.tensor([columns]), 1, 5, 3 * columns, 0, None, 3, torch.float32, device)[0]
        x, grad = x[:, :2 * columns].to(dtype), x[:, 2 * columns:].to(dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 0.003
        yield ("geglu", functools.partial(_geglu_kernel, x), functools.partial(reference.geglu, x.double()), tolerance)
        yield ("geglu_backward", functools.partial(_geglu_backward_kernel, grad, x),
               functools.partial(reference.geglu_backward, grad.double(), x.double()), tolerance)


def _use_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in _cuda.DTYPES and _cuda.compiled() and _cuda.trusted("geglu", x.device, _cuda_cases)


def _geglu_cuda(x: Tensor) -> Tensor:
    return (_geglu_kernel if _use_cuda(x) else reference.geglu)(x)


def _geglu_backward_cuda(grad: Tensor, x: Tensor) -> Tensor:
    return (_geglu_backward_kernel if _use_cuda(x) else reference.geglu_backward)(grad, x)


library.impl("geglu", _geglu_cpu, "CPU")
library.impl("geglu_backward", _geglu_backward_cpu, "CPU")
library.impl("geglu", _geglu_cuda, "CUDA")
library.impl("geglu_backward", _geglu_backward_cuda, "CUDA")
library.impl("geglu", reference.geglu, "CompositeExplicitAutograd")
library.impl("geglu_backward", reference.geglu_backward, "CompositeExplicitAutograd")
torch.library.register_fake("pydiffseq::geglu", _geglu_fake, lib=library)
torch.library.register_fake("pydiffseq::geglu_backward", lambda grad, x: x.new_empty(x.shape), lib=library)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _geglu_grad(ctx, grad: Tensor) -> Tensor:
    return _geglu_backward_op(grad, ctx.saved_tensors[0])


register_autograd("geglu", _geglu_grad, _setup)
