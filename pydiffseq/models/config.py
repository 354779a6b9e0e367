"""Configuration of AR-Diffusion, with the checks of its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydiffseq.diffusion import SCHEDULES, TIMESTEP_SAMPLERS
from pydiffseq.nn.length import LENGTH_FEATURES

INJECTIONS = ("add", "txl", "rotary")
LENGTH_POLICIES = ("pad", "predict")
CE_TARGETS = ("x0", "pred")

CHOICES = {
    "noise_schedule": tuple(SCHEDULES), "timestep_sampler": tuple(TIMESTEP_SAMPLERS), "time_injection": INJECTIONS,
    "length_policy": LENGTH_POLICIES, "length_feature": LENGTH_FEATURES, "ce_on": CE_TARGETS,
}


def option(default: Any, help: str) -> Any:
    """A field whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class ARDiffusionConfig:
    """Sizes and options of AR-Diffusion; the defaults are the published IWSLT14 configuration (spec 2.9),
    but for the length policy: published is ``pad``, ``predict`` scores better at equal budget.

    ``vocabulary`` and ``source_vocabulary`` are sizes; the special ids follow fairseq's dictionary.

    Raises:
        ValueError: an unknown choice, a size or probability out of range, or options that do not go together.
    """

    vocabulary: int
    source_vocabulary: int
    pad: int = 1
    eos: int = 2
    latent_dim: int = option(64, "size of the latent token embeddings that are noised")
    time_dim: int = option(64, "size of the sinusoidal time features")
    hidden_dim: int = option(256, "width of encoder and decoder")
    ffn_dim: int = option(1024, "width of the encoder's feed-forward layers (the decoder's GEGLU has 4 x hidden_dim)")
    heads: int = option(4, "attention heads")
    encoder_layers: int = option(6, "encoder layers")
    decoder_layers: int = option(6, "decoder blocks")
    source_positions: int = option(256, "longest source, in tokens")
    target_length: int = option(90, "longest target, in tokens; with length_policy=pad every target has this length")
    dropout: float = option(0.2, "dropout probability")
    attention_dropout: float = option(0.1, "dropout probability on attention weights")
    diffusion_steps: int = option(2000, "diffusion steps T")
    noise_schedule: str = option("sqrt", "noise schedule")
    timestep_sampler: str = option("xy_uniform", "how training draws timesteps: xy_uniform (per token, AR-Diffusion), "
                                                 "uniform or lossaware (one per sentence)")
    anchor_scale: float = option(2.0, "anchor of the per-token timesteps, in units of the target length (> 0)")
    time_injection: str = option("txl", "how the timestep enters the decoder")
    length_policy: str = option("predict", "pad: </s> and padding are tokens of a fixed length (published); predict: a "
                                           "length head, padding masked")
    length_feature: str = option("mean_pool", "what the length head reads: mean_pool or token_embed (the first encoder "
                                              "state)")
    length_relative: bool = option(False, "add a learned bias on (target length - source length) to the length scores")
    self_conditioning: float = option(0.0, "probability of a first pass whose x0_hat is fed back (0: network without "
                                           "self-conditioning)")
    noise_factor: float = option(1.0, "F in x_t = sqrt(abar) x0 + sqrt(1 - abar) F eps while training (Difformer); 1 "
                                      "as published")
    embedding_norm: bool = option(False, "layer-norm each latent embedding, without affine parameters")
    scale_embedding: bool = option(False, "multiply latent embeddings by sqrt(latent_dim)")
    share_embeddings: bool = option(False, "the encoder reads the latent embeddings through a projection (joined "
                                           "dictionary)")
    clean_x0: bool = option(False, "no sqrt(1 - abar_0) noise on x0 (published: with noise)")
    ce_on: str = option("x0", "token cross-entropy on the noisy x0 (published) or on the prediction (anchor loss)")
    label_smoothing: float = option(0.0, "label smoothing of the token cross-entropy")
    encoder_pre_norm: bool = option(False, "pre-LN encoder with a final layer norm instead of the post-LN one")
    without_pooler: bool = option(False, "leave out BERT's pooler, whose output counts with weight zero as published")
    decoder_final_norm: bool = option(False, "layer norm after the last decoder block")

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("latent_dim", "time_dim", "hidden_dim", "ffn_dim", "heads", "encoder_layers", "decoder_layers",
                     "source_positions", "target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim must be a multiple of heads, got {self.hidden_dim} and {self.heads}")
        if self.time_injection == "rotary" and self.hidden_dim // self.heads % 2:
            raise ValueError(f"the rotary injection needs an even head size, got {self.hidden_dim // self.heads}")
        for name in ("anchor_scale", "noise_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("self_conditioning", "label_smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.diffusion_steps < 2:
            raise ValueError(f"diffusion_steps must be >= 2, got {self.diffusion_steps}")
        if self.share_embeddings and self.vocabulary != self.source_vocabulary:
            raise ValueError(
                "share_embeddings needs one joined dictionary, got "
                f"{self.source_vocabulary} source and {self.vocabulary} target entries")
