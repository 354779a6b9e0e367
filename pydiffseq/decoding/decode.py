"""From source ids to hypotheses: lengths, candidates, the denoising loop, token choice, selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.decoding.candidates import Piece, candidate_lengths, split_candidates
from pydiffseq.decoding.mbr import MBR_DIRECTIONS, SMOOTHINGS, TOKEN_METRICS, mbr_order
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.decoding.updates import choose_update
from pydiffseq.diffusion import SOLVERS, StepList, uniform_steps, xy_steps
from pydiffseq.diffusion.steps import ENDS
from pydiffseq.nn.freeze import freeze

ROUNDINGS = ("off", "every", "from", "until")
FINALS = ("x0_hat", "state")


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Attributes:
        steps: number of network calls per candidate.
        solver: a key of :data:`pydiffseq.diffusion.SOLVERS`.
        length_beam: how many of the likeliest lengths to try (1 with the ``pad`` policy).
        noise_beam: candidates per length, which differ in their noise.
        rounding: ``every`` replaces each x0_hat by its nearest embedding (as published), ``off`` keeps it, ``from``
            replaces it from timestep ``rounding_step`` on, that is at and below it, ``until`` at and above it (DiffuSeq's
            clamp).
        rounding_step: 0..T, see ``rounding``.
        noise_limit: truncate the noise of a step to this many standard deviations (DiffuSeq's ``top_p``); 0: do not.
        absorb_rate: R, after each step a token becomes the absorbing vector with probability R sqrt(1 - abar)
            (DiffuSeq-v2's ancestral sampler); 0: never. Needs a network with ``soft_absorb``.
        step_end: ``clean`` ends the step list at abar = 1; ``zero`` at timestep 0 (as published).
        final: tokens are read off the last ``x0_hat``, or off the final ``state`` (as published).
        mbr_metric, mbr_smoothing, mbr_direction: how candidates are ordered, see
            :func:`pydiffseq.decoding.mbr.mbr_order`; chrF is not among the metrics, since it is about text.
        candidate_tokens: how many target tokens, padding included, are denoised at once; what a batch has more of is
            split, which changes no output. It bounds the memory: about 100 x ``hidden_dim`` bytes a token.
        seed: key of the noise; with a sentence's id and the candidate number it fixes the output.
        history: keep every step's tokens.

    Raises:
        ValueError: an unknown choice, or a count below 1.
    """

    steps: int = 20
    solver: str = "skip"
    length_beam: int = 1
    noise_beam: int = 1
    rounding: str = "every"
    rounding_step: int = 0
    noise_limit: float = 0.0
    absorb_rate: float = 0.0
    step_end: str = "clean"
    final: str = "x0_hat"
    mbr_metric: str = "bleu"
    mbr_smoothing: str = "add1"
    mbr_direction: str = "hypothesis"
    candidate_tokens: int = 16384
    seed: int = 1
    history: bool = False

    def __post_init__(self) -> None:
        choices = {"solver": tuple(SOLVERS), "rounding": ROUNDINGS, "step_end": ENDS, "final": FINALS,
                   "mbr_metric": TOKEN_METRICS, "mbr_smoothing": SMOOTHINGS, "mbr_direction": MBR_DIRECTIONS}
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


@dataclass
class Hypothesis:
    """One translation.

    Attributes:
        tokens: int64 ``[len]``, without ``</s>`` and padding.
        token_scores: float32 ``[len]``, their log probabilities (base e).
        score: how it ranks, higher is better; see :func:`decode`.
        history: with ``DecodeOptions.history`` the tokens of every step's x0_hat, int64 ``[len of the step]`` each.
    """

    tokens: Tensor
    token_scores: Tensor
    score: float
    history: list[Tensor] = field(default_factory=list)


