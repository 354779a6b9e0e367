"""The denoising loop over the candidates of a piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.decoding.updates import choose_update
from pydiffseq.diffusion import (
    SOLVERS,
    StepList,
    check_visited,
    sentence_steps,
    spaced_timesteps,
    token_steps,
    uniform_steps,
    xy_steps,
)

if TYPE_CHECKING:
    from pydiffseq.decoding.decode import DecodeOptions


class DenoisingRun:
    """One pass of a solver over M candidates of B sentences, and the tokens that come out.

    With ``patience`` a candidate is done, and its tokens fixed, when they have stayed the same for so many steps. A
    sentence whose candidates are all done leaves the batch. So what a candidate becomes depends on it alone.

    Attributes:
        history: the tokens of each step, int64 ``[M, N]`` each, if wanted.
        planned, made: denoising steps of all candidates, by the step list and in fact.
    """

    def __init__(self, model: DenoisingNetwork, options: DecodeOptions, table: Tensor, encoded: Any, lengths: Tensor,
                 width: int, rows: Tensor) -> None:
        self.model, self.options, self.table, self.encoded = model, options, table, encoded
        self.lengths, self.width, self.rows = lengths, width, rows
        inside = torch.arange(width, device=lengths.device) < lengths[:, None]
        self.mask = inside if model.length_head is not None else None
        self.shift = model.absorbing if options.drift == "follow" else None   # what the solver's state counts from
        self.x_self: Tensor | None = None
        self.history: list[Tensor] = []
        self.planned = self.made = 0
        # The last prediction as the network gave it, which says how sure it is: rounding leaves no doubt.
        self.unrounded: Tensor | None = None
        # What patience needs. Of the rows in the batch: which they are, their tokens, for how many steps those have
        # stayed, and whether they are done. Of all rows: what came out, and after how many steps.
        self.active = torch.arange(len(lengths), device=lengths.device)
        self.ids: Tensor | None = None
        self.stayed = torch.zeros_like(lengths)
        self.done = torch.zeros_like(lengths, dtype=torch.bool)
        self.fixed: tuple[Tensor, Tensor] | None = None   # tokens, unrounded prediction
        self.steps = torch.zeros_like(lengths)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids int64 ``[M, N]``, their log probabilities float32 ``[M, N]``, network calls int64 ``[M]``."""
        o, table, embedding = self.options, self.table, self.model.embedding
        seed, step_list = ops.draw_seed(o.seed), self._step_list()
        shape = (len(self.lengths), self.width, self.model.config.latent_dim)
        x = ops.philox_normal(shape, seed=seed, rows=self.rows, dtype=table.dtype, device=table.device)
        vector = 0.0 if self.model.absorbing is None else self.model.absorbing
        if o.drift == "start":
            x = x + vector
        self.planned = len(x) * len(step_list)
        self.steps.fill_(len(step_list))
        if o.patience:
            self.fixed = torch.empty(shape[:2], dtype=torch.int64, device=x.device), torch.empty_like(x)
        state, _ = SOLVERS[o.solver](
            self._denoise, x, step_list, self.model.schedule, seed=seed, rows=self.rows,
            update=choose_update(o.noise_limit, o.absorb_rate, 0.0 if self.shift is not None else vector),
            callback=self._leave if o.patience else None)
        tokens, latent = self._result(state)
        return tokens, -embedding.nll(latent, tokens), self.steps

    def _result(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and the vectors that their probabilities are read off: the state, or the unrounded prediction."""
        if self.options.final == "state":
            state = state if self.shift is None else state + self.shift
            return self.model.embedding.likeliest(state), state
        if self.x_self is None or self.unrounded is None:
            raise RuntimeError("the solver did not call the network")
        if self.fixed is None:
            return self.model.embedding.likeliest(self.x_self), self.unrounded
        self._fix(~self.done)
        return self.fixed

    def _step_list(self) -> StepList:
        """Per-token timesteps for a network that was trained on them, else one timestep per sentence."""
        o, c = self.options, self.model.config
        if o.visited is not None:
            visited = check_visited("the step list", o.visited, c.diffusion_steps)
        elif o.step_list not in ("auto", "stride") or c.timestep_sampler != "xy_uniform":
            if o.step_list == "auto":
                return uniform_steps(c.diffusion_steps, o.steps, o.step_end)
            visited = spaced_timesteps(o.step_list, self.model.schedule, o.steps)
        else:
            return xy_steps(c.diffusion_steps, self._own_lengths(), self.width, o.steps, c.anchor_scale, o.step_end)
        if c.timestep_sampler != "xy_uniform":
            return sentence_steps(visited, o.step_end)
        return token_steps(c.diffusion_steps, visited, self._own_lengths(), self.width, c.anchor_scale, o.step_end)

    def _own_lengths(self) -> Tensor:
        """int64 ``[M]``, or ``[1]`` where all rows have one length and no mask."""
        shared = self.mask is None and bool(self.lengths.eq(self.lengths[0]).all())
        return self.lengths[:1] if shared else self.lengths

    def _denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """x0_hat ``[M, N, d]`` of the state ``x`` at timesteps ``t`` ``[M]`` or ``[M, N]``, rounded if so wanted.

        The solver's states and predictions count from the absorbing vector, where noise drifts to one.
        """
        self.made += len(x)
        if self.shift is not None:
            x = x + self.shift
        t = t.expand(x.shape[:2]) if t.dim() == 2 else t.view(-1, 1).expand(x.shape[:2])
        self.unrounded = self.model.denoise(x, t, self.encoded, self.mask, self.x_self, self.lengths)
        self.x_self = x0_hat = self._round(self.unrounded, t)
        if self.options.history or self.options.patience:
            self._remember(self.model.embedding.likeliest(x0_hat))
        return x0_hat if self.shift is None else x0_hat - self.shift

    def _round(self, x0_hat: Tensor, t: Tensor) -> Tensor:
        """The nearest embeddings, at the timesteps where they are wanted."""
        o = self.options
        if o.rounding == "off":
            return x0_hat
        rounded = ops.nearest(x0_hat, self.table)[1]
        if o.rounding == "every":
            return rounded
        wanted = t <= o.rounding_step if o.rounding == "from" else t >= o.rounding_step
        return torch.where(wanted[..., None], rounded, x0_hat)

    def _remember(self, tokens: Tensor) -> None:
        """Count for how many steps each row's tokens have stayed; what left keeps its tokens in the history."""
        if self.ids is not None:
            same = tokens.eq(self.ids) if self.mask is None else tokens.eq(self.ids) | ~self.mask
            self.stayed = torch.where(same.all(1), self.stayed + 1, 0)
        self.ids = tokens
        if self.options.history:
            whole = self.history[-1].clone() if self.history else torch.empty_like(tokens)
            whole[self.active] = tokens
            self.history.append(whole)

    def _leave(self, step: dict[str, Any]) -> Tensor | None:
        """Fix the rows that are done; the rows of the sentences that stay, or ``None`` where all do."""
        done = (self.stayed >= self.options.patience) & ~self.done
        if not bool(done.any()):
            return None
        self._fix(done)
        self.steps[self.active[done]] = step["i"] + 1
        self.done |= done
        sentences = len(self.encoded.mask)
        left = self.done.view(sentences, -1).all(1)
        if not bool(left.any()):
            return None
        stay = left.logical_not().nonzero().flatten()
        keep = torch.arange(len(self.done), device=stay.device).view(sentences, -1)[stay].flatten()
        if not len(keep):
            return keep
        self.encoded = self.encoded.select(stay)
        self.lengths, self.active, self.done = self.lengths[keep], self.active[keep], self.done[keep]
        self.stayed = self.stayed[keep]
        self.mask = None if self.mask is None else self.mask[keep]
        self.ids = None if self.ids is None else self.ids[keep]
        self.x_self = None if self.x_self is None else self.x_self[keep]
        self.unrounded = None if self.unrounded is None else self.unrounded[keep]
        return keep

    def _fix(self, rows: Tensor) -> None:
        """Write down what came out of ``rows`` (bool, of those in the batch)."""
        if self.fixed is not None and self.ids is not None and self.unrounded is not None:
            tokens, unrounded = self.fixed
            tokens[self.active[rows]], unrounded[self.active[rows]] = self.ids[rows], self.unrounded[rows]
