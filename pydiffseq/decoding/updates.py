"""Stand-ins for the solvers' update: noise with bounded tails, and tokens that return to the absorbing state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.diffusion import NoiseSchedule, StepList
from pydiffseq.diffusion.noise import truncate_normal
from pydiffseq.diffusion.solvers import Update
from pydiffseq.models.base import token_uniform


def truncated_update(limit: float) -> Update:
    """:func:`pydiffseq.ops.sampler_step` with noise truncated to ``limit`` standard deviations."""

    def update(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, *, seed: int | Tensor | None, step: int,
               rows: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        noise = ops.philox_normal((batch, length, dim), seed=seed, step=step, rows=rows, stream="x_t", device=x.device)
        moved = ops.sampler_step(x, x0_hat, a, b, 0.0, seed=seed, step=step, rows=rows)
        return (moved + c[..., None] * truncate_normal(noise, limit)).to(x.dtype)

    return update


def absorbing_update(rate: float, steps: Sequence[tuple], schedule: NoiseSchedule, update: Update) -> Update:
    """``update``, after which a token returns to the absorbing state with probability ``rate sqrt(1 - abar_u)``.

    DiffuSeq-v2's discrete noise while sampling (spec 1.11b). ``u`` is the timestep that the update arrives at; the state
    counts from the absorbing vector, which is therefore 0.
    """

    def absorb(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, *, seed: int | Tensor | None, step: int,
               rows: Tensor | None) -> Tensor:
        moved = update(x, x0_hat, a, b, c, seed=seed, step=step, rows=rows)
        after = torch.as_tensor(steps[step][1], device=x.device)
        after = after[:, None] if after.dim() == 1 else after
        share = rate * (1 - schedule.abar_at(after)).sqrt().float()
        here = torch.arange(len(x), device=x.device) if rows is None else rows
        gone = token_uniform(seed, here, x.size(1), step=step + 1) < share
        return moved.masked_fill(gone[..., None], 0.0)

    return absorb


def choose_update(noise_limit: float, absorb_rate: float, steps: StepList, schedule: NoiseSchedule) -> Update | None:
    """The update that the options ask for; ``None``: the solver's own."""
    update = truncated_update(noise_limit) if noise_limit else None
    if absorb_rate:
        return absorbing_update(absorb_rate, steps, schedule, update or ops.sampler_step)
    return update
