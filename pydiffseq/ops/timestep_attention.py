"""Attention whose keys carry a diffusion timestep each (AR-Diffusion's ``txl`` and ``rotary`` time injections)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import (
    C,
    autocast,
    check_float,
    check_same_device,
    draw_seed,
    library,
    output_pointer,
    pointer,
    register_autograd,
    use_kernel,
)

library.define(
    "timestep_attention(Tensor q, Tensor k, Tensor v, Tensor? tau, Tensor? u, Tensor? w, Tensor? timesteps, "
    "Tensor? key_mask, Tensor? seed, float dropout_p, float scale, bool rotary=False) -> (Tensor out, Tensor lse)")
library.define(
    "timestep_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? tau, Tensor? u, Tensor? w, "
    "Tensor? timesteps, Tensor? key_mask, Tensor? seed, Tensor out, Tensor lse, float dropout_p, float scale, "
    "bool rotary=False) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_tau, Tensor? grad_u, Tensor? grad_w)")


def timestep_attention(q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None = None, u: Tensor | None = None,
                       w: Tensor | None = None, *, timesteps: Tensor | None = None, key_mask: Tensor | None = None,
                       dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention with the scores ``scale * ((q_i + u) . k_j + (q_i + w) . tau_j)``; tau belongs to the key position.

    The ``txl`` time attention of AR-Diffusion (Wu et al. 2023, arXiv 2305.09515; model_utils/CrossAttention.py of its
    code), computed as ``q_i . (k_j + tau_j) + (u . k_j + w . tau_j)``. Without tau it is plain attention.

    Args:
        q: float [B, Nq, H, D]. All float tensors have q's dtype. Slices of a fused projection are taken as they are.
        k, v: [B, Nk, H, D].
        tau: time features [B, Nk, H, D], or a table [R, H, D] to be indexed by ``timesteps``, or None.
        u, w: content and time bias [H, D], or None for zero.
        timesteps: int64 [B, Nk], rows of the table; only together with a table.
        key_mask: bool [B, Nk], True = attend. Masked keys cost no work. A query without keys gives 0.
        dropout_p: probability of dropping an attention probability (in steps of 2**-16), in [0, 1).
        seed: Philox key of the dropout, an int or int64 tensor of one element; drawn from torch's generator if None.
        scale: D**-0.5 if None.

    Returns:
        [B, Nq, H, D] in q's dtype; sums run in float32 (float64 for float64). Differentiable once in q, k, v, tau, u
        and w.

    Raises:
        TypeError: a tensor is not of q's dtype, or timesteps not int64, or key_mask not bool.
        ValueError: shapes do not fit, a timestep is outside the table, w comes without tau, or devices differ.
    """
    q, k, v, tau, u, w = autocast(q, k, v, tau, u, w)
    check_arguments(q, k, v, tau, u, w, timesteps, key_mask)
    key = dropout_key(dropout_p, seed)
    if scale is None:
        scale = q.shape[3] ** -0.5
    return torch.ops.pydiffseq.timestep_attention.default(
        q, k, v, tau, u, w, timesteps, key_mask, key, dropout_p, scale)[0]


def rotary_timestep_attention(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, *, timesteps: Tensor | None = None,
                              key_mask: Tensor | None = None, dropout_p: float = 0.0,
                              seed: int | Tensor | None = None, scale: float | None = None) -> Tensor:
    """Plain attention after q, k **and v** were rotated by learned per-token (cos, sin).

    The ``rotary`` time attention of AR-Diffusion's code (model_utils/CrossAttention.py): the first half of
    ``rotation[b, n, h]`` acts as the cosines and the second as the sines (both unconstrained), and each interleaved
    pair ``(x1, x2)`` of features becomes ``(x1 c - x2 s, x2 c + x1 s)``.

    Args:
        q, k, v: float [B, N, H, D], D even.
        rotation: [B, N, H, D] of q's dtype, or a table [R, H, D] to be indexed by ``timesteps``.
        timesteps, key_mask, dropout_p, seed, scale: as in :func:`timestep_attention`.

    Returns:
        [B, N, H, D] in q's dtype; the rotated q, k and v are rounded to it. Differentiable once in q, k, v and rotation.

    Raises:
        TypeError, ValueError: as :func:`timestep_attention`; also for an odd D or a rotation of another shape.
    """
    q, k, v, rotation = autocast(q, k, v, rotation)
    check_rotation(q, k, v, rotation, timesteps, key_mask)
    if scale is None:
        scale = q.shape[3] ** -0.5
    return torch.ops.pydiffseq.timestep_attention.default(
        q, k, v, rotation, None, None, timesteps, key_mask, dropout_key(dropout_p, seed), dropout_p, scale, True)[0]


