"""Denoising loops, candidates and their selection; plain torch, no fairseq."""

from pydiffseq.decoding.decode import DecodeOptions, Hypothesis, decode
from pydiffseq.decoding.mbr import MBR_DIRECTIONS, mbr_order, sentence_bleu

__all__ = ["MBR_DIRECTIONS", "DecodeOptions", "Hypothesis", "decode", "mbr_order", "sentence_bleu"]
