"""Transformer layers: BERT-style (or pre-LN) encoder layers, and AR-Diffusion's pre-LN decoder blocks with GEGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.nn.attention import CrossAttention, KeyValue, ResidualLinear, SelfAttention
from pydiffseq.nn.packing import Packing
from pydiffseq.nn.time import TimeMLP, TimeTable

LN_EPS = 1e-12   # both published code bases use BERT's value


class GEGLU(nn.Module):
    """``residual +`` (``Linear H -> 2F``, split in (a, g); ``a * GELU(g)``, exact; dropout; ``Linear F -> H``)."""

    def __init__(self, hidden_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(hidden_dim, 2 * ffn_dim)
        self.down = ResidualLinear(ffn_dim, hidden_dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(ops.dropout(ops.geglu(self.up(x)), self.dropout, training=self.training), residual)


class EncoderLayer(nn.Module):
    """One encoder layer, ``[B, S, H] -> [B, S, H]``: BERT's post-LN order, or pre-LN with ``pre_norm``."""

    def __init__(self, hidden_dim: int, heads: int, ffn_dim: int, dropout: float, attention_dropout: float, *,
                 pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm, self.dropout = pre_norm, dropout
        self.attention = SelfAttention(hidden_dim, heads, dropout, attention_dropout, bias=True)
        self.attention_norm = nn.LayerNorm(hidden_dim, LN_EPS)
        self.up = nn.Linear(hidden_dim, ffn_dim)
        self.down = ResidualLinear(ffn_dim, hidden_dim)
        self.ffn_norm = nn.LayerNorm(hidden_dim, LN_EPS)

    def feed_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)), residual, self.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask``: bool ``[B, S]``, True = real position; ``None`` attends to all."""
        if self.pre_norm:
            x = self.attention(self.attention_norm(x), mask, residual=x)
            return self.feed_forward(self.ffn_norm(x), residual=x)
        x = self.attention_norm(self.attention(x, mask, residual=x))
        return self.ffn_norm(self.feed_forward(x, residual=x))


class DecoderBlock(nn.Module):
    """Pre-LN block: self-attention (with the time injection), cross-attention, GEGLU; ``[B, N, H] -> [B, N, H]``."""

    def __init__(self, hidden_dim: int, heads: int, ffn_dim: int, dropout: float, attention_dropout: float, *,
                 time_dim: int, injection: str) -> None:
        super().__init__()
        inside = injection if injection in ("txl", "rotary") else None
        self.dropout = dropout
        self.time_mlp: TimeMLP | TimeTable | None = TimeMLP(time_dim, hidden_dim, dropout) if inside else None
        self.self_norm = nn.LayerNorm(hidden_dim, LN_EPS)
        self.self_attention = SelfAttention(
            hidden_dim, heads, dropout, attention_dropout, bias=False, injection=inside)
        self.cross_norm = nn.LayerNorm(hidden_dim, LN_EPS)
        self.cross_attention = CrossAttention(hidden_dim, heads, dropout, attention_dropout)
        self.ffn_norm = nn.LayerNorm(hidden_dim, LN_EPS)
        self.ffn = GEGLU(hidden_dim, ffn_dim, dropout)

    def forward(self, x: Tensor, mask: Tensor | None, source: KeyValue, source_mask: Tensor, time: Tensor,
                packing: Packing | None = None) -> Tensor:
        """``x``: ``[B, N, H]``, or ``[T, H]`` with a ``packing``.

        ``time``: features of the tokens' timesteps, ``[B, N, time_dim]``, unused by the ``add`` injection; the timesteps
        themselves, int64 ``[B, N]``, where a table has replaced the time MLP (see :mod:`pydiffseq.nn.freeze`).
        """
        if isinstance(self.time_mlp, TimeTable):
            x = self.self_attention(self.self_norm(x), mask, residual=x, time=self.time_mlp.table, timesteps=time,
                                    packing=packing)
        else:
            tau = self.time_mlp(time) if self.time_mlp is not None else None
            x = self.self_attention(self.self_norm(x), mask, residual=x, time=tau, packing=packing)
        x = self.cross_attention(self.cross_norm(x), source, source_mask, residual=x, packing=packing)
        return self.ffn(self.ffn_norm(x), residual=x)
