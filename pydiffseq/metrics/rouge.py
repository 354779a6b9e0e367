"""ROUGE-1, -2 and -L of one sentence as F measures, 0..1 (Lin, 2004).

Own code, because it is thirty lines: the packages the papers use (rouge-score, torchmetrics) bring a dozen dependencies
for it. Tokens and values are theirs; the tests hold their numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased runs of ``a-z0-9``, unstemmed, as in the papers' packages. Other letters separate words there."""
    return re.findall("[a-z0-9]+", text.lower())


def rouge_n(hypothesis: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F measure of clipped n-gram matches; 0 where either side has no n-gram."""
    ours, theirs = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (hypothesis, reference))
    return _f_measure(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values()))


def rouge_l(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """F measure of the longest common subsequence."""
    return _f_measure(common_subsequence(hypothesis, reference), len(hypothesis), len(reference))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence: a column of the table per token, its rows the bits of an integer."""
    where: dict[str, int] = {}
    for i, token in enumerate(one):
        where[token] = where.get(token, 0) | 1 << i
    column = rows = (1 << len(one)) - 1   # a zero bit is a step up
    for token in other:
        found = column & where.get(token, 0)
        column = (column + found | column - found) & rows
    return len(one) - column.bit_count()


def _f_measure(matches: int, hypothesis: int, reference: int) -> float:
    return 2.0 * matches / (hypothesis + reference) if matches else 0.0