def check_rotation(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, timesteps: Tensor | None,
                   key_mask: Tensor | None) -> None:
    if q.dim() != 4 or q.shape[3] % 2 or (timesteps is None and rotation.shape != q.shape):
        raise ValueError(f"rotation must have the shape of q, [B, N, H, D] with an even D, got {list(rotation.shape)} "
                         f"for q {list(q.shape)}")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"k and v must have the shape of q, {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}")
    check_arguments(q, k, v, rotation, None, None, timesteps, key_mask, time="rotation")


def dropout_key(dropout_p: float, seed: int | Tensor | None) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if not 0.0 < dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return draw_seed(seed)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None, u: Tensor | None, w: Tensor | None,
                    timesteps: Tensor | None, key_mask: Tensor | None, time: str = "tau") -> None:
    """``time`` is what the caller calls ``tau``."""
    check_float("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, Nq, H, D], got {list(q.shape)}")
    batch, _, heads, dim = q.shape
    keys = k.shape
    if len(keys) != 4 or keys[0] != batch or keys[2:] != (heads, dim):
        raise ValueError(f"k must have shape [{batch}, Nk, {heads}, {dim}] to go with q, got {list(keys)}")
    tokens = keys[:2]
    _check_part("v", v, q, keys)
    if tau is None:
        if w is not None or timesteps is not None:
            given = "timesteps" if w is None else "w"
            raise ValueError(f"{given} was given without tau, the time features it applies to")
    elif timesteps is None:
        _check_part(time, tau, q, keys)
    else:
        if tau.dim() != 3 or tau.shape[1:] != (heads, dim):
            raise ValueError(f"{time} with timesteps must be a table of shape [R, {heads}, {dim}], got {list(tau.shape)}")
        _check_part(time, tau, q, tau.shape)
        _check_tokens("timesteps", timesteps, torch.int64, tokens)
    for name, bias in (("u", u), ("w", w)):
        if bias is not None:
            _check_part(name, bias, q, keys[2:])
    if key_mask is not None:
        _check_tokens("key_mask", key_mask, torch.bool, tokens)
    check_same_device(q=q, k=k, v=v, **{time: tau}, u=u, w=w, timesteps=timesteps, key_mask=key_mask)


