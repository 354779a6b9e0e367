"""Every op in a few lines of plain torch: the oracle of the tests, and the fallback where there is no kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# --- cross_entropy ---

_LOGITS_AT_ONCE = 1 << 24  # so that other devices do not hold the [M, V] logits either


def _row_blocks(rows: int, vocab: int) -> list[slice]:
    step = max(1, _LOGITS_AT_ONCE // max(1, vocab))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, table, bias).to(torch.promote_types(x.dtype, torch.float32))


def linear_cross_entropy(x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float = 0.0,
                         ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Losses [M] and log-sum-exp of the logits [M] (0 in ignored rows), of ``x @ table.T + bias``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    losses, lse = x.new_zeros(x.shape[0], dtype=dtype), x.new_zeros(x.shape[0], dtype=dtype)
    for rows in _row_blocks(x.shape[0], table.shape[0]):
        logits = _logits(x[rows], table, bias)
        losses[rows] = torch.nn.functional.cross_entropy(
            logits, target[rows], ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
        lse[rows] = logits.logsumexp(-1).where(target[rows] != ignore_index, 0.0)
    return losses, lse


def linear_cross_entropy_backward(
        grad: Tensor, x: Tensor, table: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor,
        label_smoothing: float = 0.0, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, table and bias: ``grad * (softmax - (1 - s) * onehot(target) - s / V)`` is that of the logits."""
    vocab = table.shape[0]
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_table = torch.zeros_like(table, dtype=lse.dtype, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=lse.dtype)
    for rows in _row_blocks(x.shape[0], vocab):
        counts = target[rows] != ignore_index
        g = (_logits(x[rows], table, bias) - lse[rows, None]).exp() - label_smoothing / vocab
        g.scatter_add_(1, target[rows].where(counts, 0)[:, None], torch.full_like(g[:, :1], label_smoothing - 1.0))
        g = torch.where(counts[:, None], g * grad[rows, None], 0.0)
        grad_x[rows] = (g.to(x.dtype) @ table).to(x.dtype)
        grad_table += g.to(x.dtype).T @ x[rows]
        if grad_bias is not None:
            grad_bias += g.sum(0)
    return grad_x, grad_table.to(table.dtype), None if grad_bias is None else grad_bias.to(table.dtype)

# --- nearest ---

_DIFFERENCES_AT_ONCE = 1 << 24


def _nearest_scores(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool) -> Iterator[tuple[slice, Tensor]]:
    """Float64 scores [rows, V] by definition, minus the squared distance or product plus bias, NaN as -inf; by blocks."""
    rows = table.double()
    step = max(1, _DIFFERENCES_AT_ONCE // (table.shape[0] * (1 if dot else table.shape[1])))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        if dot:
            scores = x[part].double() @ rows.T + (0.0 if bias is None else bias.double())
        else:
            scores = -(x[part, None].double() - rows).square().sum(-1)
        yield part, scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def nearest(x: Tensor, table: Tensor, bias: Tensor | None = None, dot: bool = False) -> tuple[Tensor, Tensor]:
    """The first of the best in float64, and its row; see :func:`pydiffseq.ops.nearest`."""
    flat = x.reshape(-1, x.shape[-1])
    ids = flat.new_empty(flat.shape[0], dtype=torch.int64)
    for part, scores in _nearest_scores(flat, table, bias, dot):
        ids[part] = scores.argmax(-1)
    ids = ids.view(x.shape[:-1])
    return ids, table[ids]


def nearest_topk(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool, k: int) -> tuple[Tensor, Tensor]:
    """Scores and ids [..., k] in float64, best first, ties by id; see :func:`pydiffseq.ops.nearest_topk`."""
    flat = x.reshape(-1, x.shape[-1])
    values, ids = flat.new_empty(flat.shape[0], k, dtype=torch.float64), flat.new_empty(flat.shape[0], k, dtype=torch.int64)
    for part, scores in _nearest_scores(flat, table, bias, dot):
        ordered, order = scores.sort(stable=True, dim=-1, descending=True)
        values[part], ids[part] = ordered[:, :k], order[:, :k]
    return values.view(*x.shape[:-1], k).to(torch.promote_types(x.dtype, torch.float32)), ids.view(*x.shape[:-1], k)


# --- timestep_attention ---

ATTENTION_STREAM = (2 << 24) | 1  # csrc/common/timestep_attention.h


def attention_keep_mask(seed: Tensor, drop_threshold: int, batch: int, heads: int, queries: int, keys: int,
                        device: torch.device | str = "cpu") -> Tensor:
    """Which probabilities dropout keeps, bool [batch, heads, queries, keys]: 16 Philox bits >= ``drop_threshold``.

    The block with counter (key // 8, ATTENTION_STREAM, query, batch * heads + head) serves 8 consecutive keys.
    """
    groups = (keys + 7) // 8
    head = torch.arange(batch * heads).view(-1, 1, 1)
    words = philox_words((torch.arange(groups), ATTENTION_STREAM, torch.arange(queries)[:, None], head), seed.cpu())
    bits = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)], -1)
    return (bits >= drop_threshold).reshape(batch, heads, queries, groups * 8)[..., :keys].to(device)


