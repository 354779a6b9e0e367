"""Sequence-to-sequence text diffusion for fairseq and plain torch. Importing this package imports no fairseq."""

from pydiffseq.version import __version__

__all__ = ["__version__"]
