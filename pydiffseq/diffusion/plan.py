"""A solver along a step list as tables, made before its loop, which then only looks up, calls the network and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pydiffseq.diffusion.schedules import NoiseSchedule
from pydiffseq.diffusion.steps import Time

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], Tensor | None]
Coefficients = tuple[Tensor, Tensor, Tensor]
Rule = Callable[[Tensor, Tensor, Tensor], Coefficients]  # (abar_t, abar_u, u) -> (a, b, c)

SHORT_LIST = 10     # DPM-Solver++ ends a shorter list with a first-order transition
ENTRIES_AT_ONCE = 1 << 20   # of a table in float64, while it is made


class Update(Protocol):
    """``a x + b x0_hat + c eps``; :func:`pydiffseq.ops.sampler_step`, or a stand-in."""

    def __call__(self, x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, *,
                 seed: int | Tensor | None, step: int, rows: Tensor | None) -> Tensor: ...


class Solver(Protocol):
    """What ``SOLVERS`` holds; see :func:`pydiffseq.diffusion.ancestral` for the arguments."""

    def __call__(self, denoise: Denoise, x: Tensor, steps: Iterable[tuple[Time, Time]], schedule: NoiseSchedule, *,
                 seed: int | Tensor | None = None, rows: Tensor | None = None, update: Update | None = None,
                 callback: Callback | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Recipe:
    """What makes a solver: its coefficients; the time it tells; how far it extrapolates x0_hat; what it calls x_t."""

    rule: Rule
    told: Callable[[Tensor, NoiseSchedule], Tensor] | None = None   # timesteps of the state -> those of the network
    second_order: bool = False
    refeed: bool = False   # the update starts from x0_hat and not from x_t


class Plan(NamedTuple):
    """The tables of G transitions for R rows of N tokens; R is 1 where all rows have the same.

    Attributes:
        told: int64 ``[G, R]`` or ``[G, R, N]``: the timesteps that the network is told.
        factors: float32 ``[G, 3, R, N]``: (a, b, c) of the update.
        reach: float32 ``[G, R, N]``: how far x0_hat is extrapolated, ``None`` for a first-order solver.
        extrapolated: the transitions where it is.
        refeed: the update starts from x0_hat.
    """

    told: Tensor
    factors: Tensor
    reach: Tensor | None
    extrapolated: range
    refeed: bool

    @property
    def transitions(self) -> int:
        return len(self.told)


def tabulate(recipe: Recipe, steps: Sequence[tuple[Time, Time]], schedule: NoiseSchedule, rows: int, width: int,
             device: torch.device) -> Plan:
    """The tables of a solver for states ``[rows, width, d]`` on ``device``.

    Raises:
        ValueError: an empty step list, one that goes up, or a timestep out of range or of the wrong shape.
    """
    if not steps:
        raise ValueError("the step list must have at least one transition, got none")
    schedule = schedule.to(device)
    now = _stacked("t", [t for t, _ in steps], rows, width, device)
    after = _stacked("t_next", [t for _, t in steps], rows, width, device)
    per_token = any(isinstance(t, Tensor) and t.dim() == 2 for t, _ in steps)
    if device.type == "cpu" and bool((after > now).any()):
        rising = int((after > now).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"t_next must be at most t in every transition of a step list, but transition {rising} rises")
    told = (now if recipe.told is None else recipe.told(now, schedule)).clamp_min(0)   # clean counts as least noisy
    shape = torch.broadcast_shapes(now.shape, after.shape)
    now, after = now.expand(shape), after.expand(shape)
    together = max(1, ENTRIES_AT_ONCE // (shape[1] * shape[2]))
    parts = [slice(first, first + together) for first in range(0, len(steps), together)]
    factors = torch.cat([_factors(recipe, now[part], told.expand(shape)[part], after[part], schedule) for part in parts])
    reach = None
    if recipe.second_order:
        reach = torch.cat([_reach(now[max(0, part.start - 1):part.stop], after[part], schedule) for part in parts])
    last = len(steps) - 1 if len(steps) < SHORT_LIST else len(steps)
    return Plan(told.expand(-1, told.size(1), width) if per_token else told[..., 0],
                factors.expand(-1, -1, -1, width).contiguous(), reach, range(1, last), recipe.refeed)


def _stacked(name: str, times: Sequence[Time], rows: int, width: int, device: torch.device) -> Tensor:
    """Timesteps of every transition, int64 ``[G, 1 or rows, 1 or width]``."""
    accepted = {(1,), (rows,), (1, width), (rows, width)}
    tensors: list[Tensor] = []
    for t in times:
        if isinstance(t, Tensor) and tuple(t.shape) not in accepted:
            raise ValueError(f"{name} must be an int or have shape [{rows}], [1, {width}] or [{rows}, {width}], "
                             f"got {list(t.shape)}")
        tensors.append(t.to(device) if isinstance(t, Tensor) else torch.tensor([t], device=device))
    return torch.stack(torch.broadcast_tensors(*(t[:, None] if t.dim() == 1 else t for t in tensors)))


def _factors(recipe: Recipe, now: Tensor, told: Tensor, after: Tensor, schedule: NoiseSchedule) -> Tensor:
    """float32 ``[G, 3, R, N]``."""
    level = now if recipe.told is None else told
    coefficients = recipe.rule(schedule.abar_at(level), schedule.abar_at(after), after)
    stay = now == after   # CeDi's level told is above the state's there, too
    return torch.stack([torch.where(stay, rest, value.float())
                        for value, rest in zip(coefficients, (1.0, 0.0, 0.0), strict=True)], 1)


def _reach(now: Tensor, after: Tensor, schedule: NoiseSchedule) -> Tensor:
    """:func:`extrapolation`, float32 ``[G, R, N]``; ``now`` may begin with the transition before the first."""
    if len(now) == len(after):
        now = torch.cat([now[:1], now])
    return extrapolation(schedule.abar_at(now[:-1]), schedule.abar_at(now[1:]), schedule.abar_at(after)).float()


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


def _sampler_step(*args: Any, **kwargs: Any) -> Tensor:
    from pydiffseq.ops import sampler_step  # here, so that schedules and step lists are usable without the ops

    return sampler_step(*args, **kwargs)


def follow(plan: Plan, denoise: Denoise, x: Tensor, *, members: Tensor | None = None, seed: int | Tensor | None = None,
           rows: Tensor | None = None, update: Update | None = None,
           callback: Callback | None = None) -> tuple[Tensor, Tensor]:
    """Walk down ``plan`` from the state ``x`` ``[B, N, d]``; arguments and results as of a solver.

    ``members``: int64 ``[B]``, the row of the plan that each row of ``x`` follows; ``None``: its own, or the only one.
    The callback's dictionary has "i", "x" and "x0_hat". Nothing here waits for a device.
    """
    update = update or _sampler_step
    x0_hat = before = x
    for i in range(plan.transitions):
        told = _rows_of(plan.told[i], members, 0)
        a, b, c = _rows_of(plan.factors[i], members, 1).expand(3, *x.shape[:2]).unbind()
        before, x0_hat = x0_hat, denoise(x, told.expand(x.shape[: told.dim()])).to(x.dtype)
        goal = x0_hat
        if plan.reach is not None and i in plan.extrapolated:
            goal = torch.lerp(x0_hat, before, -_rows_of(plan.reach[i], members, 0).to(x)[..., None])
        x = update(x0_hat if plan.refeed else x, goal, a, b, c, seed=seed, step=i, rows=rows)
        keep = None if callback is None else callback({"i": i, "x": x, "x0_hat": x0_hat})
        if keep is None:
            continue
        if not len(keep):
            break
        x, x0_hat = x[keep], x0_hat[keep]
        rows = None if rows is None else rows[keep]
        if members is not None or plan.factors.size(2) > 1:
            members = keep if members is None else members[keep]
    return x, x0_hat


def _rows_of(table: Tensor, members: Tensor | None, dim: int) -> Tensor:
    return table if members is None else table.index_select(dim, members)