def _check_part(name: str, tensor: Tensor, q: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _check_tokens(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} (batch and keys), got {list(tensor.shape)}")


def heads_of(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """(x, address and strides of its batch, token and head dimensions); a table [R, H, D] has batch stride 0."""
    if x is None:
        return None, (0, 0, 0, 0)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, (x.data_ptr(), *((0,) if x.dim() == 3 else ()), *x.stride()[:-1])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


class Packed(NamedTuple):
    """Sentences without padding between them, in tensors [tokens, H, D]."""

    query_offsets: Tensor  # int64 [B + 1]: where each begins, and the end
    key_offsets: Tensor
    queries: int  # at most, of a sentence
    keys: int


def sizes_of(q: Tensor, k: Tensor, packed: Packed | None) -> tuple[int, int, int, int, int]:
    """(sentences, heads, most queries, most keys, D)."""
    if packed is None:
        return q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.shape[3]
    return packed.query_offsets.shape[0] - 1, q.shape[1], packed.queries, packed.keys, q.shape[2]


class Parts(NamedTuple):
    """Where queries, keys and values lie."""

    sizes: tuple[int, int, int, int, int]     # as of sizes_of
    heads: tuple[tuple[int, ...], ...]        # as of heads_of
    tensors: tuple[Tensor | None, ...]        # what must outlive the call


def parts_of(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None = None) -> Parts:
    tensors, heads = zip(*(heads_of(x) for x in (q, k, v)), strict=True)
    return Parts(sizes_of(q, k, packed), heads, tensors)


def cpu_arguments(parts, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, lse, packed=None):
    """What both bindings take first, and the tensors that must outlive the call."""
    tau, tau_heads = heads_of(tau)
    rest = [_contiguous(x) for x in (timesteps, u, w, key_mask)]
    offsets = _offsets(packed)
    threshold = reference.attention_drop_threshold(dropout_p) if seed is not None else 0
    key = int(seed) & 0xFFFFFFFFFFFFFFFF if threshold else 0
    rows = tau.shape[0] if tau is not None and timesteps is not None else 0
    arguments = (parts.sizes, parts.tensors[0].dtype == torch.bfloat16, scale, (*parts.heads, tau_heads),
                 *[pointer(x) for x in rest], rows, key, threshold, lse.data_ptr(), rotary,
                 tuple(pointer(x) for x in offsets))
    return arguments, (parts, tau, rest, offsets)


def _offsets(packed: Packed | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if packed is None else (packed.query_offsets.contiguous(), packed.key_offsets.contiguous())


def _forward_cpu(q, k, v, tau, u, w, *rest):
    if not use_kernel(q, k, v, tau, u, w):
        return reference.timestep_attention(q, k, v, tau, u, w, *rest)
    return forward_into(_forward_fake(q), parts_of(q, k, v), tau, u, w, *rest)


def forward_into(outputs, parts, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary=False):
    """The CPU kernel: writes ``outputs``, the op's, and returns them."""
    out, lse = outputs
    arguments, _alive = cpu_arguments(parts, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, lse)
    C.timestep_attention_forward(*arguments, output_pointer(out))
    return outputs


def _backward_cpu(grad_out, q, k, v, tau, u, w, timesteps, key_mask, seed, out, lse, dropout_p, scale, rotary=False):
    if not use_kernel(grad_out, q, k, v, tau, u, w):
        return reference.timestep_attention_backward(
            grad_out, q, k, v, tau, u, w, timesteps, key_mask, seed, out, lse, dropout_p, scale, rotary)
    grads = q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(k.shape)
    written = *(output_pointer(g) for g in grads), grads[0].stride(1), grads[1].stride(1)
    return *grads, *backward_into(
        written, grad_out, parts_of(q, k, v), tau, u, w, timesteps, key_mask, seed, lse, dropout_p, scale, rotary)


def backward_into(grads, grad_out, parts, tau, u, w, timesteps, key_mask, seed, lse, dropout_p, scale, rotary):
    """The CPU kernel: writes the gradients of q, k and v, and returns those of tau, u and w.

    ``grads``: their addresses, and the elements from one token to the next in q's and in those of k and v.
    """
    lse = _contiguous(lse)
    arguments, _alive = cpu_arguments(parts, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, lse)
    batch, heads, _, keys, dim = parts.sizes
    table = tau is not None and timesteps is not None
    rows = (batch, keys, heads, dim)
    grad_tau = None if tau is None or table else grad_out.new_empty(rows)
    grad_rows = grad_out.new_empty(rows, dtype=torch.float32) if table else None
    grad_table = grad_out.new_empty(tau.shape, dtype=torch.float32) if table else None
    biases, bias_addresses, _sums = bias_gradients(batch, u, w)
    grad_out, grad_out_heads = heads_of(grad_out)
    C.timestep_attention_backward(
        *arguments, grad_out_heads, (*grads[:3], *[output_pointer(g) for g in (grad_tau, grad_rows, grad_table)],
                                     *bias_addresses[:2], *grads[3:], *bias_addresses[2:]))
    return grad_table.to(grad_out.dtype) if table else grad_tau, *biases


def bias_gradients(batch: int, u: Tensor | None, w: Tensor | None):
    """Gradients of u and w for the CPU kernel to write, the addresses of their sums in each sentence and of them, and what
    must outlive the call."""
    biases = [None if bias is None else bias.new_empty(bias.shape) for bias in (u, w)]
    given = [bias for bias in biases if bias is not None]
    size = batch * given[0].numel() if given else 0
    sums = given[0].new_empty((len(given), size), dtype=torch.float32) if given else None
    first = pointer(sums)
    second = first + 4 * size * (len(given) - 1)
    return biases, (first if u is not None else 0, second if w is not None else 0, *[pointer(g) for g in biases]), sums


# --- CUDA kernels (csrc/cuda/timestep_attention_*.cu) ---

_KEY_BLOCK = 64  # kAttentionRows in csrc/cuda/timestep_attention.h


def use_cuda(q: Tensor) -> bool:
    """Whether ``q`` is for the CUDA kernels (bfloat16 or float16, D a multiple of 8 up to 128), and they are trusted."""
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
            and _cuda.compiled() and _cuda.trusted("timestep_attention", q.device, _cuda_cases))


def _aligned(x: Tensor | None) -> Tensor | None:
    """x, or a copy whose rows start at multiples of 16 bytes."""
    if x is None or (x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _cuda_arguments(q, k, v, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, lse, out, packed):
    """What both CUDA bindings take first, and the tensors that must outlive the call."""
    heads = [heads_of(_aligned(x)) for x in (q, k, v, tau)]
    rest = [_contiguous(x) for x in (timesteps, u, w, key_mask)]
    offsets = _offsets(packed)
    threshold = reference.attention_drop_threshold(dropout_p) if seed is not None else 0
    rows = tau.shape[0] if tau is not None and timesteps is not None else 0
    seed, on_device = (None, False) if not threshold else _cuda.key_arguments(seed, q.device)
    arguments = (sizes_of(q, k, packed), scale, tuple(t[1] for t in heads), *(pointer(x) for x in rest), rows, threshold,
                 lse.data_ptr(), rotary, tuple(pointer(x) for x in offsets), out.data_ptr(), pointer(seed), on_device)
    return arguments, (heads, rest, offsets, seed)


def _forward_kernel(q, k, v, tau, u, w, timesteps, key_mask, seed, dropout_p, scale,
                    rotary=False) -> tuple[Tensor, Tensor]:
    outputs = _forward_fake(q)
    return cuda_forward_into(outputs, q, k, v, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary)


def cuda_forward_into(outputs, q, k, v, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, packed=None):
    """The CUDA kernel: writes ``outputs``, the op's, and returns them."""
    out, lse = outputs
    arguments, _alive = _cuda_arguments(
        q, k, v, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, lse, out, packed)
    _cuda.launch(C.timestep_attention_forward_cuda, q.device, *arguments, _cuda.DTYPES[q.dtype])
    return outputs


def _backward_kernel(grad_out, q, k, *arguments):
    grads = q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(k.shape)
    return *grads, *cuda_backward_into(grads, grad_out, q, k, *arguments)


def cuda_backward_into(grads, grad_out, q, k, v, tau, u, w, timesteps, key_mask, seed, out, lse, dropout_p, scale,
                       rotary=False, packed=None):
    """The CUDA kernel: as :func:`backward_into`; the rows of ``grads`` start at multiples of 16 bytes."""
    out, lse = out.contiguous(), lse.contiguous()
    arguments, _alive = _cuda_arguments(
        q, k, v, tau, u, w, timesteps, key_mask, seed, dropout_p, scale, rotary, lse, out, packed)
    batch, heads, _, keys, dim = arguments[0]
    table = tau is not None and timesteps is not None
    grad_tau = None if tau is None or table else q.new_empty(k.shape)
    grad_rows = q.new_empty(k.shape, dtype=torch.float32) if table or rotary else None
    # A sentence that has fewer keys than the longest leaves parts out.
    parts = q.new_empty if packed is None else q.new_zeros
    grad_u, grad_w = (None if bias is None else parts((batch, heads, -(-keys // _KEY_BLOCK), dim), dtype=torch.float32)
                      for bias in (u, w))
    written = (*grads, grad_tau, grad_rows, None, grad_u, grad_w)
    grad_out, grad_out_heads = heads_of(_aligned(grad_out))
    delta = torch.empty_like(lse)
    _cuda.launch(C.timestep_attention_backward_cuda, q.device, *arguments, grad_out_heads,
                 (*(pointer(g) for g in written), grads[0].stride(-3), grads[1].stride(-3)), delta.data_ptr(),
                 _cuda.DTYPES[q.dtype])
    if table:
        grad_tau = sum_by_timestep(grad_rows, timesteps, tau)
    return grad_tau, *(None if g is None else g.sum((0, 2)).to(q.dtype) for g in (grad_u, grad_w))


def sum_by_timestep(rows: Tensor, timesteps: Tensor, table: Tensor) -> Tensor:
    """Gradient of the table from those of its rows, token by token. It sorts by timestep: the same bits every time."""
    return torch.ops.aten.embedding_dense_backward(
        rows.flatten(-2), timesteps, table.shape[0], -1, False).view(table.shape).to(table.dtype)


def _cuda_cases(device: torch.device):
    """The self-check: forward and backward of every head dimension, with everything that the kernels can do."""
    for dtype, dim in ((dtype, dim) for dtype in (torch.bfloat16, torch.float16) for dim in (16, 32, 64, 96, 128)):
        tolerance = 8 * torch.finfo(dtype).eps
        for queries, keys, rotary in ((66, 130, False), (64, 41, False), (66, 66, True), (41, 41, True)):
            inputs, grad = _case(device, dtype, queries, keys, dim, rotary)
            out, lse = reference.timestep_attention(*inputs)
            yield ("timestep_attention", lambda i=inputs: _forward_kernel(*i), lambda o=out, e=lse: (o, e), tolerance)
            # The backward pass gets the log-sum-exp of its own forward pass: the two round rotated rows alike.
            tensors, last = inputs[:9], inputs[9:]
            yield ("timestep_attention_backward",
                   lambda g=grad, t=tensors, z=last: _present(_backward_kernel(g, *t, *_forward_kernel(*t, *z), *z)),
                   lambda g=grad, t=tensors, z=last, o=out, e=lse: _present(
                       reference.timestep_attention_backward(g, *t, o, e, *z)), tolerance)


def _case(device: torch.device, dtype: torch.dtype, queries: int, keys: int, dim: int, rotary: bool):
    """The op's arguments, and a gradient of its output."""
    batch, heads, rows = 2, 2, 9
    sizes = [batch * queries, batch * keys, batch * keys, batch * queries, rows, 1, 1]
    noise = reference.philox_normal(
        torch.tensor([dim]), 1, 1, sum(sizes) * heads * dim, 0, None, 3, dtype, device)
    q, k, v, grad, tau, u, w = noise.view(-1, heads, dim).split(sizes)
    q, k, v, grad = (x.view(batch, -1, heads, dim) for x in (q, k, v, grad))
    timesteps = (torch.arange(batch * keys, device=device) * 5 % rows).view(batch, keys)
    mask = torch.arange(keys, device=device) % 7 != torch.tensor([[3], [4]], device=device)
    biases = (None, None) if rotary else (u[0], w[0])
    return (q, k, v, tau, *biases, timesteps, mask, torch.tensor([-7]), 0.25, dim**-0.5, rotary), grad


def _present(grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(g for g in grads if g is not None)


def _forward_cuda(q, *arguments):
    return (_forward_kernel if use_cuda(q) else reference.timestep_attention)(q, *arguments)


def _backward_cuda(grad_out, q, *arguments):
    return (_backward_kernel if use_cuda(q) else reference.timestep_attention_backward)(grad_out, q, *arguments)


for _name, _cpu, _gpu in (("timestep_attention", _forward_cpu, _forward_cuda),
                          ("timestep_attention_backward", _backward_cpu, _backward_cuda)):
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _gpu, "CUDA")
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::timestep_attention", lib=library)
def _forward_fake(q, *arguments):
    batch, queries, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=lse_dtype)


@torch.library.register_fake("pydiffseq::timestep_attention_backward", lib=library)
def _backward_fake(grad_out, q, k, v, tau, u, w, timesteps, key_mask, seed, out, lse, dropout_p, scale, rotary=False):
    return tuple(None if x is None else x.new_empty(x.shape) for x in (q, k, v, tau, u, w))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.rotary = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out: Tensor, _grad_lse: Tensor | None):
    grads = torch.ops.pydiffseq.timestep_attention_backward.default(
        grad_out, *ctx.saved_tensors, ctx.dropout_p, ctx.scale, ctx.rotary)
    return *grads, None, None, None, None, None, None


register_autograd("timestep_attention", _backward, _setup_context)