def attention_drop_threshold(dropout_p: float) -> int:
    """``dropout_p`` in units of 2**-16."""
    return min(round(dropout_p * 65536), 65535)


def _dropout_factors(p: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | float:
    threshold = attention_drop_threshold(dropout_p)
    if threshold == 0 or seed is None:
        return 1.0
    batch, heads, queries, keys = p.shape
    keep = attention_keep_mask(seed, threshold, batch, heads, queries, keys, p.device)
    return keep.to(p.dtype) / (1.0 - threshold / 65536)


def _tau_by_token(tau: Tensor | None, timesteps: Tensor | None) -> Tensor | None:
    if tau is None or timesteps is None:
        return tau
    read = timesteps.device.type == "cpu" and timesteps.numel()   # elsewhere it would wait for the device
    if read and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < tau.shape[0]:
        raise ValueError(f"timesteps must be in 0..{tau.shape[0] - 1} (rows of tau), got "
                         f"{int(timesteps.min())}..{int(timesteps.max())}")
    return tau[timesteps]


def _attention_scores(q, k, tau, u, w, key_mask, scale) -> Tensor:
    """scale * ((q + u) . k + (q + w) . tau), [B, H, Nq, Nk]; -inf where the mask removes a key."""
    scores = torch.einsum("bihd,bjhd->bhij", q if u is None else q + u, k)
    if tau is not None:
        scores = scores + torch.einsum("bihd,bjhd->bhij", q if w is None else q + w, tau)
    scores = scores * scale
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.autocast has had its say about the op's inputs already."""
    @functools.wraps(function)
    def run(first: Tensor, *arguments: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments)

    return run


def _at_least_float(*tensors: Tensor | None) -> list:
    return [t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


@_without_autocast
def timestep_attention(q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None, u: Tensor | None, w: Tensor | None,
                       timesteps: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, dropout_p: float,
                       scale: float, rotary: bool = False) -> tuple[Tensor, Tensor]:
    """Output [B, Nq, H, D] and log-sum-exp of the scores [B, H, Nq]; see :func:`pydiffseq.ops.timestep_attention` and,
    for ``rotary``, :func:`pydiffseq.ops.rotary_timestep_attention`, whose rotation is ``tau``."""
    dtype = q.dtype
    q, k, v, tau, u, w = _at_least_float(q, k, v, tau, u, w)
    tau = _tau_by_token(tau, timesteps)
    if rotary and tau is not None:
        rotation, tau = tau, None
        q, k, v = (rotate_pairs(x, rotation) for x in (q, k, v))
    scores = _attention_scores(q, k, tau, u, w, key_mask, scale)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])  # a row without keys is 0, not NaN
    out = torch.einsum("bhij,bjhd->bihd", p * _dropout_factors(p, seed, dropout_p), v)
    return out.to(dtype).contiguous(), lse


