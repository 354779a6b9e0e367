"""Scores of one sentence against another, 0..1, on sequences of any hashable symbols.

Each takes ``(hypothesis, reference)``. Two empty sequences score 1, an empty and a non-empty one 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import or_

BLEU_ORDER = 4
CHRF_ORDER, CHRF_BETA = 6, 2.0
SMOOTHINGS = ("add1", "add1_all", "method4", "exp")


@lru_cache(maxsize=4096)
def _ngrams(tokens: tuple, orders: int) -> tuple[Counter, ...]:
    return tuple(Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, orders + 1))


def _matches(hypothesis: tuple, reference: tuple, orders: int) -> list[int]:
    """How many n-grams of the hypothesis the reference holds, each at most as often as there; n = 1 .. orders."""
    return _clipped(_ngrams(hypothesis, orders), _ngrams(reference, orders))


def _clipped(hypothesis: tuple[Counter, ...], reference: tuple[Counter, ...]) -> list[int]:
    return [sum(min(count, theirs[gram]) for gram, count in ours.items())
            for ours, theirs in zip(hypothesis, reference, strict=True)]


def sentence_bleu(hypothesis: Sequence, reference: Sequence, smoothing: str = "add1", *more: Sequence) -> float:
    """BLEU-4 of a sentence: geometric mean of clipped n-gram precisions times the brevity penalty.

    With ``more`` references an n-gram counts as often as in the one that has it most, and the brevity penalty goes by
    the length closest to the hypothesis', the shorter one of two (Papineni et al., 2002).

    ``smoothing`` says what becomes of precisions without matches (the numbered methods are those of Chen and Cherry,
    2014):

    * ``add1``: one more match and one more n-gram in the orders above one (Lin and Och, 2004: method 2); orders longer
      than the hypothesis are left out.
    * ``add1_all``: the same in every order, always four orders. AR-Diffusion's MBR, where hypotheses have at least
      three tokens (its script gives shorter ones values above 1).
    * ``method4``: the k-th order without a match counts ``ln(length) / (5 * 2^k)`` matches, always four orders.
      NLTK's ``SmoothingFunction().method4``, by which DiffuSeq reports BLEU and selects candidates.
    * ``exp``: the k-th order without a match counts ``1 / 2^k`` matches; orders longer than the hypothesis are left out.
      sacrebleu's sentence BLEU.

    Without any matching token ``add1``, ``method4`` and ``exp`` give 0.

    Raises:
        ValueError: an unknown smoothing.
    """
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"the smoothing of sentence BLEU must be one of {', '.join(SMOOTHINGS)}, got {smoothing!r}")
    hypothesis, references = tuple(hypothesis), [tuple(words) for words in (reference, *more)]
    if not hypothesis or not any(references):
        return float(hypothesis in references)
    counts = [_ngrams(words, BLEU_ORDER) for words in references]
    merged = counts[0] if not more else tuple(reduce(or_, orders) for orders in zip(*counts, strict=True))
    matches, size = _clipped(_ngrams(hypothesis, BLEU_ORDER), merged), len(hypothesis)
    if not matches[0] and smoothing != "add1_all":
        return 0.0
    orders = BLEU_ORDER if smoothing in ("add1_all", "method4") else min(BLEU_ORDER, size)
    matched = counted = halved = 1.0
    for n, hits in enumerate(matches[:orders], start=1):
        total = max(size - n + 1, 0)
        if smoothing == "add1_all" or (smoothing == "add1" and n > 1):
            matched, counted = matched * (hits + 1), counted * (total + 1)
        elif hits:
            matched, counted = matched * hits, counted * total
        elif smoothing != "method4":
            halved *= 2
            counted *= halved * total
        elif size > 1:
            halved *= 2
            matched, counted = matched * math.log(size), counted * (halved * 5 * max(total, 1))
    closest = min(map(len, references), key=lambda length: (abs(length - size), length))
    brevity = min(0.0, 1.0 - closest / size)
    return math.exp(math.log(matched / counted) / orders + brevity)


def chrf(hypothesis: Sequence, reference: Sequence) -> float:
    """chrF (Popovic, 2015): F2 of the mean n-gram precision and recall, n = 1..6; on strings, of characters.

    White space in strings does not count. Orders longer than either side are left out. sacrebleu's default (chrF2).
    """
    hypothesis, reference = tuple(symbols(hypothesis)), tuple(symbols(reference))
    if not hypothesis or not reference:
        return float(hypothesis == reference)
    orders = min(CHRF_ORDER, len(hypothesis), len(reference))
    matches = _matches(hypothesis, reference, orders)
    if not matches[0]:
        return 0.0
    precision = sum(hits / (len(hypothesis) - n) for n, hits in enumerate(matches)) / orders
    recall = sum(hits / (len(reference) - n) for n, hits in enumerate(matches)) / orders
    weight = CHRF_BETA**2
    return (1.0 + weight) * precision * recall / (weight * precision + recall)


def symbols(candidate: Sequence) -> Sequence:
    """The symbols whose n-grams count: of a string its characters but white space, else the sequence itself."""
    return "".join(candidate.split()) if isinstance(candidate, str) else candidate


def unigram_f1(hypothesis: Sequence, reference: Sequence) -> float:
    """F1 of clipped token matches: ``2 * matches / (length of one + length of the other)``."""
    hypothesis, reference = tuple(hypothesis), tuple(reference)
    if not hypothesis or not reference:
        return float(hypothesis == reference)
    return 2.0 * _matches(hypothesis, reference, 1)[0] / (len(hypothesis) + len(reference))


def edit_similarity(hypothesis: Sequence, reference: Sequence) -> float:
    """``1 - (insertions, deletions and substitutions) / (length of the longer one)``."""
    hypothesis, reference = tuple(hypothesis), tuple(reference)
    if not hypothesis or not reference:
        return float(hypothesis == reference)
    row = list(range(len(reference) + 1))
    for i, ours in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(reference, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (ours != theirs))
    return 1.0 - row[-1] / max(len(hypothesis), len(reference))


UTILITIES: dict[str, Callable[..., float]] = {
    "bleu": sentence_bleu, "chrf": chrf, "f1": unigram_f1, "edit": edit_similarity}
