"""Sentence BLEU and minimum Bayes risk against their definitions."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.decoding import mbr_order, sentence_bleu

SENTENCES = st.lists(st.integers(0, 4), max_size=9)


def literal_bleu(hypothesis, reference) -> float:
    """BLEU-4, add one on orders 2..4, orders longer than the hypothesis left out; counted by lists, not by Counters."""
    if not hypothesis or not reference:
        return 1.0 if hypothesis == reference else 0.0
    product, orders = 1.0, min(4, len(hypothesis))
    for n in range(1, orders + 1):
        ours = [tuple(hypothesis[i:i + n]) for i in range(len(hypothesis) - n + 1)]
        theirs = [tuple(reference[i:i + n]) for i in range(len(reference) - n + 1)]
        matches = 0
        for gram in ours:
            if gram in theirs:
                theirs.remove(gram)
                matches += 1
        product *= matches / len(ours) if n == 1 else (matches + 1) / (len(ours) + 1)
    brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))
    return brevity * product ** (1 / orders)


@settings(max_examples=150, deadline=None)
@given(SENTENCES, SENTENCES)
def test_sentence_bleu_is_its_definition(hypothesis, reference):
    assert sentence_bleu(hypothesis, reference) == pytest.approx(literal_bleu(hypothesis, reference), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(SENTENCES, SENTENCES)
def test_sentence_bleu_is_between_0_and_1_and_1_for_equal_sentences(one, other):
    assert 0.0 <= sentence_bleu(one, other) <= 1.0
    assert sentence_bleu(one, one) == pytest.approx(1.0)
    renamed = [[f"w{token}" for token in sentence] for sentence in (one, other)]
    assert sentence_bleu(*renamed) == sentence_bleu(one, other)
    if not set(one) & set(other) and (one or other):
        assert sentence_bleu(one, other) == 0.0


def test_sentence_bleu_known_values():
    assert sentence_bleu(["the", "cat", "sat", "down"], ["the", "cat", "sat"]) == pytest.approx(
        (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert sentence_bleu(["the", "cat"], ["the", "cat", "sat"]) == pytest.approx(math.exp(-0.5))
    assert sentence_bleu(["the", "the", "the"], ["the", "cat"]) == pytest.approx((1 / 3 * 1 / 3 * 1 / 2) ** (1 / 3))
    assert sentence_bleu([], []) == 1.0 and sentence_bleu([], [1]) == 0.0 and sentence_bleu([1], []) == 0.0


def literal_mbr(candidates, direction):
    scores = []
    for i, one in enumerate(candidates):
        others = [literal_bleu(one, other) if direction == "hypothesis" else literal_bleu(other, one)
                  for j, other in enumerate(candidates) if j != i]
        scores.append(sum(others) / len(others) if others else 0.0)
    return scores


@settings(max_examples=80, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=6), st.sampled_from(["hypothesis", "reference"]))
def test_mbr_is_its_definition(candidates, direction):
    order, scores = mbr_order(candidates, direction)
    assert scores == pytest.approx(literal_mbr(candidates, direction), abs=1e-12)
    assert sorted(order) == list(range(len(candidates)))
    for before, after in zip(order[:-1], order[1:], strict=True):
        assert scores[before] > scores[after] or (scores[before] == scores[after] and before < after)


def test_mbr_ties_go_to_the_lower_number_and_duplicates_support_each_other():
    assert mbr_order([[1], [2], [3]]) == ([0, 1, 2], [0.0, 0.0, 0.0])
    order, scores = mbr_order([[7, 8, 9], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert order == [1, 2, 0] and scores == pytest.approx([0.0, 0.5, 0.5])
    assert mbr_order([[1, 2]]) == ([0], [0.0])


def test_mbr_directions_differ():
    candidates = [[1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3, 4]]
    assert mbr_order(candidates, "hypothesis")[1] != mbr_order(candidates, "reference")[1]
    with pytest.raises(ValueError, match="MBR direction must be one of hypothesis, reference, got 'both'"):
        mbr_order(candidates, "both")
