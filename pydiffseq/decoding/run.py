"""What a denoising loop needs, made once for the candidates of a piece, and the tokens that come out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pydiffseq.decoding.early_stop import EarlyStopLoop
from pydiffseq.decoding.loop import Inputs, Loop
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.diffusion import (
    RECIPES,
    StepList,
    check_visited,
    sentence_steps,
    spaced_timesteps,
    tabulate,
    token_steps,
    uniform_steps,
    xy_steps,
)
from pydiffseq.nn.packing import Packing

if TYPE_CHECKING:
    from pydiffseq.decoding.decode import DecodeOptions


class Result(NamedTuple):
    """What became of M candidates."""

    tokens: Tensor    # int64 [M, N]
    scores: Tensor    # float32 [M, N]: their log probabilities
    steps: Tensor     # int64 [M]: network calls
    history: list[Tensor]   # the tokens of each step, int64 [M, N], if wanted
    planned: int      # denoising steps of all candidates, by the step list
    made: int         # and in fact


def denoise_candidates(model: DenoisingNetwork, options: DecodeOptions, table: Tensor, encoded: Any, lengths: Tensor,
                       width: int, rows: Tensor) -> Result:
    """Denoise the M candidates of B sentences.

    Args:
        model: a frozen network.
        table: its token table ``[V, d]``.
        encoded: of the B sentences; candidates of a sentence are consecutive.
        lengths, rows: int64 ``[M]``: target lengths, at most ``width``, and coordinates of the noise.
    """
    inputs = make_inputs(model, options, encoded, lengths, width, rows)
    loop, planned = Loop(model, options, table, inputs), len(rows) * len(inputs.plan)
    if options.patience:
        stopping = EarlyStopLoop(model, options, table, inputs, encoded=encoded)
        stopping.run()
        scores = loop.scores(stopping.vectors, stopping.tokens)
        return Result(stopping.tokens, scores, stopping.steps, stopping.history, planned, stopping.made)
    outcome = loop.run()
    if options.final == "state":
        vectors = outcome.state if loop.shift is None else outcome.state + loop.shift
        tokens = loop.likeliest(vectors)
    else:
        vectors, tokens = outcome.unrounded, loop.likeliest(outcome.prediction)
    steps = torch.full_like(lengths, len(inputs.plan))
    return Result(tokens, loop.scores(vectors, tokens), steps, outcome.history, planned, planned)


def make_inputs(model: DenoisingNetwork, options: DecodeOptions, encoded: Any, lengths: Tensor, width: int,
                rows: Tensor) -> Inputs:
    """The constants of the loop; see :func:`denoise_candidates`."""
    distinct, members = lengths.unique(return_inverse=True)
    steps = step_list(model, options, distinct, width)
    plan = tabulate(RECIPES[options.solver], steps, model.schedule, len(distinct), width, lengths.device)
    mask = None
    if model.length_head is not None:
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
    members = members if plan.factors.size(2) > 1 else torch.zeros_like(members)
    return Inputs(model.prepare(encoded, mask, lengths, width), plan, members, rows, lengths, mask, Packing.of(mask))


def step_list(model: DenoisingNetwork, options: DecodeOptions, lengths: Tensor, width: int) -> StepList:
    """Timesteps per token, for each of ``lengths``, where the network was trained on them, else one per sentence."""
    o, c = options, model.config
    if o.visited is not None:
        visited = check_visited("the step list", o.visited, c.diffusion_steps)
    elif o.step_list not in ("auto", "stride") or c.timestep_sampler != "xy_uniform":
        if o.step_list == "auto":
            return uniform_steps(c.diffusion_steps, o.steps, o.step_end)
        visited = spaced_timesteps(o.step_list, model.schedule, o.steps)
    else:
        return xy_steps(c.diffusion_steps, lengths, width, o.steps, c.anchor_scale, o.step_end)
    if c.timestep_sampler != "xy_uniform":
        return sentence_steps(visited, o.step_end)
    return token_steps(c.diffusion_steps, visited, lengths, width, c.anchor_scale, o.step_end)
