"""What a model's training forward returns: named losses, before weighting."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Losses:
    """Named, unweighted losses of a batch, float32.

    Attributes:
        per_token: name -> ``[B, N]``, zero where ``mask`` is False.
        per_sentence: name -> ``[B]``.
        mask: bool ``[B, N]``, the positions that count.
        timesteps: int64 ``[B, N]``, for the losses by timestep bucket.
        steps: number of diffusion steps T.
    """

    per_token: dict[str, Tensor]
    mask: Tensor
    timesteps: Tensor
    steps: int
    per_sentence: dict[str, Tensor] = field(default_factory=dict)
