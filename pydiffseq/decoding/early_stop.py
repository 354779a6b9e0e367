"""The denoising loop of candidates that stop when their tokens stay the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffseq.decoding.loop import Loop
from pydiffseq.nn.packing import Packing


class EarlyStopLoop(Loop):
    """A candidate is done, and its tokens fixed, when they have stayed the same for ``options.patience`` steps.

    A sentence whose candidates are all done leaves the batch, which is decided on the host. So what a candidate becomes
    depends on it alone.

    Args:
        model, options, table, inputs: as for :class:`Loop`.
        encoded: the sentences before ``prepare``.

    Attributes:
        made: denoising steps of all candidates so far.
        steps: int64 ``[M]``, those of each candidate.
        tokens, vectors: int64 ``[M, N]`` and ``[M, N, d]``: what came out, and its predictions before they were rounded.
    """

    def __init__(self, *arguments: Any, encoded: Any) -> None:
        super().__init__(*arguments)
        self.encoded, self.callback = encoded, self._leave
        lengths, width = self.inputs.lengths, self.inputs.plan.factors.size(-1)
        self.made = 0
        self.steps = torch.full_like(lengths, self.inputs.plan.transitions)
        self.tokens = lengths.new_empty(len(lengths), width)
        self.vectors = self.table.new_empty(len(lengths), width, self.table.size(1))
        # Of the rows in the batch: which they are, their tokens, for how many steps those have stayed, if they are done.
        self.active = torch.arange(len(lengths), device=lengths.device)
        self.ids: Tensor | None = None
        self.stayed = torch.zeros_like(lengths)
        self.done = torch.zeros_like(lengths, dtype=torch.bool)

    def run(self):
        outcome = super().run()
        self._fix(~self.done)
        return outcome

    def note(self, x0_hat: Tensor) -> None:
        """Count for how many steps each row's tokens have stayed; what left keeps its tokens in the history."""
        tokens, mask = self.likeliest(x0_hat), self.inputs.mask
        self.made += len(tokens)
        if self.ids is not None:
            same = tokens.eq(self.ids) if mask is None else tokens.eq(self.ids) | ~mask
            self.stayed = torch.where(same.all(1), self.stayed + 1, 0)
        self.ids = tokens
        if self.options.history:
            whole = self.history[-1].clone() if self.history else torch.empty_like(tokens)
            whole[self.active] = tokens
            self.history.append(whole)

    def _fix(self, rows: Tensor) -> None:
        """Write down what came out of ``rows`` (bool, of those in the batch)."""
        if self.ids is not None and self.unrounded is not None:
            where = self.active[rows]
            self.tokens[where], self.vectors[where] = self.ids[rows], self.unrounded[rows]

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
        if len(keep):
            self._keep(stay, keep)
        return keep

    def _keep(self, sentences: Tensor, rows: Tensor) -> None:
        """Go on with these sentences and their rows."""
        i, width = self.inputs, self.inputs.plan.factors.size(-1)
        self.encoded = self.encoded.select(sentences)
        mask, lengths = None if i.mask is None else i.mask[rows], i.lengths[rows]
        self.inputs = i._replace(
            encoded=self.model.prepare(self.encoded, mask, lengths, width), members=i.members[rows], rows=i.rows[rows],
            lengths=lengths, mask=mask, packing=Packing.of(mask))
        self.active, self.done, self.stayed = self.active[rows], self.done[rows], self.stayed[rows]
        self.ids, self.x_self, self.unrounded = (
            None if x is None else x[rows] for x in (self.ids, self.x_self, self.unrounded))
