"""From source ids to hypotheses: lengths, candidates, the denoising loop, token choice, selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from pydiffseq.decoding.candidates import ENOUGH_TOKENS, Piece, candidate_lengths, split_candidates
from pydiffseq.decoding.graph import (
    MOST_STEPS,
    SOURCE_UNIT,
    WIDTH_UNIT,
    CudaRecorder,
    Recorder,
    Replayer,
    bucket,
    round_up,
)
from pydiffseq.decoding.loop import Loop
from pydiffseq.decoding.mbr import MBR_DIRECTIONS, SMOOTHINGS, TOKEN_METRICS, mbr_order
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.decoding.run import Plans, denoise_candidates
from pydiffseq.diffusion import SOLVERS, SPACINGS
from pydiffseq.diffusion.steps import ENDS
from pydiffseq.nn.freeze import freeze

ROUNDINGS = ("off", "every", "from", "until")
DRIFTS = ("follow", "start", "ignore")
FINALS = ("x0_hat", "state")
STEP_LISTS = ("auto", *SPACINGS)


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Attributes:
        steps: number of network calls per candidate.
        step_list: how the steps are spaced: ``auto`` (AR-Diffusion's stride over the sentence indices for a network with
            ``xy_uniform`` timesteps, ``halfstart`` with ``rolling``, else ``uniform``), or one of
            :data:`pydiffseq.diffusion.SPACINGS`.
        visited: the timesteps themselves, falling in 0..T-1, in place of ``steps`` and ``step_list``.
        patience: a candidate is done when its tokens have not changed for so many steps in a row; 0: never early.
        solver: a key of :data:`pydiffseq.diffusion.SOLVERS`.
        length_beam: how many of the likeliest lengths to try (1 with the ``pad`` policy).
        noise_beam: candidates per length, which differ in their noise.
        rounding: ``every`` replaces each x0_hat by its nearest embedding (as published), ``off`` keeps it, ``from``
            replaces it from timestep ``rounding_step`` on, that is at and below it, ``until`` at and above it (DiffuSeq's
            clamp).
        rounding_step: 0..T, see ``rounding``.
        noise_limit: truncate the noise of a step to this many standard deviations (DiffuSeq's ``top_p``); 0: do not.
        absorb_rate: R, after each step a token becomes the absorbing vector with probability R x the standard deviation of
            the step's noise (DiffuSeq-v2's ancestral sampler); 0: never. Needs a network with ``soft_absorb``.
        drift: how the steps of a network with ``soft_absorb`` treat the absorbing vector m, to which its noise drifts:
            ``follow`` it, as training does; have it in the ``start`` alone, and ``ignore`` it, are DiffuSeq-v2's ancestral
            and DPM-Solver code, whose states lose m too early or never have it.
        step_end: ``clean`` ends the step list at abar = 1; ``zero`` at timestep 0 (as published).
        final: tokens are read off the last ``x0_hat``, or off the final ``state`` (as published).
        mbr_metric, mbr_smoothing, mbr_direction: how candidates are ordered, see
            :func:`pydiffseq.decoding.mbr.mbr_order`; chrF is not among the metrics, since it is about text.
        candidate_tokens: how many target tokens, padding included, are denoised at once; what a batch has more of is
            split, which changes no output. It bounds the memory: about 100 x ``hidden_dim`` bytes a token.
        seed: key of the noise; with a sentence's id and the candidate number it fixes the output.
        history: keep every step's tokens.
        graphs: on CUDA, replay the loop from a graph for each (batch bucket, length bucket); not with ``patience``, whose
            steps are decided on the host, nor for more than 100 steps.

    Raises:
        ValueError: an unknown choice, a count below 1, or patience with ``final='state'`` or with ``absorb_rate``.
    """

    steps: int = 20
    step_list: str = "auto"
    visited: tuple[int, ...] | None = None
    patience: int = 0
    solver: str = "skip"
    length_beam: int = 1
    noise_beam: int = 1
    rounding: str = "every"
    rounding_step: int = 0
    noise_limit: float = 0.0
    absorb_rate: float = 0.0
    drift: str = "follow"
    step_end: str = "clean"
    final: str = "x0_hat"
    mbr_metric: str = "bleu"
    mbr_smoothing: str = "add1"
    mbr_direction: str = "hypothesis"
    candidate_tokens: int = 16384
    seed: int = 1
    history: bool = False
    graphs: bool = True

    def __post_init__(self) -> None:
        choices = {"step_list": STEP_LISTS, "solver": tuple(SOLVERS), "rounding": ROUNDINGS, "step_end": ENDS,
                   "final": FINALS, "drift": DRIFTS, "mbr_metric": TOKEN_METRICS, "mbr_smoothing": SMOOTHINGS,
                   "mbr_direction": MBR_DIRECTIONS}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("steps", "length_beam", "noise_beam", "candidate_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0.0 <= self.noise_limit < float("inf"):
            raise ValueError(f"noise_limit must be a number of standard deviations, or 0 for none, got {self.noise_limit}")
        if not 0.0 <= self.absorb_rate <= 1.0:
            raise ValueError(f"absorb_rate must be in [0, 1], got {self.absorb_rate}")
        if self.patience < 0:
            raise ValueError(f"patience must be >= 0, got {self.patience}")
        if self.patience and self.final == "state":
            raise ValueError("patience needs final 'x0_hat', got 'state', which has noise in it until the last step")
        if self.patience and self.absorb_rate:
            raise ValueError("patience and absorb_rate do not go together, got both")


@dataclass
class Hypothesis:
    """One translation.

    Attributes:
        tokens: int64 ``[len]``, without ``</s>`` and padding.
        token_scores: float32 ``[len]``, their log probabilities (base e).
        score: how it ranks, higher is better; see :func:`decode`.
        steps: network calls that it took.
        history: with ``DecodeOptions.history`` the tokens of every step's x0_hat, int64 ``[len of the step]`` each.
    """

    tokens: Tensor
    token_scores: Tensor
    score: float
    steps: int = 0
    history: list[Tensor] = field(default_factory=list)


class Decoder:
    """Decodes batches with one network whose weights do not change in between.

    What the weights alone decide is computed here, once: time projections as tables, the token tables and their packs.
    In a denoising step there remain the network's decoder, the rounding and the solver's update.

    Args:
        model: a network in evaluation mode. After a change of its weights make a new decoder.
        record: how the loop is recorded (see :mod:`pydiffseq.decoding.graph`); by default CUDA graphs, on a CPU nothing.

    Attributes:
        steps_planned, steps_run: denoising steps of all candidates so far, by the step lists and after early stops.

    Raises:
        ValueError: the model is in training mode, ``rounding_step`` is outside 0..T, or ``absorb_rate`` or ``drift`` is
            given for a network without an absorbing state.
    """

    def __init__(self, model: DenoisingNetwork, options: DecodeOptions, record: Recorder | None = None) -> None:
        if model.training:
            raise ValueError("decoding needs a model in evaluation mode (model.eval()), got one in training mode")
        most = model.config.diffusion_steps
        if not 0 <= options.rounding_step <= most:
            raise ValueError(f"rounding_step must be in 0..{most} (the diffusion steps), got {options.rounding_step}")
        if options.absorb_rate and model.absorbing is None:
            raise ValueError("absorb_rate needs a model with an absorbing state (DiffuSeq trained with soft_absorb), "
                             "got one without")
        if options.drift != "follow" and model.absorbing is None:
            raise ValueError(f"drift {options.drift!r} needs a model with an absorbing state (DiffuSeq trained with "
                             "soft_absorb), got one without")
        self.options = options
        self.model = cast(DenoisingNetwork, freeze(cast(torch.nn.Module, model)))
        self.table = self.model.embedding.table()
        self.steps_planned = self.steps_run = 0
        if record is None and self.table.is_cuda:
            record = CudaRecorder()
        calls = options.steps if options.visited is None else len(options.visited)
        self.replayer = None
        if record is not None and options.graphs and not options.patience and calls <= MOST_STEPS:
            self.replayer = Replayer(lambda inputs: Loop(self.model, options, self.table, inputs).run(), record)
        self.plans = Plans(self.model, options, all_lengths=self.replayer is not None)

    @torch.no_grad()
    def __call__(self, src_tokens: Tensor, ids: Tensor) -> list[list[Hypothesis]]:
        """Translate a batch; see :func:`decode`."""
        if not len(src_tokens):
            return []
        if self.replayer is not None:
            missing = round_up(src_tokens.size(1), SOURCE_UNIT) - src_tokens.size(1)
            src_tokens = torch.nn.functional.pad(src_tokens, (0, missing), value=self.model.config.pad)
        encoded = self.model.encode(src_tokens)
        lengths = candidate_lengths(self.model, encoded, self.options.length_beam, self.options.noise_beam)
        lengths_or_0 = lengths.masked_fill(self._without_words(src_tokens)[:, None], 0)
        groups: list[list[Hypothesis]] = [[] for _ in range(len(src_tokens))]
        enough = ENOUGH_TOKENS.get(lengths.device.type, self.options.candidate_tokens)
        for piece in split_candidates(lengths, self.options.candidate_tokens, enough):
            self._denoise(piece, encoded, lengths, ids, lengths_or_0, groups)
        return [_rank(group, self.options) for group in groups]

    def _denoise(self, piece: Piece, encoded: Any, lengths: Tensor, ids: Tensor, lengths_or_0: Tensor,
                 groups: list[list[Hypothesis]]) -> None:
        """Append the hypotheses of ``piece`` to the groups of their sentences."""
        owners = [sentence for sentence in piece.sentences for _ in piece.candidates]
        if self.replayer is not None:
            piece = self._rounded_up(piece)
        sentences = torch.tensor(piece.sentences, device=lengths.device)
        chosen = slice(piece.candidates.start, piece.candidates.stop)
        candidates = torch.arange(chosen.start, chosen.stop, device=lengths.device)
        rows = (candidates << 32) | ids[sentences, None]
        part = encoded if piece.sentences == list(range(len(lengths))) else encoded.select(sentences)
        result = denoise_candidates(self.model, self.options, self.table, self.plans, part,
                                    lengths[sentences, chosen].flatten(), piece.width, rows.flatten(), self.replayer)
        planned = result.planned * len(owners)
        self.steps_planned += planned
        self.steps_run += result.made if self.options.patience else planned
        sentences = sentences[: len(owners) // len(candidates)]
        kept = lengths_or_0[sentences, chosen].flatten()
        tokens, scores = result.tokens[: len(owners)], result.scores[: len(owners)]
        words = self._words(tokens, kept)
        past = [(step, self._words(step[: len(owners)], kept)) for step in result.history]
        for row, (owner, count) in enumerate(zip(owners, result.steps.tolist(), strict=False)):
            history = [step[row][keep[row]] for step, keep in past[:count]]
            groups[owner].append(Hypothesis(tokens[row][words[row]], scores[row][words[row]], 0.0, count, history))

    def _rounded_up(self, piece: Piece) -> Piece:
        """A piece of a size that comes again: its first sentence several times, a little more width.

        Not beyond ``candidate_tokens``, nor beyond what the length head can ask for; lengths that it does not predict stay.
        """
        width, count = piece.width, len(piece.sentences)
        if self.model.length_head is not None:
            width = min(round_up(width, WIDTH_UNIT), self.model.length_head.max_length)
        more = bucket(count)
        if more * len(piece.candidates) * width > self.options.candidate_tokens:
            more = count
        return Piece(piece.sentences + piece.sentences[:1] * (more - count), piece.candidates, width)

    def _words(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Where the words of rows ``[M, N]`` are, bool: within the length, before the first ``</s>``, no other special."""
        inside = torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]
        before_eos = (tokens.eq(self.model.config.eos) & inside).cumsum(1).eq(0)
        return inside & before_eos & tokens.ne(self.model.config.pad) & tokens.ne(self.model.config.bos)

    def _without_words(self, src_tokens: Tensor) -> Tensor:
        """bool ``[B]``: sources of padding and ``</s>`` alone."""
        return (src_tokens.ne(self.model.config.pad) & src_tokens.ne(self.model.config.eos)).any(1).logical_not()


def decode(model: DenoisingNetwork, src_tokens: Tensor, ids: Tensor, options: DecodeOptions) -> list[list[Hypothesis]]:
    """Translate a batch; the hypotheses of each sentence come best first. For many batches make a :class:`Decoder`.

    Args:
        src_tokens: int64 ``[B, S]``, padded with ``model.config.pad``.
        ids: int64 ``[B]``; the noise of a sentence depends on its id, the candidate number and ``options.seed`` alone.

    With several candidates, minimum Bayes risk picks the order and ``score`` is the mean utility with the other
    candidates; a single candidate's ``score`` is its mean token log probability. A source without words gives an empty
    hypothesis.

    Raises:
        ValueError: the model is in training mode, more steps than the step list can have, a source longer than the
            model's positions, ``length_beam > 1`` without length prediction, or a candidate that is longer than
            ``candidate_tokens``.
    """
    return Decoder(model, options)(src_tokens, ids)


def _rank(group: list[Hypothesis], options: DecodeOptions) -> list[Hypothesis]:
    if len(group) == 1:
        scores = group[0].token_scores
        group[0].score = float(scores.mean()) if len(scores) else 0.0
        return group
    order, utilities = mbr_order([hypothesis.tokens.tolist() for hypothesis in group], options.mbr_direction,
                                 options.mbr_metric, options.mbr_smoothing)
    for hypothesis, utility in zip(group, utilities, strict=True):
        hypothesis.score = utility
    return [group[i] for i in order]
