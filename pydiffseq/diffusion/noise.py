"""Other distributions from standard normal noise, element by element, so that they keep its coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def to_uniform(normal: Tensor) -> Tensor:
    """Standard normals -> uniform numbers in [0, 1): the normal distribution function."""
    return (0.5 * torch.erfc(-normal / math.sqrt(2.0))).clamp(0.0, 1.0 - 2.0**-24)


def truncate_normal(normal: Tensor, limit: float) -> Tensor:
    """Standard normals -> normals truncated to ``[-limit, limit]``.

    The distribution is that of drawing again until ``|z| <= limit`` (DiffuSeq's ``top_p``), in one pass: the quantile
    of the truncated normal at the probability of the given one.
    """
    half = math.sqrt(0.5)
    return (torch.erfinv(torch.erf(normal * half) * math.erf(limit * half)) / half).clamp(-limit, limit)
