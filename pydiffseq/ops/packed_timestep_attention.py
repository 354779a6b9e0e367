"""Timestep attention of sentences that lie one behind the other, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import (
    C,
    autocast,
    check_same_device,
    library,
    output_pointer,
    register_autograd,
    use_kernel,
)
from pydiffseq.ops.timestep_attention import (
    Packed,
    bias_gradients,
    check_arguments,
    cpu_arguments,
    cuda_backward_into,
    cuda_forward_into,
    dropout_key,
    heads_of,
    parts_of,
    sum_by_timestep,
    use_cuda,
)

library.define(
    "packed_timestep_attention(Tensor q, Tensor k, Tensor v, Tensor? tau, Tensor? u, Tensor? w, Tensor offsets, "
    "Tensor key_offsets, Tensor? timesteps, Tensor? seed, SymInt longest, SymInt longest_key, float dropout_p, "
    "float scale) -> (Tensor out, Tensor lse)")
library.define(
    "packed_timestep_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? tau, Tensor? u, Tensor? w, "
    "Tensor offsets, Tensor key_offsets, Tensor? timesteps, Tensor? seed, Tensor out, Tensor lse, SymInt longest, "
    "SymInt longest_key, float dropout_p, float scale) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_tau, Tensor? grad_u, Tensor? grad_w)")


def packed_timestep_attention(
        q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None = None, u: Tensor | None = None, w: Tensor | None = None, *,
        offsets: Tensor, key_offsets: Tensor | None = None, longest: int | None = None, longest_key: int | None = None,
        timesteps: Tensor | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
        scale: float | None = None) -> Tensor:
    """:func:`pydiffseq.ops.timestep_attention` of sentences packed one behind the other, so that padding costs nothing.

    Sentence b has the queries ``offsets[b] .. offsets[b + 1] - 1`` and attends to its own keys only. Results and dropout
    are those of the padded form, where its tokens come first.

    Args:
        q: float [queries, H, D]: the tokens of all sentences.
        k, v: [keys, H, D] of q's dtype.
        tau: time features [keys, H, D], or a table [R, H, D] to be indexed by ``timesteps``, or None.
        u, w: content and time bias [H, D], or None for zero.
        offsets: int64 [B + 1], ascending from 0 to the number of queries.
        key_offsets: the same for the keys; None: offsets.
        longest, longest_key: the most queries and the most keys of a sentence. None: found here, for which a GPU is waited
            for; so give them inside ``torch.compile`` and CUDA graphs. Tokens of a sentence beyond them are undefined.
        timesteps: int64 [keys], rows of the table; only together with a table.
        dropout_p, seed, scale: as in ``timestep_attention``.

    Returns:
        [queries, H, D] in q's dtype. Differentiable once in q, k, v, tau, u and w.

    Raises:
        TypeError: as ``timestep_attention``; also for offsets that are not int64.
        ValueError: as ``timestep_attention``; also for offsets of another shape or, on the CPU, that do not ascend from 0
            to the number of tokens, or a sentence longer than ``longest``.
    """
    q, k, v, tau, u, w = autocast(q, k, v, tau, u, w)
    if q.dim() != 3:
        raise ValueError(f"q must have shape [queries, H, D], got {list(q.shape)}")
    if key_offsets is None:
        key_offsets, longest_key = offsets, longest
    # As one sentence, the arguments are those of timestep_attention.
    time = tau if tau is None or timesteps is not None else tau[None]
    check_arguments(q[None], k[None], v[None], time, u, w, None if timesteps is None else timesteps[None], None)
    same = key_offsets is offsets and k.shape[0] == q.shape[0] and longest_key == longest
    longest = check_offsets("offsets", offsets, q, longest)
    longest_key = longest if same else check_offsets("key_offsets", key_offsets, k, longest_key)
    if offsets.shape != key_offsets.shape:
        raise ValueError(
            f"key_offsets must have the shape of offsets, {list(offsets.shape)}, got {list(key_offsets.shape)}")
    if scale is None:
        scale = q.shape[2] ** -0.5
    return torch.ops.pydiffseq.packed_timestep_attention.default(
        q, k, v, tau, u, w, offsets, key_offsets, timesteps, dropout_key(dropout_p, seed), longest, longest_key, dropout_p,
        scale)[0]


def check_offsets(name: str, offsets: Tensor, tokens: Tensor, longest: int | None) -> int:
    """The most tokens of a sentence."""
    if offsets.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name} must have shape [B + 1], got {list(offsets.shape)}")
    check_same_device(q=tokens, **{name: offsets})
    if torch.compiler.is_compiling() or (longest is not None and offsets.device.type != "cpu"):
        return int((offsets[1:] - offsets[:-1]).max()) if longest is None else longest
    first, last, least, most = _range(offsets)
    if first != 0 or least < 0 or last != tokens.shape[0]:
        raise ValueError(f"{name} must ascend from 0 to the number of tokens, {tokens.shape[0]}, got {offsets.tolist()}")
    if longest is not None and most > longest:
        raise ValueError(f"{name} has a sentence of {most} tokens, but the longest was said to have {longest}")
    return most if longest is None else longest


def _range(offsets: Tensor) -> list[int]:
    """First and last offset, least and most tokens of a sentence."""
    if C is not None and offsets.device.type == "cpu" and offsets.is_contiguous():
        return C.offsets_range(offsets.data_ptr(), len(offsets))
    lengths = offsets[1:] - offsets[:-1]
    extremes = torch.aminmax(lengths) if lengths.numel() else (offsets[0] * 0,) * 2
    return torch.stack([offsets[0], offsets[-1], *extremes]).tolist()


def _forward_cpu(q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, longest, longest_key, dropout_p, scale):
    if not use_kernel(q, k, v, tau, u, w):
        return reference.packed_timestep_attention(
            q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, longest, longest_key, dropout_p, scale)
    out, lse = _forward_fake(q)
    packed = Packed(offsets, key_offsets, longest, longest_key)
    arguments, _alive = cpu_arguments(
        parts_of(q, k, v, packed), tau, u, w, timesteps, None, seed, dropout_p, scale, False, lse, packed)
    C.timestep_attention_forward(*arguments, output_pointer(out))
    return out, lse


def _backward_cpu(grad_out, q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, out, lse, longest, longest_key,
                  dropout_p, scale):
    if not use_kernel(grad_out, q, k, v, tau, u, w):
        return reference.packed_timestep_attention_backward(
            grad_out, q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, out, lse, longest, longest_key, dropout_p,
            scale)
    lse, packed = lse.contiguous(), Packed(offsets, key_offsets, longest, longest_key)
    arguments, _alive = cpu_arguments(
        parts_of(q, k, v, packed), tau, u, w, timesteps, None, seed, dropout_p, scale, False, lse, packed)
    grads = [q.new_empty(x.shape) for x in (q, k, v)]
    table = timesteps is not None
    grad_tau = None if tau is None or table else q.new_empty(k.shape)
    grad_rows = q.new_empty(k.shape, dtype=torch.float32) if table else None
    biases, bias_addresses, _sums = bias_gradients(offsets.shape[0] - 1, u, w)
    written = [output_pointer(g) for g in (*grads, grad_tau, grad_rows, None)]
    grad_out, grad_out_heads = heads_of(grad_out)
    C.timestep_attention_backward(*arguments, grad_out_heads, (
        *written, *bias_addresses[:2], grads[0].stride(0), grads[1].stride(0), *bias_addresses[2:]))
    if grad_rows is not None:
        grad_tau = sum_by_timestep(grad_rows, timesteps, tau)
    return *grads, grad_tau, *biases


def _forward_kernel(q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, longest, longest_key, dropout_p, scale):
    return cuda_forward_into(_forward_fake(q), q, k, v, tau, u, w, timesteps, None, seed, dropout_p, scale, False,
                             Packed(offsets, key_offsets, longest, longest_key))


def _backward_kernel(grad_out, q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, out, lse, longest, longest_key,
                     dropout_p, scale):
    grads = [q.new_empty(x.shape) for x in (q, k, v)]
    packed = Packed(offsets, key_offsets, longest, longest_key)
    return *grads, *cuda_backward_into(
        grads, grad_out, q, k, v, tau, u, w, timesteps, None, seed, out, lse, dropout_p, scale, False, packed)


def _cuda_cases(device: torch.device):
    """The self-check: short sentences, for which one kernel makes all gradients, and longer ones."""
    dim = 32
    for dtype in (torch.bfloat16, torch.float16):
        for lengths, key_lengths in (([5, 0, 64], [9, 3, 64]), ([70, 7, 1], [65, 130, 0])):
            offsets, key_offsets = (torch.tensor([0, *x], device=device).cumsum(0) for x in (lengths, key_lengths))
            sizes = [sum(lengths), *[sum(key_lengths)] * 2, sum(lengths), 9, 1, 1]
            noise = reference.philox_normal(torch.tensor([3]), 1, 1, sum(sizes) * 2 * dim, 0, None, 3, dtype, device)
            q, k, v, grad, tau, u, w = noise.view(-1, 2, dim).split(sizes)
            timesteps = torch.arange(sum(key_lengths), device=device) * 5 % 9
            inputs = (q, k, v, tau, u[0], w[0], offsets, key_offsets, timesteps, torch.tensor([-7]))
            last = max(lengths), max(key_lengths), 0.25, dim**-0.5
            out, lse = reference.packed_timestep_attention(*inputs, *last)
            tolerance = 8 * torch.finfo(dtype).eps
            # A query without keys has the log-sum-exp -inf, of which no error can be taken.
            yield ("packed_timestep_attention", lambda i=inputs, z=last: _forward_kernel(*i, *z)[0], lambda o=out: o,
                   tolerance)
            exact: list = [grad, *inputs, out, lse, *last]
            yield ("packed_timestep_attention_backward",
                   lambda g=grad, i=inputs, z=last: _backward_kernel(g, *i, *_forward_kernel(*i, *z), *z),
                   lambda a=exact: reference.packed_timestep_attention_backward(*a), tolerance)


def _use_cuda(q: Tensor) -> bool:
    return use_cuda(q) and _cuda.trusted("packed_timestep_attention", q.device, _cuda_cases)


def _forward_cuda(q, *arguments):
    return (_forward_kernel if _use_cuda(q) else reference.packed_timestep_attention)(q, *arguments)


def _backward_cuda(grad_out, q, *arguments):
    return (_backward_kernel if _use_cuda(q) else reference.packed_timestep_attention_backward)(grad_out, q, *arguments)


for _name, _cpu, _gpu in (("packed_timestep_attention", _forward_cpu, _forward_cuda),
                          ("packed_timestep_attention_backward", _backward_cpu, _backward_cuda)):
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _gpu, "CUDA")
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::packed_timestep_attention", lib=library)
def _forward_fake(q, *arguments):
    """The log-sum-exp of sentence b is [H, queries] from offsets[b] * H on."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[0] * q.shape[1],), dtype=lse_dtype)


@torch.library.register_fake("pydiffseq::packed_timestep_attention_backward", lib=library)
def _backward_fake(grad_out, q, k, v, tau, u, w, *arguments):
    return tuple(None if x is None else x.new_empty(x.shape) for x in (q, k, v, tau, u, w))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.longest, ctx.longest_key, ctx.dropout_p, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out: Tensor, _grad_lse: Tensor | None):
    grads = torch.ops.pydiffseq.packed_timestep_attention_backward.default(
        grad_out, *ctx.saved_tensors, ctx.longest, ctx.longest_key, ctx.dropout_p, ctx.scale)
    return *grads, *[None] * 8


register_autograd("packed_timestep_attention", _backward, _setup_context)
