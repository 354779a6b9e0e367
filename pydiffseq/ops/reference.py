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