class Decoder:
    """Decodes batches with one network whose weights do not change in between.

    What the weights alone decide is computed here, once: time projections as tables, the token tables and their packs.
    In a denoising step there remain the network's decoder, the rounding and the solver's update.

    Args:
        model: a network in evaluation mode. After a change of its weights make a new decoder.

    Raises:
        ValueError: the model is in training mode, ``rounding_step`` is outside 0..T, or ``absorb_rate`` is given for a
            network without an absorbing state.
    """

    def __init__(self, model: DenoisingNetwork, options: DecodeOptions) -> None:
        if model.training:
            raise ValueError("decoding needs a model in evaluation mode (model.eval()), got one in training mode")
        most = model.config.diffusion_steps
        if not 0 <= options.rounding_step <= most:
            raise ValueError(f"rounding_step must be in 0..{most} (the diffusion steps), got {options.rounding_step}")
        if options.absorb_rate and model.absorbing is None:
            raise ValueError("absorb_rate needs a model with an absorbing state (DiffuSeq trained with soft_absorb), "
                             "got one without")
        self.options = options
        self.model = cast(DenoisingNetwork, freeze(cast(torch.nn.Module, model)))
        self.table = self.model.embedding.table()

    @torch.no_grad()
    def __call__(self, src_tokens: Tensor, ids: Tensor) -> list[list[Hypothesis]]:
        """Translate a batch; see :func:`decode`."""
        if not len(src_tokens):
            return []
        encoded = self.model.encode(src_tokens)
        lengths = candidate_lengths(self.model, encoded, self.options.length_beam, self.options.noise_beam)
        lengths_or_0 = lengths.masked_fill(self._without_words(src_tokens)[:, None], 0)
        groups: list[list[Hypothesis]] = [[] for _ in range(len(src_tokens))]
        for piece in split_candidates(lengths, self.options.candidate_tokens):
            self._denoise(piece, encoded, lengths, ids, lengths_or_0, groups)
        return [_rank(group, self.options) for group in groups]

    def _denoise(self, piece: Piece, encoded: Any, lengths: Tensor, ids: Tensor, lengths_or_0: Tensor,
                 groups: list[list[Hypothesis]]) -> None:
        """Append the hypotheses of ``piece`` to the groups of their sentences."""
        sentences = torch.tensor(piece.sentences, device=lengths.device)
        chosen = slice(piece.candidates.start, piece.candidates.stop)
        candidates = torch.arange(chosen.start, chosen.stop, device=lengths.device)
        rows = (candidates << 32) | ids[sentences, None]
        part = encoded if len(sentences) == len(lengths) else encoded.select(sentences)
        run = _DenoisingRun(self, part, lengths[sentences, chosen].flatten(), piece.width, rows.flatten())
        tokens, scores = run.tokens()
        kept = lengths_or_0[sentences, chosen].flatten()
        words = self._words(tokens, kept)
        past = [(step, self._words(step, kept)) for step in run.history]
        owners = [sentence for sentence in piece.sentences for _ in piece.candidates]
        for row, owner in enumerate(owners):
            history = [step[row][keep[row]] for step, keep in past]
            groups[owner].append(Hypothesis(tokens[row][words[row]], scores[row][words[row]], 0.0, history))

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


class _DenoisingRun:
    """One pass of a solver over the candidates of a piece, and the tokens that come out."""

    def __init__(self, decoder: Decoder, encoded: Any, lengths: Tensor, width: int, rows: Tensor) -> None:
        self.decoder, self.model, self.options = decoder, decoder.model, decoder.options
        self.encoded, self.lengths, self.width, self.rows = encoded, lengths, width, rows
        inside = torch.arange(self.width, device=lengths.device) < lengths[:, None]
        self.mask = inside if self.model.length_head is not None else None
        self.x_self: Tensor | None = None
        self.history: list[Tensor] = []

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """x0_hat ``[M, N, d]`` of the state ``x`` at timesteps ``t`` ``[M]`` or ``[M, N]``, rounded if so wanted.

        The solver's states and predictions count from the absorbing vector, where there is one: noise drifts to it.
        """
        shift = self.model.absorbing
        if shift is not None:
            x = x + shift
        t = t.expand(x.shape[:2]) if t.dim() == 2 else t.view(-1, 1).expand(x.shape[:2])
        x0_hat = self.model.denoise(x, t, self.encoded, self.mask, self.x_self, self.lengths)
        x0_hat = self._round(x0_hat, t)
        self.x_self = x0_hat
        if self.options.history:
            self.history.append(self._argmax(x0_hat))
        return x0_hat if shift is None else x0_hat - shift

    def _round(self, x0_hat: Tensor, t: Tensor) -> Tensor:
        """The nearest embeddings, at the timesteps where they are wanted."""
        o = self.options
        if o.rounding == "off":
            return x0_hat
        rounded = ops.nearest(x0_hat, self.decoder.table)[1]
        if o.rounding == "every":
            return rounded
        wanted = t <= o.rounding_step if o.rounding == "from" else t >= o.rounding_step
        return torch.where(wanted[..., None], rounded, x0_hat)

    def _steps(self) -> StepList:
        """Per-token timesteps for a network that was trained on them, else one timestep per sentence."""
        o, c = self.options, self.model.config
        if c.timestep_sampler != "xy_uniform":
            return uniform_steps(c.diffusion_steps, o.steps, o.step_end)
        shared = self.mask is None and bool(self.lengths.eq(self.lengths[0]).all())
        lengths = self.lengths[:1] if shared else self.lengths
        return xy_steps(c.diffusion_steps, lengths, self.width, o.steps, c.anchor_scale, o.step_end)

    def _argmax(self, x: Tensor) -> Tensor:
        return self.model.embedding.likeliest(x)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Token ids int64 ``[M, N]`` and their log probabilities float32 ``[M, N]``."""
        o, c, table = self.options, self.model.config, self.decoder.table
        seed = ops.draw_seed(o.seed)
        shape = (len(self.lengths), self.width, c.latent_dim)
        x = ops.philox_normal(shape, seed=seed, rows=self.rows, dtype=table.dtype, device=table.device)
        steps, schedule = self._steps(), self.model.schedule
        state, x0_hat = SOLVERS[o.solver](
            self.denoise, x, steps, schedule, seed=seed, rows=self.rows,
            update=choose_update(o.noise_limit, o.absorb_rate, steps, schedule))
        latent = x0_hat if o.final == "x0_hat" else state
        if self.model.absorbing is not None:
            latent = latent + self.model.absorbing
        tokens = self._argmax(latent)
        return tokens, -self.model.embedding.nll(latent, tokens)


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
