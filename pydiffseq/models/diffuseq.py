"""DiffuSeq (Gong et al. 2023, arXiv 2210.08933): one encoder over source and target, of which the target is noised."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.models.base import DiffusionModel, token_uniform
from pydiffseq.models.diffuseq_config import DiffuSeqConfig
from pydiffseq.models.losses import Losses
from pydiffseq.models.sequence import Part, framed, splice, splice_index, trimmed_lengths, words_of
from pydiffseq.nn.length import LengthHead
from pydiffseq.nn.projection import Projection
from pydiffseq.nn.time import TimeFeatures, TimeMLP, sinusoids
from pydiffseq.nn.transformer import LN_EPS, EncoderLayer


class Prompt(NamedTuple):
    """What decoding needs of the source: its clean embeddings, with the separators, on the left of each row."""

    words: Tensor     # [B, S, d]
    mask: Tensor      # bool [B, S]
    lengths: Tensor   # int64 [B]

    def select(self, index: Tensor) -> Prompt:
        """Rows ``index`` (int64 ``[M]``) of every part: repeats or drops sentences."""
        return Prompt(self.words[index], self.mask[index], self.lengths[index])


class Placed(NamedTuple):
    """A prompt laid out for the M candidates of its sentences: what no denoising step changes."""

    words: Tensor         # [M, S, d]
    origin: Tensor        # int64 [M, L]: where a column comes from, the words or the target behind them
    columns: Tensor       # int64 [M, L]: the target position whose timestep a column has
    target: Tensor        # int64 [M, N]: the columns of the target
    noised: Tensor        # bool [M, L]
    real: Tensor | None   # bool [M, L]: what attention sees; None: all
    base: Tensor          # [M, L, H]: embeddings of the positions and of the target length


class Sequences(NamedTuple):
    """A batch in DiffuSeq's layout."""

    tokens: Tensor          # int64 [B, L]
    noised: Tensor          # bool [B, L]: the target part and everything behind it
    real: Tensor | None     # bool [B, L]: what attention sees; None: all
    scored: Tensor          # bool [B, L]
    source: Part            # separators included
    lengths: Tensor         # int64 [B], of the target part


