"""Every op in a few lines of plain torch: the oracle of the tests, and the fallback where there is no kernel."""

from __future__ import annotations

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
    """Losses [M] and log-sum-exp of the logits [M] (0 in ignored rows); see :func:`pydiffseq.ops.linear_cross_entropy`."""
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


# --- timestep_attention ---

ATTENTION_STREAM = (2 << 24) | 1  # csrc/common/timestep_attention.h


def attention_keep_mask(seed: Tensor, drop_threshold: int, batch: int, heads: int, queries: int, keys: int,
                        device: torch.device | str = "cpu") -> Tensor:
    """Which probabilities dropout keeps, bool [batch, heads, queries, keys]: 16 Philox bits >= ``drop_threshold``.

    The block with counter (key // 8, ATTENTION_STREAM, query, batch * heads + head) serves 8 consecutive keys.
    """
    groups = (keys + 7) // 8
    shape = (batch * heads, queries, groups)
    head = torch.arange(batch * heads, device=device).view(-1, 1, 1).expand(shape)
    query = torch.arange(queries, device=device).view(1, -1, 1).expand(shape)
    group = torch.arange(groups, device=device).expand(shape)
    key = int(seed)
    words = _attention_philox([group, torch.full_like(group, ATTENTION_STREAM), query, head],
                              key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF)
    bits = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)], -1)
    return (bits >= drop_threshold).reshape(batch, heads, queries, groups * 8)[..., :keys]


def _attention_philox(c: list[Tensor], k0: int, k1: int) -> list[Tensor]:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    for step in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # wraps in int64, which keeps all 64 bits of the product
        c = [(p1 >> 32 & low) ^ c[1] ^ ((k0 + step * 0x9E3779B9) & low), p1 & low,
             (p0 >> 32 & low) ^ c[3] ^ ((k1 + step * 0xBB67AE85) & low), p0 & low]
    return c


def attention_drop_threshold(dropout_p: float) -> int:
    """``dropout_p`` in units of 2**-16."""
    return min(round(dropout_p * 65536), 65535)


def _dropout_factors(p: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | float:
    threshold = attention_drop_threshold(dropout_p)
    if threshold == 0 or seed is None:
        return 1.0
    return attention_keep_mask(seed, threshold, *p.shape, device=p.device).to(p.dtype) / (1.0 - threshold / 65536)


def _tau_by_token(tau: Tensor | None, timesteps: Tensor | None) -> Tensor | None:
    if tau is None or timesteps is None:
        return tau
    if timesteps.numel() and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < tau.shape[0]:
        raise ValueError(f"timesteps must be in 0..{tau.shape[0] - 1} (rows of tau), got "
                         f"{int(timesteps.min())}..{int(timesteps.max())}")
    return tau[timesteps]


def _attention_scores(q, k, tau, u, w, key_mask, scale) -> Tensor:
    """scale * ((q + u) . k + (q + w) . tau) as [B, H, Nq, Nk] in float32 or better; -inf where the mask removes a key."""
    scores = torch.einsum("bihd,bjhd->bhij", q if u is None else q + u, k)
    if tau is not None:
        scores = scores + torch.einsum("bihd,bjhd->bhij", q if w is None else q + w, tau)
    scores = scores * scale
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)


def _at_least_float(*tensors: Tensor | None) -> list:
    return [t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def timestep_attention(q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None, u: Tensor | None, w: Tensor | None,
                       timesteps: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, dropout_p: float,
                       scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Nq, H, D] and log-sum-exp of the scores [B, H, Nq]; see :func:`pydiffseq.ops.timestep_attention`."""
    dtype = q.dtype
    q, k, v, tau, u, w = _at_least_float(q, k, v, tau, u, w)
    scores = _attention_scores(q, k, _tau_by_token(tau, timesteps), u, w, key_mask, scale)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])  # a row without keys is 0, not NaN
    out = torch.einsum("bhij,bjhd->bihd", p * _dropout_factors(p, seed, dropout_p), v)
    return out.to(dtype).contiguous(), lse


def timestep_attention_backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None, u: Tensor | None, w: Tensor | None,
        timesteps: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, lse: Tensor, dropout_p: float,
        scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, tau, u and w. With dS that of the unscaled scores and c_j = sum_i dS_ij:
    dk_j = (dS^T q)_j + c_j u, dtau_j = (dS^T q)_j + c_j w, du = sum_j c_j k_j, dw = sum_j c_j tau_j."""
    dtype = q.dtype
    grad_out, q, k, v, tau, u, w = _at_least_float(grad_out, q, k, v, tau, u, w)
    tau_j = _tau_by_token(tau, timesteps)
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
    if tau is not None:
        grad_tau = grad_key if w is None else grad_key + sums * w
        if timesteps is not None:
            grad_tau = torch.zeros_like(tau).index_put_((timesteps,), grad_tau, accumulate=True)
    grad_u = None if u is None else (sums * k).sum((0, 1))
    grad_w = None if w is None or tau_j is None else (sums * tau_j).sum((0, 1))
    grads = (grad_q, grad_k, grad_v, grad_tau, grad_u, grad_w)
    return tuple(None if g is None else g.to(dtype, memory_format=torch.contiguous_format, copy=True) for g in grads)


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """(x1 c - x2 s, x2 c + x1 s) for each interleaved pair of the last dimension; c, s = the halves of ``rotation``."""
    cos, sin = rotation.chunk(2, -1)
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)
