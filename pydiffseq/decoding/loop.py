"""The denoising loop: for each step a network call, rounding and an update. Nothing in it waits for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.decoding.updates import choose_update
from pydiffseq.diffusion.plan import Callback, Plan, follow
from pydiffseq.nn.packing import Packing, packed, padded

if TYPE_CHECKING:
    from pydiffseq.decoding.decode import DecodeOptions


class Inputs(NamedTuple):
    """What the loop reads of M candidates besides the network and the options."""

    encoded: Any              # as the network's ``prepare`` gives it
    plan: Plan                # for each of the distinct lengths
    members: Tensor           # int64 [M]: the row of the plan that a candidate follows
    rows: Tensor              # int64 [M]: coordinates of the noise
    lengths: Tensor           # int64 [M]
    mask: Tensor | None       # bool [M, N]; None: all
    packing: Packing | None   # its real tokens, if that saves work


class Outcome(NamedTuple):
    """What the loop leaves."""

    state: Tensor         # [M, N, d]
    prediction: Tensor    # [M, N, d], the last x0_hat
    unrounded: Tensor     # [M, N, d], the same as the network gave it, which says how sure it is
    history: list[Tensor]   # the tokens of each step, int64 [M, N], if wanted


class Loop:
    """One pass of a solver over candidates.

    Args:
        model: a frozen network.
        table: its token table ``[V, d]``.
        inputs: see :class:`Inputs`.
    """

    callback: Callback | None = None

    def __init__(self, model: DenoisingNetwork, options: DecodeOptions, table: Tensor, inputs: Inputs) -> None:
        self.model, self.options, self.table, self.inputs = model, options, table, inputs
        self.shift = model.absorbing if options.drift == "follow" else None   # what the solver's state counts from
        self.x_self: Tensor | None = None
        self.unrounded: Tensor | None = None
        self.history: list[Tensor] = []

    def run(self) -> Outcome:
        """Denoise from noise to the end of the plan."""
        o, plan, seed = self.options, self.inputs.plan, ops.draw_seed(self.options.seed)
        shape = (len(self.inputs.rows), plan.factors.size(-1), self.model.config.latent_dim)
        x = ops.philox_normal(shape, seed=seed, rows=self.inputs.rows, dtype=self.table.dtype, device=self.table.device)
        vector = 0.0 if self.model.absorbing is None else self.model.absorbing
        if o.drift == "start":
            x = x + vector
        update = choose_update(o.noise_limit, o.absorb_rate, 0.0 if self.shift is not None else vector)
        state, _ = follow(plan, self._denoise, x, members=self.inputs.members, seed=seed, rows=self.inputs.rows,
                          update=update, callback=self.callback)
        if self.x_self is None or self.unrounded is None:
            raise RuntimeError("a plan has at least one transition")
        return Outcome(state, self.x_self, self.unrounded, self.history)

    def _denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """x0_hat ``[M, N, d]`` of the state ``x`` at timesteps ``t`` ``[M]`` or ``[M, N]``, rounded if so wanted.

        The solver's states and predictions count from the absorbing vector, where noise drifts to one.
        """
        i = self.inputs
        if self.shift is not None:
            x = x + self.shift
        t = t if t.dim() == 2 else t.view(-1, 1).expand(x.shape[:2])
        self.unrounded = self.model.denoise(x, t, i.encoded, i.mask, self.x_self, i.lengths)
        self.x_self = x0_hat = self._round(self.unrounded, t)
        self.note(x0_hat)
        return x0_hat if self.shift is None else x0_hat - self.shift

    def _round(self, x0_hat: Tensor, t: Tensor) -> Tensor:
        """The nearest embeddings, at the timesteps where they are wanted."""
        o = self.options
        if o.rounding == "off":
            return x0_hat
        packing = self.inputs.packing
        rounded = padded(ops.nearest(packed(x0_hat, packing), self.table)[1], packing)
        if o.rounding == "every":
            return rounded
        wanted = t <= o.rounding_step if o.rounding == "from" else t >= o.rounding_step
        return torch.where(wanted[..., None], rounded, x0_hat)

    def note(self, x0_hat: Tensor) -> None:
        """Keep the tokens of a step, if wanted."""
        if self.options.history:
            self.history.append(self.likeliest(x0_hat))

    def likeliest(self, x: Tensor) -> Tensor:
        """Tokens int64 ``[M, N]`` of ``x`` ``[M, N, d]``."""
        packing = self.inputs.packing
        return padded(self.model.embedding.likeliest(packed(x, packing)), packing)

    def scores(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Log probabilities of ``tokens`` at ``x``, float32 ``[M, N]``."""
        packing = self.inputs.packing
        return -padded(self.model.embedding.nll(packed(x, packing), packed(tokens, packing)), packing)
