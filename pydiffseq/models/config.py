"""What the configurations of all models share: sizes and options, with the checks of their values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pydiffseq.diffusion import SCHEDULES, TIMESTEP_SAMPLERS
from pydiffseq.nn.length import LENGTH_FEATURES

INJECTIONS = ("add", "txl", "rotary")
LENGTH_POLICIES = ("pad", "predict")
CE_TARGETS = ("x0", "pred")
LOSS_SCOPES = ("all", "target", "nonpad")
LOGITS = ("dot", "distance")
POSITION_STARTS = ("random", "sinusoidal")

# Every option of any model whose value is one of a few names.
CHOICES = {
    "noise_schedule": tuple(SCHEDULES), "timestep_sampler": tuple(TIMESTEP_SAMPLERS), "time_injection": INJECTIONS,
    "length_policy": LENGTH_POLICIES, "length_feature": LENGTH_FEATURES, "ce_on": CE_TARGETS,
    "loss_scope": LOSS_SCOPES, "logits": LOGITS, "position_start": POSITION_STARTS,
}


def option(default: Any, help: str) -> Any:
    """A field whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


def changed(base: type, name: str, default: Any) -> Any:
    """The option ``name`` of ``base`` with another default and the same help text."""
    inherited = next(f for f in dataclasses.fields(base) if f.name == name)
    return option(default, inherited.metadata["help"])


@dataclass
class ModelConfig:
    """Sizes and options that every model has.

    ``vocabulary`` and ``source_vocabulary`` are sizes (0: one dictionary for both); the special ids follow fairseq's
    dictionary.

    Raises:
        ValueError: an unknown choice, or a size or probability out of range.
    """

    vocabulary: int
    source_vocabulary: int = 0
    pad: int = 1
    eos: int = 2
    bos: int = 0
    latent_dim: int = option(64, "size of the latent token embeddings that are noised")
    time_dim: int = option(64, "size of the sinusoidal time features")
    hidden_dim: int = option(256, "width of the network")
    ffn_dim: int = option(1024, "width of the feed-forward layers (of the encoder; AR-Diffusion's GEGLU has "
                                "4 x hidden_dim)")
    heads: int = option(4, "attention heads")
    encoder_layers: int = option(6, "encoder layers")
    dropout: float = option(0.1, "dropout probability")
    attention_dropout: float = option(0.1, "dropout probability on attention weights")
    diffusion_steps: int = option(2000, "diffusion steps T")
    noise_schedule: str = option("sqrt", "noise schedule")
    timestep_sampler: str = option("xy_uniform", "how training draws timesteps: xy_uniform (per token, AR-Diffusion), "
                                                 "rolling (per token, a ramp that moves across the sentence), uniform or "
                                                 "lossaware (one per sentence)")
    anchor_scale: float = option(2.0, "anchor of the per-token timesteps, with rolling the width of the ramp, in units of "
                                      "the target length (> 0)")
    length_policy: str = option("predict", "pad: </s> and padding are tokens of a fixed length (published); predict: a "
                                           "length head, padding masked")
    length_feature: str = option("mean_pool", "what the length head reads of the source: mean_pool or token_embed (the "
                                              "first token's state)")
    length_relative: bool = option(False, "add a learned bias on (target length - source length) to the length scores")
    self_conditioning: float = option(0.0, "probability of a first pass whose x0_hat is fed back (0: network without "
                                           "self-conditioning)")
    noise_factor: float = option(1.0, "F in x_t = sqrt(abar) x0 + sqrt(1 - abar) F eps while training (Difformer); 1 "
                                      "as published")
    embedding_norm: bool = option(False, "layer-norm each latent embedding, without affine parameters")
    scale_embedding: bool = option(False, "multiply latent embeddings by sqrt(latent_dim)")
    clean_x0: bool = option(False, "no sqrt(1 - abar_0) noise on x0 (published: with noise)")
    ce_on: str = option("x0", "token cross-entropy on the noisy x0 (published) or on the prediction (anchor loss)")
    label_smoothing: float = option(0.0, "label smoothing of the token cross-entropy")
    encoder_pre_norm: bool = option(False, "pre-LN encoder with a final layer norm instead of the post-LN one")

    def __post_init__(self) -> None:
        self.source_vocabulary = self.source_vocabulary or self.vocabulary
        for name, accepted in CHOICES.items():
            if getattr(self, name, accepted[0]) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in self.sizes():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim must be a multiple of heads, got {self.hidden_dim} and {self.heads}")
        for name in ("anchor_scale", "noise_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("self_conditioning", "label_smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.diffusion_steps < 2:
            raise ValueError(f"diffusion_steps must be >= 2, got {self.diffusion_steps}")

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Names of the options that must be at least 1."""
        return ("latent_dim", "time_dim", "hidden_dim", "ffn_dim", "heads", "encoder_layers")

    @property
    def joined_dictionary(self) -> bool:
        """Whether source and target must be written in one dictionary."""
        return False

    def check_joined(self, who: str) -> None:
        """Raise ``ValueError`` unless both dictionaries have one size."""
        if self.vocabulary != self.source_vocabulary:
            raise ValueError(f"{who} needs one joined dictionary, got {self.source_vocabulary} source and "
                             f"{self.vocabulary} target entries")
