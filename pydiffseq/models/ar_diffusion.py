"""AR-Diffusion (Wu et al. 2023, arXiv 2305.09515): denoises target embeddings, one timestep per token."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.models.ar_diffusion_config import ARDiffusionConfig
from pydiffseq.models.base import DiffusionModel
from pydiffseq.models.losses import Losses
from pydiffseq.nn.attention import KeyValue
from pydiffseq.nn.encoder import Encoder
from pydiffseq.nn.length import LengthHead
from pydiffseq.nn.packing import Packing, packed, padded
from pydiffseq.nn.projection import Projection
from pydiffseq.nn.time import TimeFeatures, TimeMLP
from pydiffseq.nn.transformer import LN_EPS, DecoderBlock


class Encoded(NamedTuple):
    """What decoding needs of the source, computed once: keys and values per decoder layer, and what length needs."""

    states: Tensor            # [B, S, H]
    mask: Tensor              # bool [B, S]
    memory: list[KeyValue]    # one per decoder block
    base: Tensor | None = None   # [M, N, H], packed: [T, H]: what no step changes of the input of the candidates' decoder
    packing: Packing | None = None   # the real ones of the target tokens, if that saves work

    def select(self, index: Tensor) -> Encoded:
        """Rows ``index`` (int64 ``[M]``) of every part: repeats or drops sentences. It has to be prepared again."""
        memory = [KeyValue(kv.key[index], kv.value[index]) for kv in self.memory]
        return Encoded(self.states[index], self.mask[index], memory)


class Targets(NamedTuple):
    """What is denoised of a batch of targets."""

    tokens: Tensor    # int64 [B, N]
    mask: Tensor      # bool [B, N]: the positions that are denoised and scored
    lengths: Tensor   # int64 [B]


class ARDiffusion(DiffusionModel):
    """The network of AR-Diffusion and its training losses; every size and option is in ``config``.

    ``forward`` gives the losses of a batch; ``encode`` and ``denoise`` are what a solver needs.
    """

    config: ARDiffusionConfig

    def __init__(self, config: ARDiffusionConfig) -> None:
        super().__init__(config)
        c = config
        if c.share_embeddings:
            self.source_projection = nn.Linear(c.latent_dim, c.hidden_dim)
        else:
            self.source_embedding = nn.Embedding(c.source_vocabulary, c.hidden_dim, padding_idx=c.pad)
            nn.init.normal_(self.source_embedding.weight, std=0.02)
        self.encoder = Encoder(c.hidden_dim, c.heads, c.ffn_dim, c.encoder_layers, c.source_positions, c.dropout,
                               c.attention_dropout, pre_norm=c.encoder_pre_norm, pooler=not c.without_pooler)

        input_dim = c.latent_dim * (2 if c.self_conditioning else 1)
        self.input_up = Projection(input_dim, 2 * c.hidden_dim, c.hidden_dim)
        self.output_down = Projection(c.hidden_dim, 2 * c.hidden_dim, c.latent_dim)
        # As in the official code, the decoder's position table has as many rows as the encoder's.
        self.positions = nn.Embedding(max(c.source_positions, c.target_length), c.hidden_dim)
        self.input_norm = nn.LayerNorm(c.hidden_dim, LN_EPS)
        self.time_features = TimeFeatures(c.diffusion_steps, c.time_dim)
        self.time_mlp = TimeMLP(c.time_dim, c.hidden_dim) if c.time_injection == "add" else None
        self.blocks = nn.ModuleList(
            DecoderBlock(c.hidden_dim, c.heads, c.hidden_dim * 4, c.dropout, c.attention_dropout,
                         time_dim=c.time_dim, injection=c.time_injection)
            for _ in range(c.decoder_layers))
        self.final_norm = nn.LayerNorm(c.hidden_dim, LN_EPS) if c.decoder_final_norm else None
        self.length_head = (LengthHead(c.hidden_dim, c.target_length, c.length_feature,
                                       relative=c.length_relative) if c.length_policy == "predict" else None)

    # --- the network ---

    def encode(self, src_tokens: Tensor) -> Encoded:
        """Source ids int64 ``[B, S]`` (padded with ``config.pad`` on either side) -> :class:`Encoded`.

        Raises:
            ValueError: a source has more than ``config.source_positions`` tokens.
        """
        mask = src_tokens.ne(self.config.pad)
        if self.config.share_embeddings:
            words = self.source_projection(nn.functional.embedding(src_tokens, self.embedding.table()))
        else:
            words = self.source_embedding(src_tokens)
        states = self.encoder(words, mask)
        memory = [cast(DecoderBlock, block).cross_attention.project(states) for block in self.blocks]
        return Encoded(states, mask, memory)

    def prepare(self, encoded: Encoded, mask: Tensor | None, lengths: Tensor, width: int) -> Encoded:
        """``encoded`` with what all denoising steps of M candidates share; arguments as of :meth:`denoise`."""
        packing, base = Packing.of(mask), self._base(lengths, width).expand(len(lengths), -1, -1)
        if packing is not None:
            sources = Packing.always(encoded.mask)
            encoded = encoded._replace(memory=[kv.pack(sources) for kv in encoded.memory])
        return encoded._replace(base=packed(base, packing).contiguous(), packing=packing)

    def _base(self, lengths: Tensor | None, width: int) -> Tensor:
        """Embeddings of the positions and the target length, ``[M or 1, width, H]``."""
        base = self.positions.weight[:width][None]
        return base if self.length_head is None else base + self.length_head.table(lengths)[:, None]

    def denoise(self, x_t: Tensor, timesteps: Tensor, encoded: Encoded, mask: Tensor | None,
                x_self: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Predict x0 from x_t: ``[M, N, d] -> [M, N, d]``; M = B x candidates, ``encoded`` having B sentences.

        The candidates of a sentence are consecutive rows and read its one encoding, which is not copied.

        Args:
            timesteps: int64 ``[M, N]`` in 0..T-1.
            mask: bool ``[M, N]``, True = real position; ``None`` attends to all.
            x_self: the previous x0_hat for self-conditioning, zeros when ``None``; ignored by a network without it.
            lengths: int64 ``[M]``, needed with length prediction.
        """
        c = self.config
        if c.self_conditioning:
            x_t = torch.cat([torch.zeros_like(x_t) if x_self is None else x_self, x_t], dim=-1)
        packing, base = encoded.packing, self._base(lengths, x_t.size(1)) if encoded.base is None else encoded.base
        h = self.input_up(packed(x_t, packing), base)
        time = self.time_features(timesteps, h.dtype)
        if self.time_mlp is not None:
            h = h + packed(self.time_mlp(time), packing)
        h = ops.dropout(self.input_norm(h), c.dropout, training=self.training)
        for block, source in zip(self.blocks, encoded.memory, strict=True):
            h = block(h, mask, source, encoded.mask, time, packing)
        return padded(self.output_down(h if self.final_norm is None else self.final_norm(h)), packing)

    def fixed_lengths(self, encoded: Encoded) -> Tensor:
        """With the ``pad`` policy, the length of each target with its padding: int64 ``[B]``."""
        return torch.full((len(encoded.mask),), self.config.target_length, device=encoded.mask.device)

    def length_logits(self, encoded: Encoded) -> Tensor:
        """Scores of target lengths 0..target_length, float32 ``[B, target_length + 1]``.

        Raises:
            ValueError: the model predicts no lengths.
        """
        if self.length_head is None:
            raise ValueError("length scores need a model with length_policy 'predict', got 'pad'")
        return self.length_head(encoded.states, encoded.mask)

    # --- training ---

    def layout(self, target: Tensor) -> Targets:
        """The tokens to denoise, from fairseq targets int64 ``[B, M]`` (with ``</s>``, padded on the right).

        ``pad``: exactly ``target_length`` tokens; ``</s>`` and padding are ordinary tokens that the network must
        produce. ``predict``: the words alone; ``</s>`` is dropped, since the length head says where the end is.
        """
        c = self.config
        if c.length_policy == "pad":
            tokens = nn.functional.pad(target, (0, max(0, c.target_length - target.size(1))), value=c.pad)
            tokens = tokens[:, : c.target_length].contiguous()
            lengths = torch.full((len(tokens),), tokens.size(1), device=tokens.device)
            return Targets(tokens, torch.ones_like(tokens, dtype=torch.bool), lengths)
        lengths = (target.ne(c.pad) & target.ne(c.eos)).sum(1)
        width = max(1, min(target.size(1) - 1, c.target_length))
        tokens = target[:, :width].masked_fill(target[:, :width].eq(c.eos), c.pad)
        lengths = lengths.clamp_max(width)
        return Targets(tokens, torch.arange(width, device=target.device) < lengths[:, None], lengths)

    def forward(self, src_tokens: Tensor, target: Tensor, ids: Tensor | None = None,
                seed: int | Tensor | None = None) -> Losses:
        """Losses of a batch: sources int64 ``[B, S]``, targets int64 ``[B, M]`` (see :meth:`layout`).

        ``ids``: int64 ``[B]`` sentence numbers. Timesteps and noise depend on ``seed`` and the sentence's id alone, so
        a batch that is split over processes sees the same noise. ``seed`` is drawn from torch's generator when
        ``None``. In training mode a timestep sampler that learns is told the losses.
        """
        c = self.config
        seed = ops.draw_seed(seed)
        targets = self.layout(target)
        rows = torch.arange(len(target), device=target.device) if ids is None else ids
        timesteps, weights = self.draw_timesteps(targets.lengths, targets.tokens.size(1), seed, rows)
        batch = self.corrupt(targets.tokens, timesteps, weights, seed, rows)
        encoded = self.encode(src_tokens)
        mask = targets.mask if c.length_policy == "predict" else None
        x0_hat = self.predict(
            lambda x_self: self.denoise(batch.x_t, timesteps, encoded, mask, x_self, targets.lengths), seed)
        losses = self.score(batch, x0_hat, targets.tokens, targets.mask)
        if self.length_head is not None:
            losses.per_sentence["length"] = nn.functional.cross_entropy(
                self.length_logits(encoded), targets.lengths, reduction="none")
        return losses