@_without_autocast
def timestep_attention_backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None, u: Tensor | None, w: Tensor | None,
        timesteps: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor,
        dropout_p: float, scale: float, rotary: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, tau, u and w. With dS that of the unscaled scores and c_j = sum_i dS_ij:
    dk_j = (dS^T q)_j + c_j u, dtau_j = (dS^T q)_j + c_j w, du = sum_j c_j k_j, dw = sum_j c_j tau_j. ``out`` (here not
    needed) is the forward pass's."""
    dtype = q.dtype
    grad_out, q, k, v, tau, u, w = _at_least_float(grad_out, q, k, v, tau, u, w)
    tau_j = _tau_by_token(tau, timesteps)
    parts, rotation = (q, k, v), None
    if rotary and tau_j is not None:
        rotation, tau_j = tau_j, None
        q, k, v = (rotate_pairs(x, rotation) for x in parts)
    scores = _attention_scores(q, k, tau_j, u, w, key_mask, scale)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    factors = _dropout_factors(p, seed, dropout_p)
    grad_v = torch.einsum("bhij,bihd->bjhd", p * factors, grad_out)
    grad_p = torch.einsum("bihd,bjhd->bhij", grad_out, v) * factors
    grad_scores = scale * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    grad_q = torch.einsum("bhij,bjhd->bihd", grad_scores, k if tau_j is None else k + tau_j)
    grad_key = torch.einsum("bhij,bihd->bjhd", grad_scores, q)
    sums = grad_scores.sum(2).transpose(1, 2)[..., None]  # [B, Nk, H, 1]
    grad_k = grad_key if u is None else grad_key + sums * u
    grad_tau = None
    if rotation is not None:
        grads = grad_q, grad_k, grad_v
        grad_tau = torch.stack([_rotation_gradient(x, grad) for x, grad in zip(parts, grads, strict=True)]).sum(0)
        grad_q, grad_k, grad_v = (rotate_pairs(grad, _inverse_rotation(rotation)) for grad in grads)
    elif tau is not None:
        grad_tau = grad_key if w is None else grad_key + sums * w
    if tau is not None and grad_tau is not None and timesteps is not None:
        grad_tau = torch.zeros_like(tau).index_put_((timesteps,), grad_tau, accumulate=True)
    grad_u = None if u is None else (sums * k).sum((0, 1))
    grad_w = None if w is None or tau_j is None else (sums * tau_j).sum((0, 1))

    def finish(grad):
        return None if grad is None else grad.to(dtype, memory_format=torch.contiguous_format, copy=True)

    return finish(grad_q), finish(grad_k), finish(grad_v), finish(grad_tau), finish(grad_u), finish(grad_w)


class _Packing:
    """Moves tokens between [tokens, ...] and [sentences, longest, ...], where zeros pad, without waiting for a device."""

    def __init__(self, offsets: Tensor, tokens: int, longest: int) -> None:
        at = torch.arange(tokens, device=offsets.device)
        self.sentence = torch.searchsorted(offsets[1:].contiguous(), at, right=True).clamp_max(offsets.shape[0] - 2)
        self.start = offsets[self.sentence]
        self.position = (at - self.start).clamp_max(longest - 1)
        self.lengths = offsets[1:] - offsets[:-1]
        self.shape = (offsets.shape[0] - 1, longest)
        self.mask = torch.arange(longest, device=offsets.device) < self.lengths[:, None]

    def pad(self, x: Tensor) -> Tensor:
        return x.new_zeros((*self.shape, *x.shape[1:])).index_put((self.sentence, self.position), x)

    def take(self, padded: Tensor) -> Tensor:
        return padded[self.sentence, self.position]

    def sum_at(self, heads: int) -> Tensor:
        """[tokens, heads]: where the log-sum-exps lie, sentence by sentence [heads, queries]."""
        head = torch.arange(heads, device=self.start.device) * self.lengths[self.sentence][:, None]
        return (self.start * heads + self.position)[:, None] + head


def _pad_sentences(q, k, v, tau, offsets, key_offsets, timesteps, longest, longest_key):
    of_queries = _Packing(offsets, q.shape[0], longest)
    of_keys = _Packing(key_offsets, k.shape[0], longest_key)
    tau = tau if tau is None or timesteps is not None else of_keys.pad(tau)
    timesteps = None if timesteps is None else of_keys.pad(timesteps)
    return of_queries, of_keys, of_queries.pad(q), of_keys.pad(k), of_keys.pad(v), tau, timesteps


def packed_timestep_attention(q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, longest, longest_key, dropout_p,
                              scale) -> tuple[Tensor, Tensor]:
    """Output [queries, H, D] and log-sum-exp; see :func:`pydiffseq.ops.packed_timestep_attention`."""
    of_queries, of_keys, *padded, tau, timesteps = _pad_sentences(
        q, k, v, tau, offsets, key_offsets, timesteps, longest, longest_key)
    out, lse = timestep_attention(*padded, tau, u, w, timesteps, of_keys.mask, seed, dropout_p, scale)
    packed = lse.new_empty(q.shape[0] * q.shape[1])
    packed[of_queries.sum_at(q.shape[1])] = of_queries.take(lse.transpose(1, 2))
    return of_queries.take(out), packed


