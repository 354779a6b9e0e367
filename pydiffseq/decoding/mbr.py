"""Minimum Bayes risk selection: of k candidates, take the one closest to all the others by sentence BLEU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

MAX_ORDER = 4
MBR_DIRECTIONS = ("hypothesis", "reference")


@lru_cache(maxsize=4096)
def _ngrams(tokens: tuple) -> tuple[Counter, ...]:
    return tuple(Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, MAX_ORDER + 1))


def sentence_bleu(hypothesis: Sequence, reference: Sequence) -> float:
    """BLEU-4 of two token sequences in 0..1, with add-one smoothing on the orders above one (Lin and Och, 2004).

    Two empty sequences score 1, one empty sequence scores 0. Orders longer than the hypothesis are left out.
    """
    hypothesis, reference = tuple(hypothesis), tuple(reference)
    if not hypothesis or not reference:
        return float(hypothesis == reference)
    log_precision, orders = 0.0, min(MAX_ORDER, len(hypothesis))
    for n, (ours, theirs) in enumerate(zip(_ngrams(hypothesis), _ngrams(reference), strict=True), start=1):
        if n > orders:
            break
        matches = sum(min(count, theirs[gram]) for gram, count in ours.items())
        smooth = int(n > 1)
        if matches + smooth == 0:
            return 0.0
        log_precision += math.log((matches + smooth) / (len(hypothesis) - n + 1 + smooth))
    brevity = min(0.0, 1.0 - len(reference) / len(hypothesis))
    return math.exp(log_precision / orders + brevity)


def mbr_order(candidates: Sequence[Sequence], direction: str = "hypothesis") -> tuple[list[int], list[float]]:
    """Candidate numbers from best to worst, and each candidate's mean BLEU with the others (by candidate number).

    ``direction`` says which role the judged candidate plays: ``"hypothesis"`` (DiffuSeq) or ``"reference"``
    (AR-Diffusion's script). Ties go to the lower number.
    """
    if direction not in MBR_DIRECTIONS:
        raise ValueError(f"MBR direction must be one of {', '.join(MBR_DIRECTIONS)}, got {direction!r}")
    keys = [tuple(candidate) for candidate in candidates]
    counts = Counter(keys)   # equal candidates are judged once
    utility: dict[tuple, float] = {}
    for one in counts:
        total = 0.0
        for other, count in counts.items():
            times = count - (other == one)
            if times:
                total += times * (sentence_bleu(one, other) if direction == "hypothesis" else sentence_bleu(other, one))
        utility[one] = total / max(1, len(keys) - 1)
    scores = [utility[key] for key in keys]
    return sorted(range(len(keys)), key=lambda i: (-scores[i], i)), scores
