"""Solvers: pure functions that walk down a step list with a denoiser.

Every solver here is linear in the state: ``x_u = a x_t + b x0_hat + c eps``, with coefficients per token that follow
from ``abar_t`` and ``abar_u`` alone, ``u`` being the *next visited* timestep. They differ in nothing but (a, b, c). All
use ``x0_hat`` directly: at t = T-1 a detour through the noise estimate would magnify rounding errors 2000 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from pydiffseq.diffusion.schedules import NoiseSchedule
from pydiffseq.diffusion.steps import Time

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], None]
Coefficients = tuple[Tensor, Tensor, Tensor]
Rule = Callable[[Tensor, Tensor, Tensor], Coefficients]  # (abar_t, abar_u, u) -> (a, b, c)

VARIANCES = ("large", "small")


class Update(Protocol):
    """``a x + b x0_hat + c eps``; :func:`pydiffseq.ops.sampler_step`, or a stand-in."""

    def __call__(self, x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, *,
                 seed: int | Tensor | None, step: int, rows: Tensor | None) -> Tensor: ...


class Solver(Protocol):
    """What :data:`SOLVERS` holds; see :func:`ancestral` for the arguments."""

    def __call__(self, denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
                 seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
                 callback: Callback | None = None) -> tuple[Tensor, Tensor]: ...


def skip_coefficients(abar_t: Tensor, abar_u: Tensor) -> Coefficients:
    """Posterior q(x_u | x_t, x_0) of a jump from t to any u <= t; Ho et al. 2020, eq. 7, where u = t - 1.

    Args:
        abar_t, abar_u: float64, broadcastable, ``abar_t <= abar_u <= 1``.

    Returns:
        ``(a, b, variance)``, the factors of x_t and of x_0 in the mean, and the variance. ``a sqrt(abar_t) + b =
        sqrt(abar_u)`` and ``a^2 (1 - abar_t) + variance = 1 - abar_u``. Where both levels are equal: (1, 0, 0).
    """
    ratio = abar_t / abar_u
    noise_t, noise_u = 1 - abar_t, 1 - abar_u
    stay = abar_t == abar_u  # also guards 0 / 0 of a token that is already clean
    a = torch.where(stay, 1.0, ratio.sqrt() * noise_u / noise_t)
    b = torch.where(stay, 0.0, abar_u.sqrt() * (1 - ratio) / noise_t)
    return a, b, torch.where(stay, 0.0, (1 - ratio) * noise_u / noise_t)


def ddim_coefficients(abar_t: Tensor, abar_u: Tensor) -> tuple[Tensor, Tensor]:
    """Deterministic jump from t to u: keep the implied noise (Song et al. 2021, eq. 12 with sigma = 0).

    Args:
        abar_t, abar_u: float64, broadcastable, ``abar_t <= abar_u <= 1``.

    Returns:
        ``(a, b)`` with ``a = sqrt((1 - abar_u) / (1 - abar_t))`` and ``b = sqrt(abar_u) - a sqrt(abar_t)``; (1, 0)
        where both levels are equal.
    """
    stay = abar_t == abar_u
    a = torch.where(stay, 1.0, ((1 - abar_u) / (1 - abar_t)).sqrt())
    return a, torch.where(stay, 0.0, abar_u.sqrt() - a * abar_t.sqrt())


def _sampler_step(*args: Any, **kwargs: Any) -> Tensor:
    from pydiffseq.ops import sampler_step  # here, so that schedules and step lists are usable without the ops

    return sampler_step(*args, **kwargs)


def _as_times(name: str, t: Time, x: Tensor) -> Tensor:
    """``t`` as int64 ``[1]``, ``[B]``, ``[1, N]`` or ``[B, N]`` on the device of ``x`` ``[B, N, d]``."""
    if not isinstance(t, Tensor):
        return torch.tensor([t], device=x.device)
    batch, length = x.shape[:2]
    if tuple(t.shape) not in {(1,), (batch,), (1, length), (batch, length)}:
        raise ValueError(f"{name} must be an int or have shape [{batch}], [1, {length}] or [{batch}, {length}], "
                         f"got {list(t.shape)}")
    return t.to(x.device)


def _per_token(t: Tensor) -> Tensor:
    return t[:, None] if t.dim() == 1 else t


def _check_falls(t: Tensor, u: Tensor, i: int) -> None:
    if t.device.type == "cpu" and bool((u > t).any()):
        raise ValueError(f"t_next must be at most t in every transition of a step list, but transition {i} rises")


def _solve(rule: Rule, denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule,
           seed: int | Tensor | None, rows: Tensor | None, update: Update | None,
           callback: Callback | None) -> tuple[Tensor, Tensor]:
    update = update or _sampler_step
    schedule = schedule.to(x.device)
    x0_hat = None
    for i, (t, t_next) in enumerate(steps):
        now, after = _as_times("t", t, x), _as_times("t_next", t_next, x)
        told = now.clamp_min(0)  # a token that is clean already counts as least noisy
        x0_hat = denoise(x, told.expand(x.shape[: now.dim()])).to(x.dtype)
        now, after = _per_token(now), _per_token(after)
        _check_falls(now, after, i)
        coefficients = rule(schedule.abar_at(now), schedule.abar_at(after), after)
        a, b, c = (value.float().expand(x.shape[:2]) for value in coefficients)
        x = update(x, x0_hat, a, b, c, seed=seed, step=i, rows=rows)
        if callback is not None:
            callback({"i": i, "t": t, "t_next": t_next, "x": x, "x0_hat": x0_hat})
    if x0_hat is None:
        raise ValueError("the step list must have at least one transition, got none")
    return x, x0_hat


def ancestral(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
              variance: str = "large", seed: int | Tensor | None = None, rows: Tensor | None = None,
              update: Update | None = None, callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): posterior mean, then noise everywhere but into the clean end.

    ``variance="large"`` is ``1 - abar_t / abar_u``, which is ``beta_t`` on the full list: the choice of DiffuSeq and
    AR-Diffusion. On a list that skips it is too much noise; ``"small"``, the variance of the posterior, fits any list.

    Args:
        denoise: ``(x [B, N, d], t) -> x0_hat [B, N, d]``, ``t`` int64 ``[B]`` or ``[B, N]`` as the step list has it
            (possibly an expanded view). Rounding to the nearest embedding, if wanted, happens inside.
        x: ``[B, N, d]``, the state at the first timestep of ``steps``; standard normal noise as a rule.
        steps: transitions ``(t, t_next)``, see :mod:`pydiffseq.diffusion.steps`.
        schedule: noise schedule.
        variance: ``"large"`` or ``"small"``.
        seed: key of the noise; drawn when ``None``.
        rows: int64 ``[B]`` noise coordinates of the sentences, see :func:`pydiffseq.ops.sampler_step`.
        update: stand-in for :func:`pydiffseq.ops.sampler_step`.
        callback: called after each transition with ``{"i", "t", "t_next", "x", "x0_hat"}``; ``x`` is at ``t_next``.

    Returns:
        ``(x, x0_hat)``: the state at the last timestep and the last prediction.

    Raises:
        ValueError: an empty step list, one that goes up, or a timestep out of range or of the wrong shape.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")

    def rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
        a, b, posterior = skip_coefficients(abar_t, abar_u)
        chosen = torch.where(u < 0, 0.0, 1 - abar_t / abar_u) if variance == "large" else posterior
        return a, b, chosen.sqrt()

    return _solve(rule, denoise, x, steps, schedule, seed, rows, update, callback)


def skip(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """AR-Diffusion's skip sampling (Wu et al. 2023, algorithm 2): posterior of the jump, no noise into timestep 0.

    Arguments, results and errors as for :func:`ancestral`.
    """

    def rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
        a, b, variance = skip_coefficients(abar_t, abar_u)
        return a, b, torch.where(u > 0, variance, 0.0).sqrt()

    return _solve(rule, denoise, x, steps, schedule, seed, rows, update, callback)


def ddim(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12); over a token-level step list it is AR-Diffusion's ``ddim_xy``.

    The target level is that of the next *visited* timestep (DiffuSeq's code takes t - 1 and so hardly moves when it
    skips). Arguments, results and errors as for :func:`ancestral`; no noise is drawn.
    """

    def rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
        a, b = ddim_coefficients(abar_t, abar_u)
        return a, b, torch.zeros_like(a)

    return _solve(rule, denoise, x, steps, schedule, seed, rows, update, callback)


SOLVERS: dict[str, Solver] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "skip": skip,
    "ddim_xy": ddim,
}


def get_solver(name: str) -> Solver:
    """The solver ``name``, a key of :data:`SOLVERS`.

    Raises:
        ValueError: unknown name.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
