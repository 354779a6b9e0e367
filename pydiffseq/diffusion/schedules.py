"""Noise schedules: how much signal is left at each timestep.

A schedule is a table of ``beta_t``, ``t = 0..T-1``, and ``abar_t = prod_{i <= t} (1 - beta_i)``, so that
``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` (Ho et al. 2020, eq. 4). Index 0 is the least noisy step; index -1 is
the clean end, ``abar = 1``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BETA = 0.999  # keeps abar above zero where a curve reaches it (Nichol and Dhariwal 2021, section 3.2)


def check_timesteps(name: str, t: Tensor, lowest: int, highest: int) -> None:
    """Raise ``ValueError`` unless every entry of ``t`` is in ``lowest..highest``.

    Only tensors on the CPU are checked: reading a value on another device would wait for it.
    """
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {t.dtype}")
    if t.device.type == "cpu" and t.numel():
        smallest, largest = (int(v) for v in torch.aminmax(t))
        if smallest < lowest or largest > highest:
            wrong = smallest if smallest < lowest else largest
            raise ValueError(f"{name} must be in {lowest}..{highest}, got {wrong}")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A noise schedule and the tables derived from it.

    Args:
        name: key in :data:`SCHEDULES`, or a name of your own.
        betas: float64 ``[T]``, each in (0, 1).

    Raises:
        ValueError: ``betas`` is not a float64 vector with entries in (0, 1).
    """

    name: str
    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.dtype != torch.float64 or self.betas.dim() != 1 or not len(self.betas):
            raise ValueError(f"betas must be a float64 tensor [T], got {self.betas.dtype} {list(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError(f"betas must lie in (0, 1), got {self.betas.min():g}..{self.betas.max():g}")

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.betas)

    @functools.cached_property
    def abar(self) -> Tensor:
        """float64 ``[T]``: the cumulative product of ``1 - beta``."""
        return torch.cumprod(1 - self.betas, 0)

    @functools.cached_property
    def signal(self) -> Tensor:
        """float32 ``[T]``: ``sqrt(abar_t)``, the factor of x_0 in x_t."""
        return self.abar.sqrt().float()

    @functools.cached_property
    def sigma(self) -> Tensor:
        """float32 ``[T]``: ``sqrt(1 - abar_t)``, the factor of the noise in x_t."""
        return (1 - self.abar).sqrt().float()

    @functools.cached_property
    def posterior_variance(self) -> Tensor:
        """float64 ``[T]``: variance of q(x_{t-1} | x_t, x_0); 0 at t = 0 (Ho et al. 2020, eq. 7)."""
        before = self._abar_from_clean[:-1]
        return self.betas * (1 - before) / (1 - self.abar)

    @functools.cached_property
    def _abar_from_clean(self) -> Tensor:
        return torch.cat([self.abar.new_ones(1), self.abar])  # [T + 1], entry t + 1 holds abar_t

    def abar_at(self, t: Tensor) -> Tensor:
        """``abar_t`` as float64, in the shape and on the device of the int64 tensor ``t``; 1 where ``t`` is -1.

        Raises:
            ValueError: an entry of ``t`` (on the CPU) is outside -1..T-1.
        """
        check_timesteps("t", t, -1, self.T - 1)
        return self._abar_from_clean.to(t.device)[t + 1]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on ``device``."""
        return self if self.betas.device == torch.device(device) else NoiseSchedule(self.name, self.betas.to(device))


def _betas_of_curve(curve: Callable[[float], float], T: int) -> Tensor:
    """Betas whose ``abar`` follows ``curve(u) / curve(0)``, u in [0, 1] (Nichol and Dhariwal 2021, eq. 17)."""
    values = [curve(i / T) for i in range(T + 1)]
    betas = [min(1 - after / before, MAX_BETA) for before, after in zip(values[:-1], values[1:], strict=True)]
    return torch.tensor(betas, dtype=torch.float64)


def sqrt_betas(T: int) -> Tensor:
    """``abar(u) = 1 - sqrt(u + 1e-4)`` (Li et al. 2022, Diffusion-LM, appendix A): quickly noisy, then slow."""
    return _betas_of_curve(lambda u: 1 - math.sqrt(u + 1e-4), T)


def cosine_betas(T: int) -> Tensor:
    """``abar(u) = cos(pi/2 (u + 0.008) / 1.008)^2`` (Nichol and Dhariwal 2021, eq. 17)."""
    return _betas_of_curve(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T)


def truncated_cosine_betas(T: int) -> Tensor:
    """``abar(u) = cos(pi/2 (u + 0.1) / 1.1)^2``, the noise at u = 0 in the first step (``trunc_cos`` of Diffusion-LM).

    Unlike :func:`cosine_betas` the curve is not divided by its value at 0: ``abar_i = abar(i / T)``.
    """

    def curve(u: float) -> float:
        return math.cos((u + 0.1) / 1.1 * math.pi / 2) ** 2

    first = torch.tensor([1 - curve(0.0)], dtype=torch.float64)
    return torch.cat([first, _betas_of_curve(curve, T)[:-1]])


def linear_betas(T: int) -> Tensor:
    """``beta`` from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T (Ho et al. 2020, section 4)."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)


def truncated_linear_betas(T: int) -> Tensor:
    """:func:`linear_betas` plus 0.01 at every step (``trunc_lin`` of Diffusion-LM)."""
    return linear_betas(T) + 0.01


def piecewise_linear_betas(T: int) -> Tensor:
    """Ten steps from ``0.1 / T + 0.01`` down to ``0.1 / T``, then up to ``20 / T`` (``pw_lin`` of Diffusion-LM).

    Raises:
        ValueError: ``T <= 10``.
    """
    if T <= 10:
        raise ValueError(f"the pw_lin schedule must have more than 10 timesteps, got T = {T}")
    return torch.cat([torch.linspace(0.1 / T + 0.01, 0.1 / T, 10, dtype=torch.float64),
                      torch.linspace(0.1 / T, 20 / T, T - 10, dtype=torch.float64)])


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "sqrt": sqrt_betas,
    "linear": linear_betas,
    "cosine": cosine_betas,
    "trunc_cos": truncated_cosine_betas,
    "trunc_lin": truncated_linear_betas,
    "pw_lin": piecewise_linear_betas,
}


def make_schedule(name: str, T: int = 2000) -> NoiseSchedule:
    """The noise schedule ``name`` (a key of :data:`SCHEDULES`) with ``T`` timesteps.

    Raises:
        ValueError: unknown name, ``T < 1``, or a ``T`` so small that a beta leaves (0, 1).
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if T < 1:
        raise ValueError(f"the number of timesteps T must be at least 1, got {T}")
    return NoiseSchedule(name, SCHEDULES[name](T))


def model_time(t: Tensor, T: int) -> Tensor:
    """The time that the network sees, float32 in [0, 1000): ``1000 t / T``, whatever T is.

    Args:
        t: int64 timesteps of any shape.
        T: number of timesteps of the schedule.
    """
    return t.float() * (1000 / T)
