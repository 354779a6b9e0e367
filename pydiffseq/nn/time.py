"""Time features of the diffusion step and the networks that embed them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiffseq import ops


def sinusoids(numbers: Tensor, dim: int) -> Tensor:
    """``[cos, sin]`` of float64 ``[n]`` times falling frequencies, float32 ``[n, dim]``.

    Frequencies are ``exp(-ln(10000) i / (dim/2))`` (DiffuSeq and AR-Diffusion put the cosines first).
    """
    half = dim // 2
    angle = numbers[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2)).float()


def sinusoid_table(steps: int, dim: int) -> Tensor:
    """Features of every timestep, float32 ``[steps, dim]``: sinusoids of the rescaled time ``t * 1000 / steps``."""
    return sinusoids(torch.arange(steps, dtype=torch.float64) * (1000.0 / steps), dim)


class TimeFeatures(nn.Module):
    """Looks up sinusoidal features by timestep: int64 ``[...]`` in ``0..steps-1`` -> ``[..., dim]``."""

    table: Tensor

    def __init__(self, steps: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoid_table(steps, dim), persistent=False)

    def forward(self, timesteps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``[...] -> [..., dim]``, in ``dtype`` or the one that the module was cast to."""
        features = F.embedding(timesteps, self.table)
        return features if dtype is None else features.to(dtype)


class TimeMLP(nn.Module):
    """``Linear -> SiLU -> Linear``: time features ``[..., time_dim]`` -> ``[..., hidden_dim]`` (width 4 x inside)."""

    def __init__(self, time_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(time_dim, 4 * time_dim)
        self.down = nn.Linear(4 * time_dim, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., time_dim] -> [..., hidden_dim]``; dropout, if any, is on the features."""
        features = ops.dropout(features, self.dropout, training=self.training)
        return self.down(F.silu(self.up(features)))


class TimeTable(nn.Module):
    """What a :class:`TimeMLP` says of every timestep, computed once: ``table`` is ``[steps, hidden_dim]``."""

    table: Tensor

    def __init__(self, mlp: TimeMLP, features: TimeFeatures) -> None:
        super().__init__()
        self.register_buffer("table", mlp(features.table), persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """int64 ``[...] -> [..., hidden_dim]``."""
        return F.embedding(timesteps, self.table)


class Timesteps(nn.Module):
    """Stands for :class:`TimeFeatures` before a :class:`TimeTable`: hands the timesteps on."""

    def forward(self, timesteps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return timesteps
