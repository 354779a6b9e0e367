"""Diversity of one text and of several candidates of it, as DiffuSeq reports it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct_n(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of the given token sequences, 0..1; 0 where there is none.

    dist-1 is the mean over sentences of ``distinct_n([tokens], 1)``; div-4 the mean of ``distinct_n(candidates, 4)``.
    """
    grams = [gram for tokens in texts for gram in zip(*(tokens[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(utilities: np.ndarray) -> float:
    """Mean sentence BLEU over candidate pairs i < j, i as the hypothesis; lower is more diverse.

    ``utilities``: float ``[k, k]`` of :func:`pydiffseq.decoding.pairwise_utilities`, as published with the smoothing
    ``method4``; k >= 2.
    """
    return float(utilities[np.triu_indices(len(utilities), 1)].mean())
