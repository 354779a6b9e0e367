"""Configuration of DiffuSeq."""

from __future__ import annotations

from dataclasses import dataclass

from pydiffseq.models.config import ModelConfig, changed, option


@dataclass
class DiffuSeqConfig(ModelConfig):
    """Sizes and options of DiffuSeq; the defaults are the published base configuration (spec 1.2, 1.7).

    Raises:
        ValueError: an unknown choice, a size or probability out of range, or options that do not go together.
    """

    sequence_length: int = option(128, "most tokens of source, separators and target together; with length_policy=pad "
                                       "every sequence has this length")
    positions: int = option(512, "rows of the position table, at least sequence_length")
    position_start: str = option("random", "what the position table starts as: random (published) or sinusoidal, from "
                                           "which attention to a neighbour is learned sooner")
    positions_after_norm: bool = option(False, "add the positions (and the embedding of the target length) again behind "
                                               "the layer norm of the input, before which the time embedding grows to "
                                               "many times their size")
    loss_scope: str = option("all", "positions that are scored: all (source and padding too, as published), target "
                                    "(with its padding) or nonpad (the target's tokens)")
    clean_source: bool = option(False, "no sqrt(1 - abar_0) noise on the source's embeddings in training (published: "
                                       "with noise, which decoding never has)")
    logits: str = option("dot", "token scores: dot product with the embedding plus a bias (published), or minus the "
                                "distance to the embedding")
    soft_absorb: bool = option(False, "noise drifts to a learned vector, the soft absorbing state (DiffuSeq-v2)")
    discrete_noise: float = option(0.0, "R: replace target tokens by the absorbing vector with probability "
                                        "R sqrt(1 - abar_t) while training (DiffuSeq-v2: 0.2, QQP 0.5); needs soft_absorb")
    latent_dim: int = changed(ModelConfig, "latent_dim", 128)
    time_dim: int = changed(ModelConfig, "time_dim", 128)
    hidden_dim: int = changed(ModelConfig, "hidden_dim", 768)
    ffn_dim: int = changed(ModelConfig, "ffn_dim", 3072)
    heads: int = changed(ModelConfig, "heads", 12)
    encoder_layers: int = changed(ModelConfig, "encoder_layers", 12)
    timestep_sampler: str = changed(ModelConfig, "timestep_sampler", "lossaware")
    length_policy: str = changed(ModelConfig, "length_policy", "pad")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_joined("DiffuSeq")
        if self.sequence_length < 8:
            raise ValueError(f"sequence_length must be >= 8, got {self.sequence_length}")
        if self.positions < self.sequence_length:
            raise ValueError("positions must be at least sequence_length, "
                             f"got {self.positions} and {self.sequence_length}")

        if not 0.0 <= self.discrete_noise <= 1.0:
            raise ValueError(f"discrete_noise must be in [0, 1], got {self.discrete_noise}")
        if self.discrete_noise and not self.soft_absorb:
            raise ValueError(f"discrete_noise needs soft_absorb, got discrete_noise {self.discrete_noise} without it")

    @property
    def joined_dictionary(self) -> bool:
        return True