class DiffuSeq(DiffusionModel):
    """DiffuSeq's network and its training losses; every size and option is in ``config``.

    The sequence is, with ``length_policy="pad"``, ``<s> source </s> </s> <s> target </s> <pad> ..`` of exactly
    ``sequence_length`` tokens (spec 1.1; padding is attended to and generated as any token), with ``"predict"``
    ``source </s> target``, whose target length a length head predicts.

    ``forward`` gives the losses of a batch; ``encode`` and ``denoise`` are what a solver needs.
    """

    config: DiffuSeqConfig

    def __init__(self, config: DiffuSeqConfig) -> None:
        super().__init__(config, distance_logits=config.logits == "distance")
        c = config
        hidden, input_dim = c.hidden_dim, c.latent_dim * (2 if c.self_conditioning else 1)
        self.input_up = Projection(input_dim, hidden, hidden) if input_dim != hidden else nn.Identity()
        self.output_down = Projection(hidden, hidden, c.latent_dim) if c.latent_dim != hidden else nn.Identity()
        self.positions = nn.Embedding(c.positions, hidden)
        if c.position_start == "sinusoidal":
            self.positions.weight.data = sinusoids(torch.arange(c.positions, dtype=torch.float64), hidden)
        self.time_features = TimeFeatures(c.diffusion_steps, c.time_dim)
        self.time_mlp = TimeMLP(c.time_dim, hidden)
        self.input_norm = nn.LayerNorm(hidden, LN_EPS)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden, c.heads, c.ffn_dim, c.dropout, c.attention_dropout, pre_norm=c.encoder_pre_norm)
            for _ in range(c.encoder_layers))
        self.final_norm = nn.LayerNorm(hidden, LN_EPS) if c.encoder_pre_norm else None
        self.length_head = (LengthHead(hidden, c.sequence_length, c.length_feature, relative=c.length_relative)
                            if c.length_policy == "predict" else None)
        if c.soft_absorb:
            self.absorbing = nn.Parameter(torch.randn(c.latent_dim) * c.latent_dim ** -0.5)

    # --- the network ---

    def encode(self, src_tokens: Tensor) -> Prompt:
        """Source ids int64 ``[B, S]`` (padded with ``config.pad`` on either side) -> :class:`Prompt`.

        A source leaves a quarter of ``sequence_length`` to the target; what is longer is cut at its end.
        """
        words = words_of(src_tokens, self._specials())
        return self._prompt(self._source_part(words._replace(lengths=words.lengths.clamp_max(self.longest_source()))))

    def _prompt(self, source: Part) -> Prompt:
        mask = torch.arange(source.tokens.size(1), device=source.tokens.device) < source.lengths[:, None]
        return Prompt(nn.functional.embedding(source.tokens, self.embedding.table()), mask, source.lengths)

    def denoise(self, x_t: Tensor, timesteps: Tensor, encoded: Prompt | Placed, mask: Tensor | None = None,
                x_self: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Predict x0 of the target part from x_t: ``[M, N, d] -> [M, N, d]``; M = B x candidates, side by side.

        Args:
            timesteps: int64 ``[M, N]`` in 0..T-1; source positions have the first target position's.
            encoded: of B sentences.
            mask: not read; ``lengths`` say it.
            x_self: the previous x0_hat for self-conditioning, zeros when ``None``; ignored by a network without it.
            lengths: int64 ``[M]``, of the target parts; ``None``: N.

        Raises:
            ValueError: source and target together have more tokens than there are positions.
        """
        if not isinstance(encoded, Placed):
            width = x_t.size(1)
            whole = torch.full((len(x_t),), width, device=x_t.device) if lengths is None else lengths
            encoded = self.prepare(encoded, mask, whole, width)
        p = encoded

        def in_sequence(target: Tensor) -> Tensor:
            return take(torch.cat([p.words.to(target.dtype), target], 1), p.origin)

        timesteps = take(timesteps, p.columns) if self.per_token_times else timesteps[:, :1]
        states = self.states(in_sequence(x_t), timesteps, p.noised, p.real,
                             None if x_self is None else in_sequence(x_self), p.base)
        return self.output_down(take(states, p.target))

    def prepare(self, encoded: Prompt, mask: Tensor | None, lengths: Tensor, width: int) -> Placed:
        """Where the parts of M candidates lie; arguments as of :meth:`denoise`.

        Raises:
            ValueError: source and target together have more tokens than there are positions.
        """
        if len(lengths) != len(encoded.lengths):
            each = len(lengths) // len(encoded.lengths)
            encoded = encoded.select(torch.arange(len(lengths), device=lengths.device) // each)
        start, source_width = encoded.lengths[:, None], encoded.words.size(1)
        ends, bound = start + lengths[:, None], min(source_width + width, self.config.positions)
        longest = int(ends.max()) if readable(ends) else bound
        column = torch.arange(longest, device=lengths.device)
        noised = column >= start
        # With the pad policy all rows end with the last column, unless there are more than needed.
        real = column < ends if self.length_head is not None or not readable(ends) else None
        target = (start + torch.arange(width, device=lengths.device)).clamp_max(longest - 1)
        return Placed(encoded.words, splice_index(encoded.lengths, source_width, width, longest),
                      (column - start).clamp(0, width - 1), target, noised, real,
                      self._base(noised, lengths).expand(len(lengths), -1, -1).contiguous())

    def _base(self, noised: Tensor, lengths: Tensor) -> Tensor:
        """``[B or 1, L, H]`` for ``noised`` bool ``[B, L]``.

        Raises:
            ValueError: the sequences have more tokens than there are positions.
        """
        length = noised.size(1)
        if length > self.config.positions:
            raise ValueError(f"source and target together must have at most {self.config.positions} tokens (positions), "
                             f"got {length}")
        base = self.positions.weight[:length][None]
        if self.length_head is None:
            return base
        return base + self.length_head.table(lengths)[:, None] * noised[..., None]

    def states(self, x: Tensor, timesteps: Tensor, noised: Tensor, real: Tensor | None, x_self: Tensor | None,
               base: Tensor) -> Tensor:
        """States ``[B, L, H]`` of whole sequences ``x`` ``[B, L, d]`` (spec 1.2).

        ``timesteps``: int64 ``[B, L]`` or ``[B, 1]``. ``noised``, ``real``: bool ``[B, L]``, see :class:`Sequences`.
        ``base``: see :class:`Placed`. In self-conditioning the source is known.
        """
        x = self._with_self(x, noised, x_self)
        if not self.per_token_times:
            timesteps = timesteps[:, :1]   # one for the sentence, so the same for all its tokens
        h = x + base if isinstance(self.input_up, nn.Identity) else self.input_up(x, base)
        h = h + self.time_mlp(self.time_features(timesteps, x.dtype))
        h = self.input_norm(h)
        if self.config.positions_after_norm:
            h = h + base.to(h.dtype)
        h = ops.dropout(h, self.config.dropout, training=self.training)
        for layer in self.layers:
            h = layer(h, real)
        return h if self.final_norm is None else self.final_norm(h)

    def _with_self(self, x: Tensor, noised: Tensor, x_self: Tensor | None) -> Tensor:
        """``x`` with what is known of x0 before it: the source itself, and the target's earlier prediction."""
        if not self.config.self_conditioning:
            return x
        known = torch.zeros_like(x) if x_self is None else x_self
        return torch.cat([torch.where(noised[..., None], known, x), x], dim=-1)

    def fixed_lengths(self, encoded: Prompt) -> Tensor:
        """With the ``pad`` policy, the length of each target part with its padding: int64 ``[B]``."""
        return self.config.sequence_length - encoded.lengths

    def length_logits(self, encoded: Prompt) -> Tensor:
        """Scores of target lengths 0..sequence_length, float32; minus infinity where the sequence would be too long.

        The head reads the source's embedded tokens, not the states of the network, which depend on the target.

        Raises:
            ValueError: the model predicts no lengths.
        """
        if self.length_head is None:
            raise ValueError("length scores need a model with length_policy 'predict', got 'pad'")
        words = encoded.words
        nothing_noised = torch.zeros_like(encoded.mask)
        h = self.input_up(self._with_self(words, nothing_noised, None)) + self.positions.weight[: words.size(1)]
        logits = self.length_head(self.input_norm(h), encoded.mask)
        room = self.config.sequence_length - encoded.lengths
        too_long = torch.arange(logits.size(1), device=room.device) > room[:, None]
        return logits.masked_fill(too_long, float("-inf"))

    # --- layout ---

    def _specials(self) -> tuple[int, ...]:
        return self.config.pad, self.config.eos, self.config.bos

    def _source_part(self, words: Part) -> Part:
        c = self.config
        if c.length_policy == "pad":   # the last </s> is the separator
            return framed((c.bos,), words, (c.eos, c.eos), c.pad)
        return framed((), words, (c.eos,), c.pad)

    def longest_source(self) -> int:
        """The most words a source may have when the target is not known."""
        length = self.config.sequence_length
        return length - length // 4 - (3 if self.config.length_policy == "pad" else 1)

    def longest_pair(self) -> int:
        """The most words that source and target may have together; longer pairs are trimmed (spec 1.1)."""
        return self.config.sequence_length - (5 if self.config.length_policy == "pad" else 1)

    def layout(self, src_tokens: Tensor, target: Tensor) -> Sequences:
        """The sequences of fairseq sources int64 ``[B, S]`` and targets int64 ``[B, M]``, padded on either side."""
        c = self.config
        padded = c.length_policy == "pad"
        source, answer = words_of(src_tokens, self._specials()), words_of(target, self._specials())
        # With the pad policy DiffuSeq trims while both sides still have their <s>.
        starts = 1 if padded else 0
        kept = trimmed_lengths(source.lengths + starts, answer.lengths + starts, self.longest_pair() + 2 * starts)
        source, answer = source._replace(lengths=kept[0] - starts), answer._replace(lengths=kept[1] - starts)
        first = self._source_part(source)
        second = framed((c.bos,), answer, (c.eos,), c.pad) if padded else answer
        width = c.sequence_length if padded else max(1, int((first.lengths + second.lengths).max()))
        tokens, ends = splice(first, second, width, c.pad)
        column = torch.arange(width, device=tokens.device)
        noised, written = column >= first.lengths[:, None], column < ends[:, None]
        scored = {"all": torch.ones_like(noised) if padded else written, "target": noised if padded else noised & written,
                  "nonpad": noised & written}[c.loss_scope]
        return Sequences(tokens, noised, None if padded else written, scored, first,
                         width - first.lengths if padded else second.lengths)

    # --- training ---

    def forward(self, src_tokens: Tensor, target: Tensor, ids: Tensor | None = None,
                seed: int | Tensor | None = None) -> Losses:
        """Losses of a batch: sources int64 ``[B, S]``, targets int64 ``[B, M]`` (see :meth:`layout`), spec 1.4, 1.5.

        ``ids``: int64 ``[B]`` sentence numbers. Timesteps and noise depend on ``seed`` and the sentence's id alone, so
        a batch that is split over processes sees the same noise. ``seed`` is drawn from torch's generator when
        ``None``. In training mode a timestep sampler that learns is told the losses.
        """
        c = self.config
        seed = ops.draw_seed(seed)
        batch = self.layout(src_tokens, target)
        rows = torch.arange(len(target), device=target.device) if ids is None else ids
        width = batch.tokens.size(1)
        timesteps, weights = self.draw_timesteps(batch.lengths, width, seed, rows)
        column = torch.arange(width, device=target.device)
        timesteps = take(timesteps, (column - batch.source.lengths[:, None]).clamp_min(0))
        gone = self._gone(timesteps, batch.noised, seed, rows)
        noisy = self.corrupt(batch.tokens, timesteps, weights, seed, rows, batch.noised, gone)
        if c.clean_source:
            noisy = noisy._replace(x0=torch.where(batch.noised[..., None], noisy.x0, noisy.clean),
                                   x_t=torch.where(batch.noised[..., None], noisy.x_t, noisy.clean))

        base = self._base(batch.noised, batch.lengths)

        def denoise(x_self: Tensor | None) -> Tensor:
            return self.output_down(self.states(noisy.x_t, timesteps, batch.noised, batch.real, x_self, base))

        losses = self.score(noisy, self.predict(denoise, seed), batch.tokens, batch.scored)
        if self.length_head is not None:
            losses.per_sentence["length"] = nn.functional.cross_entropy(
                self.length_logits(self._prompt(batch.source)), batch.lengths, reduction="none")
        if self.absorbing is not None:
            losses.per_sentence["absorbing"] = self.absorbing.float().norm().expand(len(target))
        return losses

    def _gone(self, timesteps: Tensor, noised: Tensor, seed: Tensor, rows: Tensor) -> Tensor | None:
        """Which tokens, bool ``[B, N]``, are the absorbing vector: ``discrete_noise sqrt(1 - abar)`` of the target."""
        if self.absorbing is None or not self.config.discrete_noise:
            return None
        sigma = self.schedule.to(timesteps.device).sigma[timesteps]
        return noised & (token_uniform(seed, rows, noised.size(1), step=1) < self.config.discrete_noise * sigma)


def readable(x: Tensor) -> bool:
    """Whether a value of ``x`` can be read without waiting for a device; else a bound serves, with some padding."""
    return x.device.type == "cpu"


def take(x: Tensor, index: Tensor) -> Tensor:
    """Columns ``index`` (int64 ``[B, M]``) of each row of ``x`` ``[B, N]`` or ``[B, N, d]``."""
    return x.gather(1, index) if x.dim() == 2 else x.gather(1, index[..., None].expand(-1, -1, x.size(2)))
