"""Denoising loops, candidates and their selection; plain torch, no fairseq."""

from pydiffseq.decoding.decode import DecodeOptions, Decoder, Hypothesis, decode
from pydiffseq.decoding.mbr import MBR_DIRECTIONS, MBR_METRICS, mbr_order, pairwise_utilities

__all__ = [
    "MBR_DIRECTIONS", "MBR_METRICS", "DecodeOptions", "Decoder", "Hypothesis", "decode", "mbr_order", "pairwise_utilities"]