def packed_timestep_attention_backward(grad_out, q, k, v, tau, u, w, offsets, key_offsets, timesteps, seed, out, lse,
                                       longest, longest_key, dropout_p, scale):
    of_queries, of_keys, *padded, time, timesteps = _pad_sentences(
        q, k, v, tau, offsets, key_offsets, timesteps, longest, longest_key)
    sums = of_queries.pad(lse[of_queries.sum_at(q.shape[1])]).transpose(1, 2)
    grad_q, grad_k, grad_v, grad_tau, *biases = timestep_attention_backward(
        of_queries.pad(grad_out), *padded, time, u, w, timesteps, of_keys.mask, seed, padded[0], sums, dropout_p, scale)
    if grad_tau is not None and timesteps is None:
        grad_tau = of_keys.take(grad_tau)
    return of_queries.take(grad_q), of_keys.take(grad_k), of_keys.take(grad_v), grad_tau, *biases


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """(x1 c - x2 s, x2 c + x1 s) for each interleaved pair of the last dimension; c, s = the halves of ``rotation``."""
    cos, sin = rotation.chunk(2, -1)
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)


def _inverse_rotation(rotation: Tensor) -> Tensor:
    """(c, -s): it takes the gradient of rotated pairs back to that of the pairs."""
    cos, sin = rotation.chunk(2, -1)
    return torch.cat((cos, -sin), -1)


def _rotation_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the rotation of x, given that of the rotated pairs."""
    (x1, x2), (g1, g2) = (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (x, grad))
    return torch.cat((g1 * x1 + g2 * x2, g2 * x1 - g1 * x2), -1)


# --- noise ---

_LOG_W = (0.9999996423721313, -0.6666786074638367, 0.5000516176223755, -0.399270623922348, 0.3310374319553375,
          -0.2976647913455963, 0.28852564096450806, -0.1796015501022339)
_SIN = (-0.16666655242443085, 0.008332177996635437, -0.00019517296459525824)
_COS = (0.04166664555668831, -0.001388736767694354, 2.4438446416752413e-05)
STREAMS = {"x_t": 0, "x_0": 1, "dropout": 2, "initial": 3}


def philox_words(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: Tensor) -> list[Tensor]:
    """The four words of Philox 4x32-10 (Salmon et al. 2011) as int64 tensors; the words of ``counter`` broadcast."""
    low = 0xFFFFFFFF
    c = [torch.as_tensor(word, dtype=torch.int64, device=seed.device) for word in counter]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # the low 64 bits, as the signed product wraps
        c = [(p1 >> 32) & low ^ c[1] ^ k0, p1 & low, (p0 >> 32) & low ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return list(torch.broadcast_tensors(*c))


def fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors with one rounding, as the kernels do it (plain arithmetic for float64)."""
    product = (a.double() if isinstance(a, Tensor) else a) * b.double()  # exact for float32: 48 bits
    if c.dtype == torch.float64 or b.dtype == torch.float64:
        return product + c
    addend = c.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    # Rounding to odd in float64 first makes the second rounding, to float32, the only one that shows (Boldo 2008).
    bits = total.view(torch.int64)
    inexact = (error.abs() > 0) & (bits & 1 == 0)
    bits = bits + torch.where(inexact, torch.where((error > 0) == (total > 0), 1, -1), 0)
    return bits.view(torch.float64).float()


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = fma(value, x, torch.full_like(x, coefficient))
    return value


