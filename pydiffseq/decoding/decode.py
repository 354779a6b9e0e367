"""From source ids to hypotheses: lengths, candidates, the denoising loop, token choice, selection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.decoding.mbr import MBR_DIRECTIONS, mbr_order
from pydiffseq.diffusion import SOLVERS, StepList, uniform_steps, xy_steps
from pydiffseq.diffusion.steps import ENDS
from pydiffseq.models.ar_diffusion import ARDiffusion, Encoded

ROUNDINGS = ("off", "every")
FINALS = ("x0_hat", "state")


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Attributes:
        steps: number of network calls per candidate.
        solver: a key of :data:`pydiffseq.diffusion.SOLVERS`.
        length_beam: how many of the likeliest lengths to try (1 with the ``pad`` policy).
        noise_beam: candidates per length, which differ in their noise.
        rounding: ``every`` replaces each x0_hat by its nearest embedding (as published), ``off`` keeps it.
        step_end: ``clean`` ends the step list at abar = 1; ``zero`` at timestep 0 (as published).
        final: tokens are read off the last ``x0_hat``, or off the final ``state`` (as published).
        mbr_direction: see :func:`pydiffseq.decoding.mbr.mbr_order`.
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
    step_end: str = "clean"
    final: str = "x0_hat"
    mbr_direction: str = "hypothesis"
    seed: int = 1
    history: bool = False

    def __post_init__(self) -> None:
        choices = {"solver": tuple(SOLVERS), "rounding": ROUNDINGS, "step_end": ENDS, "final": FINALS,
                   "mbr_direction": MBR_DIRECTIONS}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("steps", "length_beam", "noise_beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


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


@torch.no_grad()
def decode(model: ARDiffusion, src_tokens: Tensor, ids: Tensor, options: DecodeOptions) -> list[list[Hypothesis]]:
    """Translate a batch; the hypotheses of each sentence come best first.

    Args:
        src_tokens: int64 ``[B, S]``, padded with ``model.config.pad``.
        ids: int64 ``[B]``; the noise of a sentence depends on its id, the candidate number and ``options.seed`` alone.

    With several candidates, minimum Bayes risk picks the order and ``score`` is the mean BLEU with the other
    candidates; a single candidate's ``score`` is its mean token log probability. A source without words gives an empty
    hypothesis.

    Raises:
        ValueError: the model is in training mode, more steps than the step list can have, a source longer than the
            model's positions, or ``length_beam > 1`` without length prediction.
    """
    if model.training:
        raise ValueError("decoding needs a model in evaluation mode (model.eval()), got one in training mode")
    if not len(src_tokens):
        return []
    encoded = model.encode(src_tokens)
    lengths, sentence, candidate = _candidates(model, encoded, options)
    candidate_encoded = encoded if options.length_beam * options.noise_beam == 1 else encoded.select(sentence)
    run = _DenoisingRun(model, candidate_encoded, lengths, options, rows=(candidate << 32) | ids[sentence])
    tokens, scores = run.tokens()
    empty = _has_no_words(model, src_tokens)
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(len(src_tokens))]
    for row, owner in enumerate(sentence.tolist()):
        length = 0 if empty[owner] else int(lengths[row])
        keep = _words(model, tokens[row], length)
        past = [step[row][_words(model, step[row], length)] for step in run.history]
        hypotheses[owner].append(Hypothesis(tokens[row][keep], scores[row][keep], 0.0, past))
    return [_rank(group, options) for group in hypotheses]


def _candidates(model: ARDiffusion, encoded: Encoded, options: DecodeOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Target length, sentence index and candidate number of every row, each int64 ``[B * candidates]``."""
    batch, device = len(encoded.mask), encoded.mask.device
    if model.length_head is None:
        if options.length_beam > 1:
            raise ValueError("length_beam > 1 needs a model with length prediction, got one with length policy 'pad'")
        lengths = torch.full((batch, 1), model.config.target_length, device=device)
    else:
        logits = model.length_logits(encoded)
        logits[:, 0] = float("-inf")   # a sentence with words has a translation with words
        beam = min(options.length_beam, logits.size(1) - 1)
        lengths = logits.topk(beam, dim=1).indices
    per_sentence = lengths.repeat_interleave(options.noise_beam, dim=1)
    count = per_sentence.size(1)
    sentence = torch.arange(batch, device=device).repeat_interleave(count)
    return per_sentence.flatten(), sentence, torch.arange(count, device=device).repeat(batch)


