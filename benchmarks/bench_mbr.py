"""MBR selection over k candidates of a sentence: the kernel, its Python fallback, and loops over pairs with sacrebleu.

    pytest benchmarks/bench_mbr.py --benchmark-enable --benchmark-group-by=group

Candidates are a sentence of 25 words whose words are changed, dropped and repeated at random. ``sacrebleu`` is its
sentence BLEU (or chrF) for every pair, as in published MBR scripts; all contenders have to choose the same candidate.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu

from pydiffseq.decoding import mbr, mbr_order

LENGTH, VOCABULARY = 25, 2000
COUNTS = [10, 50, 500]
SLOW = {"sacrebleu": 50, "fallback": 50}   # the most candidates they are asked to judge


def sentences(count: int) -> list[str]:
    draw = random.Random(count)
    sentence = [draw.randrange(VOCABULARY) for _ in range(LENGTH)]
    noisy = ([draw.randrange(VOCABULARY) if draw.random() < 0.3 else token for token in sentence] for _ in range(count))
    return [" ".join(f"w{token}" for token in tokens if draw.random() < 0.93) for tokens in noisy]


def with_sacrebleu(metric: str, texts: list[str]) -> list[float]:
    """Mean utility of every candidate, 0..100."""
    scorer = sacrebleu.BLEU(effective_order=True) if metric == "bleu" else sacrebleu.CHRF()
    return [sum(scorer.sentence_score(one, [other]).score for j, other in enumerate(texts) if j != i)
            / (len(texts) - 1) for i, one in enumerate(texts)]


def contender(name: str, metric: str, texts: list[str]) -> Callable[[], int]:
    """A function that chooses a candidate."""
    if name == "sacrebleu":
        return lambda: int(np.argmax(with_sacrebleu(metric, texts)))
    candidates = texts if metric == "chrf" else [text.split() for text in texts]
    return lambda: mbr_order(candidates, metric=metric, smoothing="exp")[0][0]


CASES = [(count, metric, name) for count in COUNTS for metric in ("bleu", "chrf", "f1", "edit")
         for name in ("pydiffseq", "fallback", "sacrebleu")
         if count <= SLOW.get(name, count) and (name != "sacrebleu" or metric in ("bleu", "chrf"))]


@pytest.mark.parametrize(("count", "metric", "name"), CASES)
def test_mbr(benchmark, monkeypatch, count: int, metric: str, name: str) -> None:
    texts = sentences(count)
    expected = contender("pydiffseq", metric, texts)()
    if name == "fallback":
        monkeypatch.setattr(mbr, "kernels", lambda: False)
    benchmark.group = f"mbr {metric} k={count}"
    benchmark.extra_info = {"op": "mbr", "contender": name, "pairs": count * (count - 1)}
    assert benchmark(contender(name, metric, texts)) == expected
