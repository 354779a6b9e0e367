"""Solvers: pure functions that walk down a step list with a denoiser.

Every solver here is linear in the state: ``x_u = a x_t + b x0_hat + c eps``, with coefficients per token that follow
from ``abar_t`` and ``abar_u`` alone, ``u`` being the *next visited* timestep. They differ in (a, b, c), in the time that
the network is told (CeDi), and in what stands for x0_hat and x_t (DPM-Solver++: an extrapolation of the last two). All
use ``x0_hat`` directly: at t = T-1 a detour through the noise estimate would magnify rounding errors 2000 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pydiffseq.diffusion.schedules import NoiseSchedule
from pydiffseq.diffusion.steps import Time

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], Tensor | None]
Coefficients = tuple[Tensor, Tensor, Tensor]
Rule = Callable[[Tensor, Tensor, Tensor], Coefficients]  # (abar_t, abar_u, u) -> (a, b, c)

VARIANCES = ("large", "small")
CEDI_SIGMA = 0.99   # the least noise that CeDi tells the network (DINOISER's code)
SHORT_LIST = 10     # DPM-Solver++ ends a shorter list with a first-order transition


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


@dataclass(frozen=True)
class _Recipe:
    """What makes a solver: its coefficients; the time it tells; how far it extrapolates x0_hat; what it calls x_t."""

    rule: Rule
    told: Callable[[Tensor, NoiseSchedule], Tensor] | None = None   # timesteps of the state -> those of the network
    second_order: bool = False
    refeed: bool = False   # the update starts from x0_hat and not from x_t


def _solve(recipe: _Recipe, denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule,
           seed: int | Tensor | None, rows: Tensor | None, update: Update | None,
           callback: Callback | None) -> tuple[Tensor, Tensor]:
    update = update or _sampler_step
    schedule = schedule.to(x.device)
    steps, kept = list(steps), None   # kept: the rows that the callback left, of those that the step list knows
    x0_hat = before = x
    for i, (t, t_next) in enumerate(steps):
        now, after = (_kept_times(name, value, x, kept) for name, value in (("t", t), ("t_next", t_next)))
        _check_falls(_per_token(now), _per_token(after), i)
        told = now if recipe.told is None else recipe.told(now, schedule)
        told = told.clamp_min(0)  # a token that is clean already counts as least noisy
        before, x0_hat = x0_hat, denoise(x, told.expand(x.shape[: now.dim()])).to(x.dtype)
        level = told if recipe.told is not None else now
        abar_t, abar_u = schedule.abar_at(_per_token(level)), schedule.abar_at(_per_token(after))
        coefficients = recipe.rule(abar_t, abar_u, _per_token(after))
        stay = _per_token(now) == _per_token(after)   # CeDi's level told is above the state's there, too
        a, b, c = (torch.where(stay, rest, value.float()).expand(x.shape[:2])
                   for value, rest in zip(coefficients, (1.0, 0.0, 0.0), strict=True))
        goal = x0_hat
        if recipe.second_order and i > 0 and not (i == len(steps) - 1 and len(steps) < SHORT_LIST):
            earlier = schedule.abar_at(_per_token(_kept_times("t", steps[i - 1][0], x, kept)))
            goal = torch.lerp(x0_hat, before, -extrapolation(earlier, abar_t, abar_u).to(x)[..., None])
        x = update(x0_hat if recipe.refeed else x, goal, a, b, c, seed=seed, step=i, rows=rows)
        keep = None if callback is None else callback({"i": i, "t": t, "t_next": t_next, "x": x, "x0_hat": x0_hat})
        if keep is not None:
            if not len(keep):
                break
            x, x0_hat = x[keep], x0_hat[keep]
            rows, kept = None if rows is None else rows[keep], keep if kept is None else kept[keep]
    if not steps:
        raise ValueError("the step list must have at least one transition, got none")
    return x, x0_hat


def _kept_times(name: str, t: Time, x: Tensor, kept: Tensor | None) -> Tensor:
    """The times of the rows that are still there; ``kept`` is ``None`` while that is all of them."""
    if kept is None or not isinstance(t, Tensor) or len(t) == 1:
        return _as_times(name, t, x)
    return t.to(x.device)[kept]


def extrapolation(abar_s: Tensor, abar_t: Tensor, abar_u: Tensor) -> Tensor:
    """``h_now / (2 h_before)`` of the last two transitions s -> t -> u, in half log-SNR (Lu et al. 2022, algorithm 2).

    The second-order solver aims at ``x0_hat + w (x0_hat - its predecessor)`` with this w. It is 0 where the log-SNR does
    not move, and into the clean end, whose log-SNR is infinite.
    """

    def half_log_snr(abar: Tensor) -> Tensor:
        return 0.5 * (abar / (1 - abar)).log()

    before, now = half_log_snr(abar_t) - half_log_snr(abar_s), half_log_snr(abar_u) - half_log_snr(abar_t)
    ratio = 0.5 * now / before
    return torch.where((before > 0) & (now > 0) & ratio.isfinite(), ratio, 0.0)


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
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")

    def rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
        a, b, posterior = skip_coefficients(abar_t, abar_u)
        chosen = torch.where(u < 0, 0.0, 1 - abar_t / abar_u) if variance == "large" else posterior
        return a, b, chosen.sqrt()

    return _solve(_Recipe(rule), denoise, x, steps, schedule, seed, rows, update, callback)


def skip(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """AR-Diffusion's skip sampling (Wu et al. 2023, algorithm 2): posterior of the jump, no noise into timestep 0.

    Arguments, results and errors as for :func:`ancestral`.
    """

    def rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
        a, b, variance = skip_coefficients(abar_t, abar_u)
        return a, b, torch.where(u > 0, variance, 0.0).sqrt()

    return _solve(_Recipe(rule), denoise, x, steps, schedule, seed, rows, update, callback)


def _ddim_rule(abar_t: Tensor, abar_u: Tensor, u: Tensor) -> Coefficients:
    a, b = ddim_coefficients(abar_t, abar_u)
    return a, b, torch.zeros_like(a)


def ddim(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12); over a token-level step list it is AR-Diffusion's ``ddim_xy``.

    The target level is that of the next *visited* timestep (DiffuSeq's code takes t - 1 and so hardly moves when it
    skips). Arguments, results and errors as for :func:`ancestral`; no noise is drawn.
    """
    return _solve(_Recipe(_ddim_rule), denoise, x, steps, schedule, seed, rows, update, callback)


