"""Stand-ins for the solvers' update: noise with bounded tails, and tokens that return to the absorbing state."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.diffusion.noise import truncate_normal
from pydiffseq.diffusion.plan import Update
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


def absorbing_update(rate: float, vector: Tensor | float, update: Update) -> Update:
    """``update``, after which a token becomes ``vector``, the absorbing state, with probability ``rate`` times its noise.

    DiffuSeq-v2's discrete noise while sampling (spec 1.11b), where that is ``rate sqrt(beta_t)`` at each of its T steps;
    a longer step adds more noise, and one without noise replaces nothing. ``vector`` is 0 where the state counts from it.
    """

    def absorb(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, *, seed: int | Tensor | None, step: int,
               rows: Tensor | None) -> Tensor:
        moved = update(x, x0_hat, a, b, c, seed=seed, step=step, rows=rows)
        here = torch.arange(len(x), device=x.device) if rows is None else rows
        gone = token_uniform(seed, here, x.size(1), step=step + 1) < rate * c
        return torch.where(gone[..., None], vector, moved).to(moved.dtype)

    return absorb


def choose_update(noise_limit: float, absorb_rate: float, vector: Tensor | float) -> Update | None:
    """The update that the options ask for; ``None``: the solver's own."""
    update = truncated_update(noise_limit) if noise_limit else None
    return absorbing_update(absorb_rate, vector, update or ops.sampler_step) if absorb_rate else update