class _DenoisingRun:
    """One pass of a solver over all candidates, and the tokens that come out."""

    def __init__(self, model: ARDiffusion, encoded: Encoded, lengths: Tensor, options: DecodeOptions,
                 rows: Tensor) -> None:
        self.model, self.encoded, self.lengths, self.options = model, encoded, lengths, options
        self.width = int(lengths.max())
        inside = torch.arange(self.width, device=lengths.device) < lengths[:, None]
        self.mask = inside if model.length_head is not None else None
        # Copies: ops.nearest keeps what it packed of a table, and optimisers write to parameters behind its back.
        self.table = model.embedding.table().clone()
        self.head_table = model.embedding.head_table().clone()
        self.x_self: Tensor | None = None
        self.history: list[Tensor] = []
        self.rows = rows

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """x0_hat ``[M, N, d]`` of the state ``x`` at timesteps ``t`` ``[M]`` or ``[M, N]``, rounded if so wanted."""
        t = t.expand(x.shape[:2]) if t.dim() == 2 else t.view(-1, 1).expand(x.shape[:2])
        x0_hat = self.model.denoise(x, t, self.encoded, self.mask, self.x_self, self.lengths)
        if self.options.rounding == "every":
            x0_hat = ops.nearest(x0_hat, self.table)[1]
        self.x_self = x0_hat
        if self.options.history:
            self.history.append(self._argmax(x0_hat))
        return x0_hat

    def _steps(self) -> StepList:
        """Per-token timesteps for a network that was trained on them, else one timestep per sentence."""
        o, c = self.options, self.model.config
        if c.timestep_sampler != "xy_uniform":
            return uniform_steps(c.diffusion_steps, o.steps, o.step_end)
        lengths = self.lengths if self.mask is not None else self.lengths[:1]
        return xy_steps(c.diffusion_steps, lengths, self.width, o.steps, c.anchor_scale, o.step_end)

    def _argmax(self, x: Tensor) -> Tensor:
        return ops.nearest(x, self.head_table, self.model.embedding.bias, metric="dot")[0]

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Token ids int64 ``[M, N]`` and their log probabilities float32 ``[M, N]``."""
        o, c = self.options, self.model.config
        seed = ops.draw_seed(o.seed)
        shape = (len(self.lengths), self.width, c.latent_dim)
        x = ops.philox_normal(shape, seed=seed, rows=self.rows, dtype=self.table.dtype, device=self.table.device)
        state, x0_hat = SOLVERS[o.solver](
            self.denoise, x, self._steps(), self.model.schedule, seed=seed, rows=self.rows)
        latent = x0_hat if o.final == "x0_hat" else state
        tokens = self._argmax(latent)
        loss = ops.linear_cross_entropy(
            latent.flatten(0, 1), self.head_table, self.model.embedding.bias, tokens.flatten())
        return tokens, -loss.view_as(tokens)


def _words(model: ARDiffusion, tokens: Tensor, length: int) -> Tensor:
    """Positions of the words of one row: within the length, before the first ``</s>``, not padding."""
    tokens = tokens[:length]
    keep = tokens.ne(model.config.pad) & tokens.eq(model.config.eos).cumsum(0).eq(0)
    return keep.nonzero().flatten()


def _has_no_words(model: ARDiffusion, src_tokens: Tensor) -> list[bool]:
    words = src_tokens.ne(model.config.pad) & src_tokens.ne(model.config.eos)
    return words.any(1).logical_not().tolist()


def _rank(group: list[Hypothesis], options: DecodeOptions) -> list[Hypothesis]:
    if len(group) == 1:
        scores = group[0].token_scores
        group[0].score = float(scores.mean()) if len(scores) else 0.0
        return group
    order, utilities = mbr_order([hypothesis.tokens.tolist() for hypothesis in group], options.mbr_direction)
    for hypothesis, utility in zip(group, utilities, strict=True):
        hypothesis.score = utility
    return [group[i] for i in order]
