"""Timestep attention of a fused query, key and value projection: the gradients arrive as the projection's, uncopied."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffseq.ops._extension import autocast, library, output_pointer, register_autograd, use_kernel
from pydiffseq.ops.timestep_attention import (
    Parts,
    backward_into,
    check_arguments,
    check_rotation,
    cuda_backward_into,
    dropout_key,
    forward_into,
    use_cuda,
)

library.define(
    "timestep_self_attention(Tensor qkv, Tensor? tau, Tensor? u, Tensor? w, Tensor? timesteps, Tensor? key_mask, "
    "Tensor? seed, float dropout_p, float scale, bool rotary=False) -> (Tensor out, Tensor lse)")
library.define(
    "timestep_self_attention_backward(Tensor grad_out, Tensor qkv, Tensor? tau, Tensor? u, Tensor? w, Tensor? timesteps, "
    "Tensor? key_mask, Tensor? seed, Tensor out, Tensor lse, float dropout_p, float scale, bool rotary=False) -> "
    "(Tensor grad_qkv, Tensor? grad_tau, Tensor? grad_u, Tensor? grad_w)")


def timestep_self_attention(qkv: Tensor, tau: Tensor | None = None, u: Tensor | None = None, w: Tensor | None = None, *,
                            timesteps: Tensor | None = None, key_mask: Tensor | None = None, dropout_p: float = 0.0,
                            seed: int | Tensor | None = None, scale: float | None = None) -> Tensor:
    """:func:`pydiffseq.ops.timestep_attention` of ``qkv.unbind(2)``, without the copy that ``unbind``'s gradient makes.

    Args:
        qkv: float [B, N, 3, H, D]: queries, keys and values, as one projection gives them.
        tau, u, w, timesteps, key_mask, dropout_p, seed, scale: as for ``timestep_attention``.

    Returns:
        [B, N, H, D] in qkv's dtype. Differentiable once in qkv, tau, u and w.

    Raises:
        TypeError, ValueError: as ``timestep_attention``; also for a qkv of another shape.
    """
    _check_projection(qkv)
    qkv, tau, u, w = autocast(qkv, tau, u, w)
    q = qkv.select(2, 0)   # as k and v
    check_arguments(q, q, q, tau, u, w, timesteps, key_mask)
    if scale is None:
        scale = qkv.shape[4] ** -0.5
    return torch.ops.pydiffseq.timestep_self_attention.default(
        qkv, tau, u, w, timesteps, key_mask, dropout_key(dropout_p, seed), dropout_p, scale)[0]


def rotary_timestep_self_attention(qkv: Tensor, rotation: Tensor, *, timesteps: Tensor | None = None,
                                   key_mask: Tensor | None = None, dropout_p: float = 0.0,
                                   seed: int | Tensor | None = None, scale: float | None = None) -> Tensor:
    """:func:`pydiffseq.ops.rotary_timestep_attention` of ``qkv.unbind(2)``, without the copy of ``unbind``'s gradient.

    Args:
        qkv: float [B, N, 3, H, D], D even: queries, keys and values, as one projection gives them.
        rotation, timesteps, key_mask, dropout_p, seed, scale: as for ``rotary_timestep_attention``.

    Returns:
        [B, N, H, D] in qkv's dtype. Differentiable once in qkv and rotation.

    Raises:
        TypeError, ValueError: as ``rotary_timestep_attention``; also for a qkv of another shape.
    """
    _check_projection(qkv)
    qkv, rotation = autocast(qkv, rotation)
    q = qkv.select(2, 0)   # as k and v
    check_rotation(q, q, q, rotation, timesteps, key_mask)
    if scale is None:
        scale = qkv.shape[4] ** -0.5
    return torch.ops.pydiffseq.timestep_self_attention.default(
        qkv, rotation, None, None, timesteps, key_mask, dropout_key(dropout_p, seed), dropout_p, scale, True)[0]


def _check_projection(qkv: Tensor) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, N, 3, H, D], got {list(qkv.shape)}")


def _forward(qkv, *arguments):
    return torch.ops.pydiffseq.timestep_attention.default(*qkv.unbind(2), *arguments)


def _parts_of(qkv: Tensor) -> Parts:
    """As ``parts_of`` of ``qkv.unbind(2)``, without three views and their wrappers at every call."""
    batch, length, _, heads, dim = qkv.shape
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    sentence, token, part, head, _ = qkv.stride()
    first, step = qkv.data_ptr(), part * qkv.element_size()
    return Parts((batch, heads, length, length, dim),
                 tuple((first + i * step, sentence, token, head) for i in range(3)), (qkv,))


def _forward_cpu(qkv, tau, u, w, *arguments):
    if not use_kernel(qkv, tau, u, w):
        return _forward(qkv, tau, u, w, *arguments)
    return forward_into(_forward_fake(qkv), _parts_of(qkv), tau, u, w, *arguments)


def _backward_by_parts(grad_out, qkv, *arguments):
    grads = torch.ops.pydiffseq.timestep_attention_backward.default(grad_out, *qkv.unbind(2), *arguments)
    return torch.stack(grads[:3], 2), *grads[3:]


def _backward_cpu(grad_out, qkv, tau, u, w, timesteps, key_mask, seed, out, lse, dropout_p, scale, rotary=False):
    if not use_kernel(grad_out, qkv, tau, u, w):
        return _backward_by_parts(grad_out, qkv, tau, u, w, timesteps, key_mask, seed, out, lse, dropout_p, scale, rotary)
    grad_qkv, parts = qkv.new_empty(qkv.shape), _parts_of(qkv)
    row = grad_qkv.stride(2)
    first, step = output_pointer(grad_qkv), row * grad_qkv.element_size()
    written = first, first + step, first + 2 * step, 3 * row, 3 * row
    return grad_qkv, *backward_into(
        written, grad_out, parts, tau, u, w, timesteps, key_mask, seed, lse, dropout_p, scale, rotary)


def _backward_cuda(grad_out, qkv, *arguments):
    if not use_cuda(qkv):
        return _backward_by_parts(grad_out, qkv, *arguments)
    grad_qkv = qkv.new_empty(qkv.shape)
    return grad_qkv, *cuda_backward_into(grad_qkv.unbind(2), grad_out, *qkv.unbind(2), *arguments)


library.impl("timestep_self_attention", _forward_cpu, "CPU")
library.impl("timestep_self_attention", _forward, "CompositeExplicitAutograd")
library.impl("timestep_self_attention_backward", _backward_cuda, "CUDA")
library.impl("timestep_self_attention_backward", _backward_cpu, "CPU")
library.impl("timestep_self_attention_backward", _backward_by_parts, "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::timestep_self_attention", lib=library)
def _forward_fake(qkv, *arguments):
    batch, length, _, heads, dim = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((batch, length, heads, dim)), qkv.new_empty((batch, heads, length), dtype=lse_dtype)


@torch.library.register_fake("pydiffseq::timestep_self_attention_backward", lib=library)
def _backward_fake(grad_out, qkv, tau, u, w, *arguments):
    return tuple(None if x is None else x.new_empty(x.shape) for x in (qkv, tau, u, w))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.rotary = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out: Tensor, _grad_lse: Tensor | None):
    grads = torch.ops.pydiffseq.timestep_self_attention_backward.default(
        grad_out, *ctx.saved_tensors, ctx.dropout_p, ctx.scale, ctx.rotary)
    return *grads, None, None, None, None, None, None


register_autograd("timestep_self_attention", _backward, _setup_context)
