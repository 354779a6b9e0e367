"""What the training of every model shares: timesteps, corruption, self-conditioning, losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.diffusion import TOKEN_SAMPLERS, make_schedule, make_timestep_sampler
from pydiffseq.diffusion.noise import to_uniform
from pydiffseq.models.config import ModelConfig
from pydiffseq.models.losses import Losses
from pydiffseq.models.sampler_state import SamplerState
from pydiffseq.nn.embedding import LatentEmbedding
from pydiffseq.nn.length import LengthHead


class Corrupted(NamedTuple):
    """A noised batch: what the network reads, and what it should say."""

    clean: Tensor        # Emb(w), [B, N, d]
    x0: Tensor           # with the noise sqrt(1 - abar_0), unless the config says clean_x0
    x_t: Tensor
    timesteps: Tensor    # int64 [B, N]
    weights: Tensor      # float32 [B]: of each sentence's loss


class DiffusionModel(nn.Module):
    """The latent table, the noise and the losses; a subclass adds the network and says what is noised and scored."""

    config: ModelConfig
    length_head: LengthHead | None
    absorbing: nn.Parameter | None   # [d]: what noise drifts to (DiffuSeq-v2); None: 0

    def __init__(self, config: ModelConfig, *, distance_logits: bool = False) -> None:
        super().__init__()
        self.config = c = config
        self.register_parameter("absorbing", None)
        self.schedule = make_schedule(c.noise_schedule, c.diffusion_steps)
        self.sigma0, self.abar_end = float(self.schedule.sigma[0]), float(self.schedule.abar[-1])
        self.sampler = make_timestep_sampler(c.timestep_sampler, c.diffusion_steps, c.anchor_scale)
        self.per_token_times = c.timestep_sampler in TOKEN_SAMPLERS
        self.sampler_state = SamplerState(self.sampler) if self.sampler.state_dict() else None
        # The table is created before any other parameter; a padding row exists only where padding is never a target.
        self.embedding = LatentEmbedding(
            c.vocabulary, c.latent_dim, norm=c.embedding_norm, scale=c.scale_embedding, distance=distance_logits,
            padding_idx=c.pad if c.length_policy == "predict" else None)

    def draw_timesteps(self, lengths: Tensor, width: int, seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps int64 ``[B, width]`` of targets of ``lengths`` int64 ``[B]``, and weights float32 ``[B]``."""
        timesteps, weights = self.sampler.sample(lengths, width, uniform=sentence_uniform(seed, rows))
        if timesteps.dim() == 1:
            timesteps = timesteps[:, None].expand(-1, width).contiguous()
        return timesteps, weights

    def corrupt(self, tokens: Tensor, timesteps: Tensor, weights: Tensor, seed: Tensor, rows: Tensor,
                noised: Tensor | None = None, gone: Tensor | None = None) -> Corrupted:
        """Noise the embeddings of ``tokens`` int64 ``[B, N]``; where ``noised`` (bool) is False, x_t is x0.

        With an absorbing vector m (DiffuSeq-v2, spec 1.11) ``x_t = sqrt(abar) (x0 - m) + sqrt(1 - abar) eps + m``, and m
        alone where ``gone`` (bool) is True.
        """
        c = self.config
        # Not buffers: a cast of the model to bfloat16 would round the tables.
        self.schedule = schedule = self.schedule.to(tokens.device)
        table = self.embedding.table()
        x0, x_t = ops.embed_q_sample(
            table, tokens, timesteps, schedule.signal, schedule.sigma * c.noise_factor,
            sigma0=0.0 if c.clean_x0 else self.sigma0, mask=noised, seed=seed, rows=rows,
            absorbing=None if self.absorbing is None else self.absorbing.to(table.dtype), gone=gone)
        clean = x0 if c.clean_x0 else nn.functional.embedding(tokens, table)
        return Corrupted(clean, x0, x_t, timesteps, weights)

    def predict(self, denoise: Callable[[Tensor | None], Tensor], seed: Tensor) -> Tensor:
        """``denoise(x_self)``, with a share of the batches self-conditioned on a first pass without gradients."""
        x_self = None
        if self.config.self_conditioning and self._flip_coin(seed):
            with torch.no_grad():
                x_self = denoise(None)
        return denoise(x_self)

    def _flip_coin(self, seed: Tensor) -> bool:
        """Whether this batch is self-conditioned: a function of the seed, so every process decides alike."""
        return (int(seed) * 2654435761 >> 16) % 65536 < self.config.self_conditioning * 65536

    def score(self, batch: Corrupted, x0_hat: Tensor, tokens: Tensor, mask: Tensor) -> Losses:
        """The per-token terms: mse (against Emb(w) where t = 0), token cross-entropy, prior (Diffusion-LM's L_T).

        ``mask``: bool ``[B, N]``, the positions that are scored. In training mode a timestep sampler that learns is
        told the losses.
        """
        c = self.config
        goal = batch.x0
        if not c.clean_x0:
            goal = torch.where(batch.timesteps.eq(0)[..., None], batch.clean, batch.x0)
        nll = self.embedding.nll(batch.x0 if c.ce_on == "x0" else x0_hat, tokens.masked_fill(~mask, -100),
                                 label_smoothing=c.label_smoothing)
        keep = mask.float() * batch.weights[:, None]
        per_token = {"mse": (goal.float() - x0_hat.float()).square().mean(-1) * keep, "nll": nll * keep}
        if not c.clean_x0:   # without x0 noise on a normalised table the term is a constant
            per_token["prior"] = batch.x0.float().square().mean(-1) * self.abar_end * keep
        losses = Losses(per_token, mask, batch.timesteps, c.diffusion_steps)
        if self.sampler_state is not None and self.training:
            tell_sampler(self.sampler_state, losses, batch.weights)
        return losses


def tell_sampler(state: SamplerState, losses: Losses, weights: Tensor) -> None:
    """Each sentence's loss, as DiffuSeq's sampler wants it: the sum of the terms, unweighted, mean over tokens."""
    tokens = losses.mask.sum(1)
    terms = torch.stack([value.detach().sum(1) for value in losses.per_token.values()])
    told = tokens > 0
    state.update(losses.timesteps[told, 0], (terms.sum(0) / (weights * tokens))[told])


def sentence_uniform(seed: int | Tensor, rows: Tensor) -> Tensor:
    """One uniform number per sentence in [0, 1), float32 ``[B]``: a function of the seed and the sentence's id."""
    return to_uniform(ops.philox_normal((len(rows), 1, 1), seed=seed, rows=rows, device=rows.device).flatten())


def token_uniform(seed: int | Tensor | None, rows: Tensor, width: int, step: int) -> Tensor:
    """One uniform number per token in [0, 1), float32 ``[B, width]``; ``step`` as in :func:`pydiffseq.ops.philox_normal`.

    The stream is that of the noise a sampler starts from and of :func:`sentence_uniform`, which have step 0.
    """
    shape = (len(rows), width, 1)
    return to_uniform(ops.philox_normal(shape, seed=seed, step=step, rows=rows, device=rows.device))[..., 0]
