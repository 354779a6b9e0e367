"""Solvers: pure functions that walk down a step list with a denoiser.

Every solver here is linear in the state: ``x_u = a x_t + b x0_hat + c eps``, with coefficients per token that follow
from ``abar_t`` and ``abar_u`` alone, ``u`` being the *next visited* timestep. They differ in (a, b, c), in the time that
the network is told (CeDi), and in what stands for x0_hat and x_t (DPM-Solver++: an extrapolation of the last two). All
use ``x0_hat`` directly: at t = T-1 a detour through the noise estimate would magnify rounding errors 2000 times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pydiffseq.diffusion.plan import Callback, Coefficients, Denoise, Recipe, Solver, Update, follow, tabulate
from pydiffseq.diffusion.schedules import NoiseSchedule
from pydiffseq.diffusion.steps import Time

VARIANCES = ("large", "small")
CEDI_SIGMA = 0.99   # the least noise that CeDi tells the network (DINOISER's code)


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


def ancestral_recipe(variance: str) -> Recipe:
    """See :func:`ancestral`."""
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")

    def rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
        a, b, posterior = skip_coefficients(abar_t, abar_u)
        chosen = torch.where(u < 0, 0.0, 1 - abar_t / abar_u) if variance == "large" else posterior
        return a, b, chosen.sqrt()

    return Recipe(rule)


def _skip_rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
    a, b, variance = skip_coefficients(abar_t, abar_u)
    return a, b, torch.where(u > 0, variance, 0.0).sqrt()


def _ddim_rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
    a, b = ddim_coefficients(abar_t, abar_u)
    return a, b, torch.zeros_like(a)


def cedi_timesteps(t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The timesteps that CeDi tells: 0..T-1 mapped evenly to the end of the schedule where sigma is at least 0.99."""
    floor = int((schedule.sigma < CEDI_SIGMA).sum().clamp_max(schedule.T - 1))
    return floor + (t.clamp_min(0) * (schedule.T - 1 - floor) + (schedule.T - 1) // 2) // max(1, schedule.T - 1)


RECIPES: dict[str, Recipe] = {
    "ancestral": ancestral_recipe("large"),
    "ddim": Recipe(_ddim_rule),
    "skip": Recipe(_skip_rule),
    "ddim_xy": Recipe(_ddim_rule),
    "cedi": Recipe(_ddim_rule, told=cedi_timesteps),
    "dpmpp2m": Recipe(_ddim_rule, second_order=True),
    "dpmpp2m_refeed": Recipe(_ddim_rule, second_order=True, refeed=True),
}


def _solve(recipe: Recipe, denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule,
           seed: int | Tensor | None, rows: Tensor | None, update: Update | None,
           callback: Callback | None) -> tuple[Tensor, Tensor]:
    steps = list(steps)
    plan = tabulate(recipe, steps, schedule, x.size(0), x.size(1), x.device)

    def with_times(step: dict[str, Any]) -> Tensor | None:
        t, t_next = steps[step["i"]]
        return None if callback is None else callback({**step, "t": t, "t_next": t_next})

    return follow(plan, denoise, x, seed=seed, rows=rows, update=update, callback=None if callback is None else with_times)


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
        callback: called after each transition with ``{"i", "t", "t_next", "x", "x0_hat"}``; ``x`` is at ``t_next``. It
            may return the rows to go on with, int64 ``[b]``; none of them ends the run.

    Returns:
        ``(x, x0_hat)``: the state at the last timestep and the last prediction.

    Raises:
        ValueError: an empty step list, one that goes up, or a timestep out of range or of the wrong shape.
    """
    return _solve(ancestral_recipe(variance), denoise, x, steps, schedule, seed, rows, update, callback)


def skip(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """AR-Diffusion's skip sampling (Wu et al. 2023, algorithm 2): posterior of the jump, no noise into timestep 0.

    Arguments, results and errors as for :func:`ancestral`.
    """

    return _solve(RECIPES["skip"], denoise, x, steps, schedule, seed, rows, update, callback)


def ddim(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12); over a token-level step list it is AR-Diffusion's ``ddim_xy``.

    The target level is that of the next *visited* timestep (DiffuSeq's code takes t - 1 and so hardly moves when it
    skips). Arguments, results and errors as for :func:`ancestral`; no noise is drawn.
    """
    return _solve(RECIPES["ddim"], denoise, x, steps, schedule, seed, rows, update, callback)


def cedi(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DINOISER's CeDi (Ye et al. 2023): DDIM whose network is told more noise than there is, so that it reads the source.

    The state follows the step list; network and noise estimate use :func:`cedi_timesteps`. Read the tokens off the last
    x0_hat. Arguments, results and errors as for :func:`ancestral`; no noise is drawn.
    """
    return _solve(RECIPES["cedi"], denoise, x, steps, schedule, seed, rows, update, callback)


def dpmpp2m(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
            seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
            callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) with data prediction (Lu et al. 2022, algorithm 2), per sentence or per token.

    First order it is DDIM; then x0_hat is extrapolated from the last two predictions (:func:`extrapolation`). The first
    transition, the last of a list of fewer than ten, and those into the clean end are first order. Arguments, results
    and errors as for :func:`ancestral`; no noise is drawn.
    """
    return _solve(RECIPES["dpmpp2m"], denoise, x, steps, schedule, seed, rows, update, callback)


def dpmpp2m_refeed(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
                   seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
                   callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """:func:`dpmpp2m` as DiffuSeq-v2's code runs it: each update starts from x0_hat in place of the state.

    So the state's noise is thrown away, and chance enters through the first prediction alone. Published few-step numbers
    of DiffuSeq-v2 come from this. Not taken over: its visited times lie between the timesteps of training, and it tells
    the network one timestep more than the state's.
    """
    return _solve(RECIPES["dpmpp2m_refeed"], denoise, x, steps, schedule, seed, rows, update, callback)


SOLVERS: dict[str, Solver] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "skip": skip,
    "ddim_xy": ddim,
    "cedi": cedi,
    "dpmpp2m": dpmpp2m,
    "dpmpp2m_refeed": dpmpp2m_refeed,
}


def get_solver(name: str) -> Solver:
    """The solver ``name``, a key of :data:`SOLVERS`.

    Raises:
        ValueError: unknown name.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