def _normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller, step by step as ``normal_pair`` in csrc/common/philox.h."""
    u = fma(2.0**-32, radius_word.float(), torch.full_like(radius_word, 2.0**-33, dtype=torch.float32))
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    squared = fma(-1.3862943649291992, exponent.float(), fma(f * f, _polynomial(f, _LOG_W), f * -2.0))
    radius = squared.double().sqrt().float()  # torch's float32 sqrt (MKL) is at times one ulp off
    angle = (angle_word << 2) & 0xFFFFFFFF
    t = (angle - ((angle >> 31) << 32)).float() * 3.65729529994141e-10
    z = t * t
    sine = fma(t * z, _polynomial(z, _SIN), t)
    cosine = fma(z * z, _polynomial(z, _COS), fma(-0.5, z, torch.ones_like(z)))
    radius = torch.where(angle_word >> 31 == 1, -radius, radius)
    swap = (angle_word >> 30) & 1 == 1
    return radius * torch.where(swap, cosine, sine), radius * torch.where(swap, sine, cosine)


def philox_normal(seed: Tensor, B: int, N: int, d: int, step: int, rows: Tensor | None, stream: int,
                  dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normals [B, N, d]; see :func:`pydiffseq.ops.philox_normal`."""
    groups = (d + 3) // 4
    seed = seed.to(device)
    rows = torch.arange(B, device=device) if rows is None else rows
    group = torch.arange(N * groups, device=device)[None, :]
    counter = (group, stream << 24 | step, rows[:, None] & 0xFFFFFFFF, (rows[:, None] >> 32) & 0xFFFFFFFF)
    w = philox_words(counter, seed)
    normals = torch.stack([*_normal_pair(w[0], w[1]), *_normal_pair(w[2], w[3])], -1)
    return normals.reshape(B, N, 4 * groups)[..., :d].to(dtype)


def _noise(like: Tensor, seed: Tensor, step: int, rows: Tensor | None, stream: str) -> Tensor:
    B, N, d = like.shape
    return philox_normal(seed, B, N, d, step, rows, STREAMS[stream], torch.float32, like.device)


def check_index(name: str, index: Tensor, size: int) -> None:
    """Raise ``ValueError`` for an index outside ``0..size-1``. On the CPU only: elsewhere the check would wait."""
    if index.device.type == "cpu" and index.numel() and (bad := (index < 0) | (index >= size)).any():
        raise ValueError(f"{name} must be in 0..{size - 1}, got {int(index[bad][0])}")


def token_times(t: Tensor, lengths: Tensor | None, anchor_scale: float, N: int, T: int) -> Tensor:
    """``t``, or with ``lengths`` the token timesteps [B, N] of the sentence indices ``t`` [B]."""
    if lengths is None:
        return t
    from pydiffseq.diffusion.token_times import xy_line  # here: the ops need none of that package

    return xy_line(t, lengths, N, T, anchor_scale)


def check_times(t: Tensor, lengths: Tensor | None, T: int) -> None:
    """Raise ``ValueError`` for a timestep, or with ``lengths`` a sentence index, that is out of range. On the CPU only."""
    if lengths is None:
        check_index("t", t, T)
    elif t.device.type == "cpu" and bool((bad := (t < 0) | (t >= T + lengths)).any()):
        raise ValueError(f"t must be in 0..{T - 1 + int(lengths[bad][0])}, got {int(t[bad][0])}")


