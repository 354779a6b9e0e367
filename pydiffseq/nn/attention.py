"""Attention layers on the fused per-token-timestep attention op. Layout ``[B, N, heads, head_dim]`` throughout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.nn.packing import Packing, packed, padded


class KeyValue(NamedTuple):
    """Keys and values of one cross-attention layer: constant while decoding.

    Each is ``[B, S, heads, head_dim]``, or without padding ``[tokens, heads, head_dim]``, and then ``offsets``, int64
    ``[B + 1]``, says where a sentence begins.
    """

    key: Tensor
    value: Tensor
    offsets: Tensor | None = None

    def pack(self, packing: Packing) -> KeyValue:
        """Of the real tokens alone: ``[B, S, ...] -> [tokens, ...]``; ``packing`` is that of the source mask ``[B, S]``."""
        return KeyValue(packing.pack(self.key), packing.pack(self.value), packing.offsets)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``[B, N, parts * H]`` -> ``parts`` views ``[B, N, heads, H / heads]``; no copy."""
    batch, length, width = x.shape
    return x.view(batch, length, parts, heads, width // (parts * heads)).unbind(2)


class ResidualLinear(nn.Linear):
    """The last layer of a branch."""

    def forward(self, x: Tensor, residual: Tensor, dropout: float = 0.0) -> Tensor:  # type: ignore[override]
        """``residual + dropout(linear(x))``."""
        return ops.dropout_add(super().forward(x), residual, dropout, training=self.training)


class SelfAttention(nn.Module):
    """Self-attention whose keys may carry a time term (AR-Diffusion's ``txl`` and ``rotary`` injections).

    ``injection`` is ``None`` (plain), ``"txl"`` (score ``(q+u).k + (q+w).tau``, ``tau`` by key position) or
    ``"rotary"`` (learned rotation of q, k and v). ``u`` and ``w`` start uniform in [0, 1), as published.
    """

    def __init__(self, hidden_dim: int, heads: int, dropout: float, attention_dropout: float, *, bias: bool,
                 injection: str | None = None) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention_dropout, self.injection = heads, dropout, attention_dropout, injection
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim, bias=bias)
        self.out = ResidualLinear(hidden_dim, hidden_dim)
        if injection == "txl":
            self.content_bias = nn.Parameter(torch.rand(heads, hidden_dim // heads))
            self.time_bias = nn.Parameter(torch.rand(heads, hidden_dim // heads))

    def forward(self, x: Tensor, mask: Tensor | None, residual: Tensor, time: Tensor | None = None,
                timesteps: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """``residual + dropout(attention(x))``, ``[B, N, H]``; with a ``packing`` x, residual and result are ``[T, H]``.

        ``mask``: bool ``[B, N]``, True = real position. ``time``: the block's time projection, which both injections
        need: ``[B, N, H]``, or a table ``[T, H]`` that int64 ``timesteps`` ``[B, N]`` index.
        """
        tau = None if time is None else time.view(*time.shape[:-1], self.heads, -1)
        if self.injection is not None and tau is None:
            raise ValueError(f"self-attention with the {self.injection} injection needs the time projection, got None")
        if packing is not None and self.injection != "rotary":
            attended = self._attend_packed(self.qkv(x), tau, timesteps, packing).flatten(1)
        else:
            attended = packed(self._attend(padded(self.qkv(x), packing), mask, tau, timesteps).flatten(2), packing)
        return self.out(attended, residual, self.dropout)

    def _attend(self, qkv: Tensor, mask: Tensor | None, tau: Tensor | None, timesteps: Tensor | None) -> Tensor:
        qkv, dropout_p = qkv.view(*qkv.shape[:2], 3, self.heads, -1), self.attention_dropout if self.training else 0.0
        if self.injection is None:
            return ops.timestep_self_attention(qkv, key_mask=mask, dropout_p=dropout_p)
        assert tau is not None
        if self.injection == "rotary":
            return ops.rotary_timestep_self_attention(qkv, tau, timesteps=timesteps, key_mask=mask, dropout_p=dropout_p)
        return ops.timestep_self_attention(
            qkv, tau, self.content_bias, self.time_bias, timesteps=timesteps, key_mask=mask, dropout_p=dropout_p)

    def _attend_packed(self, qkv: Tensor, tau: Tensor | None, timesteps: Tensor | None, packing: Packing) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, self.heads, -1).unbind(1)
        if self.injection is None:
            return ops.packed_timestep_attention(q, k, v, offsets=packing.offsets)
        assert tau is not None
        return ops.packed_timestep_attention(
            q, k, v, packing.pack(tau) if timesteps is None else tau, self.content_bias, self.time_bias,
            offsets=packing.offsets, timesteps=None if timesteps is None else packing.pack(timesteps))


class CrossAttention(nn.Module):
    """Attention from target positions to encoder states."""

    def __init__(self, hidden_dim: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.query = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.key_value = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)
        self.out = ResidualLinear(hidden_dim, hidden_dim)

    def project(self, states: Tensor) -> KeyValue:
        """Keys and values of encoder states ``[B, S, H]``; they do not change during denoising."""
        return KeyValue(*split_heads(self.key_value(states), 2, self.heads))

    def forward(self, x: Tensor, source: KeyValue, mask: Tensor | None, residual: Tensor,
                packing: Packing | None = None) -> Tensor:
        """``residual + dropout(attention(x -> source))``, ``[M, N, H]`` (packed: ``[T, H]``); ``mask``: bool ``[B, S]``.

        M is a multiple of B: consecutive rows of ``x`` share a source, as more queries for its keys.
        """
        query = self.query(x)
        if packing is not None and source.offsets is not None:
            candidates = packing.shape[0] // (len(source.offsets) - 1)
            attended = ops.packed_timestep_attention(
                query.view(len(query), self.heads, -1), source.key, source.value,
                offsets=packing.offsets[::candidates], key_offsets=source.offsets)
            return self.out(attended.flatten(1), residual, self.dropout)
        query = padded(query, packing)
        shape, query = query.shape, query.view(len(source.key), -1, *source.key.shape[2:])
        attended = ops.timestep_attention(query, source.key, source.value, key_mask=mask,
                                          dropout_p=self.attention_dropout if self.training else 0.0)
        return self.out(packed(attended.view(shape), packing), residual, self.dropout)
