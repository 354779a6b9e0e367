"""What a denoising loop needs, made once for the candidates of a piece, and the tokens that come out of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pydiffseq.decoding.early_stop import EarlyStopLoop
from pydiffseq.decoding.graph import Replayer
from pydiffseq.decoding.loop import Inputs, Loop
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.diffusion import (
    RECIPES,
    TOKEN_SAMPLERS,
    Plan,
    StepList,
    check_visited,
    sentence_steps,
    spaced_timesteps,
    tabulate,
    token_steps,
    xy_steps,
)
from pydiffseq.nn.packing import Packing

if TYPE_CHECKING:
    from pydiffseq.decoding.decode import DecodeOptions


MOST_ENTRIES = 1 << 20   # calls x lengths x positions of a plan for all lengths
MOST_PLANS = 8


class Result(NamedTuple):
    """What became of M candidates."""

    tokens: Tensor    # int64 [M, N]
    scores: Tensor    # float32 [M, N]: their log probabilities
    steps: Tensor     # int64 [M]: network calls
    history: list[Tensor]   # the tokens of each step, int64 [M, N], if wanted
    planned: int      # denoising steps of a candidate, by the step list
    made: int         # denoising steps of all candidates


class Plans:
    """A solver's plans for candidates of some lengths.

    Args:
        all_lengths: make them for all lengths up to a width, so that all batches of a width have one, which is kept.
    """

    def __init__(self, model: DenoisingNetwork, options: DecodeOptions, all_lengths: bool) -> None:
        self.model, self.options, self.all_lengths = model, options, all_lengths
        self._kept: OrderedDict[int, Plan] = OrderedDict()

    def of(self, lengths: Tensor, width: int) -> tuple[Plan, Tensor]:
        """The plan, and int64 ``[M]`` the row of it that a candidate follows."""
        calls = self.options.steps if self.options.visited is None else len(self.options.visited)
        if self.all_lengths and calls * width**2 <= MOST_ENTRIES and calls <= self.model.config.diffusion_steps:
            if width not in self._kept:
                self._kept[width] = self._make(torch.arange(1, width + 1, device=lengths.device), width)
                if len(self._kept) > MOST_PLANS:
                    self._kept.popitem(last=False)
            plan, members = self._kept[width], lengths - 1
        else:
            distinct, members = lengths.unique(return_inverse=True)
            plan = self._make(distinct, width)
        return plan, members if plan.factors.size(2) > 1 else torch.zeros_like(members)

    def _make(self, distinct: Tensor, width: int) -> Plan:
        steps = step_list(self.model, self.options, distinct, width)
        return tabulate(RECIPES[self.options.solver], steps, self.model.schedule, len(distinct), width, distinct.device)


def denoise_candidates(model: DenoisingNetwork, options: DecodeOptions, table: Tensor, plans: Plans, encoded: Any,
                       lengths: Tensor, width: int, rows: Tensor, replayer: Replayer | None = None) -> Result:
    """Denoise the M candidates of B sentences.

    Args:
        model: a frozen network.
        table: its token table ``[V, d]``.
        plans: of this model and these options.
        encoded: of the B sentences; candidates of a sentence are consecutive.
        lengths, rows: int64 ``[M]``: target lengths, at most ``width``, and coordinates of the noise.
        replayer: runs the loop from recordings; early stops do without.
    """
    plan, members = plans.of(lengths, width)
    mask = None
    if model.length_head is not None:
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
    prepared = model.prepare(encoded, mask, lengths, width)
    inputs = Inputs(prepared, plan, members, rows, lengths, mask, Packing.of(mask))
    loop = Loop(model, options, table, inputs)
    if options.patience:
        stopping = EarlyStopLoop(model, options, table, inputs, encoded=encoded)
        stopping.run()
        scores = loop.scores(stopping.vectors, stopping.tokens)
        return Result(stopping.tokens, scores, stopping.steps, stopping.history, plan.transitions, stopping.made)
    outcome = loop.run() if replayer is None else replayer(inputs)
    if options.final == "state":
        vectors = outcome.state if loop.shift is None else outcome.state + loop.shift
        tokens = loop.likeliest(vectors)
    else:
        vectors, tokens = outcome.unrounded, loop.likeliest(outcome.prediction)
    return Result(tokens, loop.scores(vectors, tokens), torch.full_like(lengths, plan.transitions), outcome.history,
                  plan.transitions, plan.transitions * len(rows))


def step_list(model: DenoisingNetwork, options: DecodeOptions, lengths: Tensor, width: int) -> StepList:
    """Timesteps per token, for each of ``lengths``, where the network was trained on them, else one per sentence."""
    o, c = options, model.config
    path, T = c.timestep_sampler, c.diffusion_steps
    if o.visited is not None:
        visited = check_visited("the step list", o.visited, T)
    elif path == "xy_uniform" and o.step_list in ("auto", "stride"):
        return xy_steps(T, lengths, width, o.steps, c.anchor_scale, o.step_end)
    else:
        spacing = ("halfstart" if path == "rolling" else "uniform") if o.step_list == "auto" else o.step_list
        visited = spaced_timesteps(spacing, model.schedule, o.steps)
    if path in TOKEN_SAMPLERS:
        return token_steps(T, visited, lengths, width, c.anchor_scale, o.step_end, path)
    return sentence_steps(visited, o.step_end)