def _per_token(table: Tensor, t: Tensor) -> Tensor:
    values = table[t]
    return values[:, None, None] if t.dim() == 1 else values[..., None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def q_sample(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, mask: Tensor | None, seed: Tensor, step: int,
             rows: Tensor | None, return_noise: bool, absorbing: Tensor | None = None, gone: Tensor | None = None,
             lengths: Tensor | None = None, anchor_scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """``signal[t] x0 + sigma[t] eps`` and ``eps`` (empty unless asked for); see :func:`pydiffseq.ops.q_sample`."""
    check_times(t, lengths, signal.shape[0])
    t = token_times(t, lengths, anchor_scale, x0.shape[1], signal.shape[0])
    eps = _noise(x0, seed, step, rows, "x_t")
    x_t = fma(_per_token(sigma, t), eps, _per_token(signal, t) * _wide(x0))
    if absorbing is not None:
        goal = _wide(absorbing).expand_as(x_t)
        x_t = fma(1.0 - _per_token(signal, t), goal, x_t)
        x_t = x_t if gone is None else torch.where(gone[..., None], goal, x_t)
    x_t, eps = x_t.to(x0.dtype), eps.to(x0.dtype)
    if mask is not None:
        x_t, eps = x_t.where(mask[..., None], x0), eps.where(mask[..., None], 0.0)
    return x_t, eps if return_noise else x0.new_empty(0)


def q_sample_backward(grad: Tensor, t: Tensor, signal: Tensor, mask: Tensor | None, lengths: Tensor | None = None,
                      anchor_scale: float = 2.0) -> Tensor:
    """``signal[t] grad``, and ``grad`` itself where the mask is False."""
    t = token_times(t, lengths, anchor_scale, grad.shape[1], signal.shape[0])
    scaled = (_per_token(signal, t) * _wide(grad)).to(grad.dtype)
    return scaled.contiguous() if mask is None else scaled.where(mask[..., None], grad).contiguous()


def embed_q_sample(table: Tensor, ids: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, sigma0: float,
                   mask: Tensor | None, seed: Tensor, step: int, rows: Tensor | None, return_noise: bool,
                   *others) -> tuple[Tensor, Tensor, Tensor]:
    """``x0 = table[ids] + sigma0 eps'``, then :func:`q_sample`; see :func:`pydiffseq.ops.embed_q_sample`."""
    check_index("ids", ids, table.shape[0])
    x0 = table[ids]
    if sigma0 != 0:
        noise = _noise(x0, seed, step, rows, "x_0")
        x0 = fma(torch.full_like(noise, sigma0), noise, _wide(x0)).to(x0.dtype)
    return x0, *q_sample(x0, t, signal, sigma, mask, seed, step, rows, return_noise, *others)


def embed_q_sample_backward(grad_x0: Tensor | None, grad_x_t: Tensor | None, ids: Tensor, t: Tensor, signal: Tensor,
                            mask: Tensor | None, vocab: int, like: Tensor, lengths: Tensor | None = None,
                            anchor_scale: float = 2.0) -> Tensor:
    """Gradient [vocab, d] of the table: the gradients of both outputs, added up by id in the dtype of ``like``."""
    wide = torch.promote_types(like.dtype, torch.float32)
    total = ids.new_zeros(*ids.shape, like.shape[-1], dtype=wide)
    if grad_x0 is not None:
        total += grad_x0
    if grad_x_t is not None:
        total += q_sample_backward(_wide(grad_x_t), t, signal, mask, lengths, anchor_scale)
    table = total.new_zeros(vocab, like.shape[-1])
    return table.index_add(0, ids.flatten(), total.flatten(0, 1)).to(like.dtype)


def sampler_step(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, seed: Tensor, step: int,
                 rows: Tensor | None, limit: float | None = None, ids: Tensor | None = None) -> Tensor:
    """``a x + b x0_hat + c eps`` with coefficients [B, N]; see :func:`pydiffseq.ops.sampler_step`."""
    if ids is not None:
        check_index("ids", ids, x0_hat.shape[0])
        x0_hat = x0_hat[ids]
    x0_hat = x0_hat if limit is None else _wide(x0_hat).clamp(-limit, limit)
    a, b, c = a[..., None], b[..., None], c[..., None]
    eps = _noise(x, seed, step, rows, "x_t")
    mean = fma(b, _wide(x0_hat), a * _wide(x))
    return torch.where(c == 0, mean, fma(c, eps, mean)).to(x.dtype)


# --- dropout ---


def dropout_threshold(p: float) -> int:
    """An element is dropped where its 16-bit piece lies below this: ``p`` in units of 2^-16."""
    return round(p * 65536)


def _kept(shape: torch.Size, threshold: int, seed: Tensor, device: torch.device) -> Tensor:
    n = shape.numel()
    block = torch.arange((n + 7) // 8, device=device)
    words = philox_words((block & 0xFFFFFFFF, STREAMS["dropout"] << 24, block >> 32, 0), seed.to(device))
    pieces = torch.stack([piece for word in words for piece in (word & 0xFFFF, word >> 16)], -1)
    return (pieces.flatten()[:n] >= threshold).reshape(shape)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x / (1 - p)`` where Philox keeps an element, 0 elsewhere; see :func:`pydiffseq.ops.dropout`."""
    return dropout_add(x, None, p, seed)


def dropout_add(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    """``residual + dropout(x)``, rounded once; see :func:`pydiffseq.ops.dropout_add`."""
    threshold = dropout_threshold(p)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    out = torch.where(_kept(x.shape, threshold, seed, x.device), _wide(x) * scale, 0.0)
    return (out if residual is None else _wide(residual) + out).to(x.dtype).contiguous()


# --- geglu ---


def geglu(x: Tensor) -> Tensor:
    a, gate = _wide(x).chunk(2, -1)
    return (a * torch.nn.functional.gelu(gate)).to(x.dtype)


def geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    a, gate = _wide(x).chunk(2, -1)
    grad = _wide(grad)
    grad_gate = torch.ops.aten.gelu_backward(grad * a, gate)
    return torch.cat([grad * torch.nn.functional.gelu(gate), grad_gate], -1).to(x.dtype)
