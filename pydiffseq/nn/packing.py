"""The real tokens of a padded batch side by side, so that layers that see one token at a time skip the padding."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

LEAST_PADDING = 0.15   # share of a batch below which packing costs more copies than it saves


class Packing(NamedTuple):
    """Where the T real tokens of a batch ``[M, N]`` are."""

    shape: tuple[int, int]
    places: Tensor    # int64 [T]: place of each real token in M * N
    origins: Tensor   # int64 [M * N]: the real token of each place, any one for padding
    offsets: Tensor   # int64 [M + 1]: where the tokens of each row begin

    @classmethod
    def of(cls, mask: Tensor | None) -> Packing | None:
        """For ``mask`` bool ``[M, N]``; ``None`` where it does not pay, or where counting would wait for a device."""
        if mask is None or mask.device.type != "cpu" or not mask.numel():
            return None
        packing = cls.always(mask)
        return packing if 0 < len(packing.places) <= (1 - LEAST_PADDING) * mask.numel() else None

    @classmethod
    def always(cls, mask: Tensor) -> Packing:
        """For ``mask`` bool ``[M, N]``, whether it pays or not."""
        flat = mask.flatten()
        offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls((mask.size(0), mask.size(1)), flat.nonzero().flatten(), (flat.cumsum(0) - 1).clamp_min(0), offsets)

    def pack(self, x: Tensor) -> Tensor:
        """``[M, N, ...] -> [T, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)

    def pad(self, x: Tensor) -> Tensor:
        """``[T, ...] -> [M, N, ...]``, with some real token's numbers in the padding."""
        return x.index_select(0, self.origins).view(*self.shape, *x.shape[1:])


def packed(x: Tensor, packing: Packing | None) -> Tensor:
    """``[M, N, ...] -> [T, ...]``, or ``x`` itself without a packing."""
    return x if packing is None else packing.pack(x)


def padded(x: Tensor, packing: Packing | None) -> Tensor:
    """``[T, ...] -> [M, N, ...]``, or ``x`` itself without a packing."""
    return x if packing is None else packing.pad(x)
