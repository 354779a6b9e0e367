"""Configuration of AR-Diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from pydiffseq.models.config import ModelConfig, changed, option


@dataclass
class ARDiffusionConfig(ModelConfig):
    """Sizes and options of AR-Diffusion; the defaults are the published IWSLT14 configuration (spec 2.9),
    but for the length policy: published is ``pad``, ``predict`` scores better at equal budget.

    Raises:
        ValueError: an unknown choice, a size or probability out of range, or options that do not go together.
    """

    decoder_layers: int = option(6, "decoder blocks")
    source_positions: int = option(256, "longest source, in tokens")
    target_length: int = option(90, "longest target, in tokens; with length_policy=pad every target has this length")
    dropout: float = changed(ModelConfig, "dropout", 0.2)
    time_injection: str = option("txl", "how the timestep enters the decoder")
    share_embeddings: bool = option(False, "the encoder reads the latent embeddings through a projection (joined "
                                           "dictionary)")
    without_pooler: bool = option(False, "leave out BERT's pooler, whose output counts with weight zero as published")
    decoder_final_norm: bool = option(False, "layer norm after the last decoder block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_injection == "rotary" and self.hidden_dim // self.heads % 2:
            raise ValueError(f"the rotary injection needs an even head size, got {self.hidden_dim // self.heads}")
        if self.share_embeddings:
            self.check_joined("share_embeddings")

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        return (*super().sizes(), "decoder_layers", "source_positions", "target_length")

    @property
    def joined_dictionary(self) -> bool:
        return self.share_embeddings
