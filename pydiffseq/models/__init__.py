"""The networks as plain ``nn.Module`` with a dataclass config; no fairseq."""

from pydiffseq.models.ar_diffusion import ARDiffusion
from pydiffseq.models.ar_diffusion_config import ARDiffusionConfig
from pydiffseq.models.diffuseq import DiffuSeq
from pydiffseq.models.diffuseq_config import DiffuSeqConfig

__all__ = ["ARDiffusion", "ARDiffusionConfig", "DiffuSeq", "DiffuSeqConfig"]