def cedi_timesteps(t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The timesteps that CeDi tells: 0..T-1 mapped evenly to the end of the schedule where sigma is at least 0.99."""
    floor = int((schedule.sigma < CEDI_SIGMA).sum().clamp_max(schedule.T - 1))
    return floor + (t.clamp_min(0) * (schedule.T - 1 - floor) + (schedule.T - 1) // 2) // max(1, schedule.T - 1)


def cedi(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
         seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
         callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DINOISER's CeDi (Ye et al. 2023): DDIM whose network is told more noise than there is, so that it reads the source.

    The state follows the step list; network and noise estimate use :func:`cedi_timesteps`. Read the tokens off the last
    x0_hat. Arguments, results and errors as for :func:`ancestral`; no noise is drawn.
    """
    return _solve(_Recipe(_ddim_rule, told=cedi_timesteps), denoise, x, steps, schedule, seed, rows, update, callback)


def dpmpp2m(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
            seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
            callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) with data prediction (Lu et al. 2022, algorithm 2), per sentence or per token.

    First order it is DDIM; then x0_hat is extrapolated from the last two predictions (:func:`extrapolation`). The first
    transition, the last of a list of fewer than ten, and those into the clean end are first order. Arguments, results
    and errors as for :func:`ancestral`; no noise is drawn.
    """
    recipe = _Recipe(_ddim_rule, second_order=True)
    return _solve(recipe, denoise, x, steps, schedule, seed, rows, update, callback)


def dpmpp2m_refeed(denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
                   seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
                   callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """:func:`dpmpp2m` as DiffuSeq-v2's code runs it: each update starts from x0_hat in place of the state.

    So the state's noise is thrown away, and chance enters through the first prediction alone. Published few-step numbers
    of DiffuSeq-v2 come from this.
    """
    recipe = _Recipe(_ddim_rule, second_order=True, refeed=True)
    return _solve(recipe, denoise, x, steps, schedule, seed, rows, update, callback)


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
