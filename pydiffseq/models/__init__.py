"""The networks as plain ``nn.Module`` with a dataclass config; no fairseq."""

from pydiffseq.models.ar_diffusion import ARDiffusion, ARDiffusionConfig

__all__ = ["ARDiffusion", "ARDiffusionConfig"]
