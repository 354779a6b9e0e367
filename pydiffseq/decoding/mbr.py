"""Minimum Bayes risk selection: of k candidates, take the one closest to all the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import accumulate, chain

import numpy as np

from pydiffseq.metrics.sentence import SMOOTHINGS, UTILITIES, symbols
from pydiffseq.ops._extension import C, kernels

MBR_DIRECTIONS = ("hypothesis", "reference")
MBR_METRICS = tuple(UTILITIES)
TOKEN_METRICS = tuple(name for name in UTILITIES if name != "chrf")   # chrF is about characters, not token ids

# Utilities are added as integers of this unit: no order of adding them, nor the last bit of a logarithm, breaks a tie.
UNIT = 2.0**-44


def pairwise_utilities(candidates: Sequence[Sequence[Hashable]], metric: str = "bleu",
                       smoothing: str = "add1") -> np.ndarray:
    """Utility of every pair, float64 ``[k, k]``: row i is the hypothesis, column j the reference.

    Args:
        candidates: token sequences, or strings for ``chrf``.
        metric: a key of :data:`pydiffseq.metrics.UTILITIES`, which are the reference of the C++ kernel used here and
            run where it was not built.
        smoothing: of ``bleu``, see :func:`pydiffseq.metrics.sentence_bleu`.

    Raises:
        ValueError: an unknown metric or smoothing.
    """
    _check("metric", metric, MBR_METRICS)
    _check("smoothing", smoothing, SMOOTHINGS)
    candidates = [symbols(candidate) for candidate in candidates] if metric == "chrf" else candidates
    count = len(candidates)
    if not count or not kernels():
        utility, options = UTILITIES[metric], (smoothing,) if metric == "bleu" else ()
        rows = [[utility(one, other, *options) for other in candidates] for one in candidates]
        return np.array(rows, dtype=np.float64).reshape(count, count)
    flat = list(chain.from_iterable(candidates))
    number = {token: i for i, token in enumerate(dict.fromkeys(flat))}
    tokens = np.fromiter(map(number.__getitem__, flat), np.int64, len(flat))
    offsets = np.fromiter(accumulate(map(len, candidates), initial=0), np.int64, count + 1)
    utilities = np.empty((count, count))
    C.mbr_utilities(tokens.ctypes.data, offsets.ctypes.data, count, len(number), metric, smoothing,
                    utilities.ctypes.data)
    return utilities


def mbr_order(candidates: Sequence[Sequence[Hashable]], direction: str = "hypothesis", metric: str = "bleu",
              smoothing: str = "add1") -> tuple[list[int], list[float]]:
    """Candidate numbers from best to worst, and each candidate's mean utility with the others (by candidate number).

    ``direction`` says which role the judged candidate plays: ``"hypothesis"`` (DiffuSeq) or ``"reference"``
    (AR-Diffusion's script). Ties, exact to 2^-44, go to the lower number. Equal candidates are judged once.

    Raises:
        ValueError: an unknown direction, or as :func:`pairwise_utilities`.
    """
    _check("direction", direction, MBR_DIRECTIONS)
    keys = [candidate if isinstance(candidate, str) else tuple(candidate) for candidate in candidates]
    counts = Counter(keys)
    utilities = pairwise_utilities(list(counts), metric, smoothing)
    judged = utilities if direction == "hypothesis" else utilities.T
    units = np.rint(judged / UNIT).astype(np.int64)
    # Each candidate meets every other one, its equals included, but not itself.
    totals = units @ np.fromiter(counts.values(), np.int64, len(counts)) - units.diagonal()
    total = dict(zip(counts, totals.tolist(), strict=True))
    scale = UNIT / max(1, len(keys) - 1)
    order = sorted(range(len(keys)), key=lambda i: (-total[keys[i]], i))
    return order, [total[key] * scale for key in keys]


def _check(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"MBR {name} must be one of {', '.join(accepted)}, got {value!r}")
