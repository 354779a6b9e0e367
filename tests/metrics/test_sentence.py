"""Sentence scores against their definitions, sacrebleu, and golden values of NLTK."""

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import BLEU, CHRF

from pydiffseq.metrics import SMOOTHINGS, chrf, edit_similarity, sentence_bleu, unigram_f1

SENTENCES = st.lists(st.integers(0, 4), max_size=9)
GUITAR = "how do i learn to play the guitar ?", "what is the best way to learn guitar ?"
CAT = "the cat sat on the mat", "the cat is on the mat"
REPEAT = "a b a b a b a b", "a b c a b"


def matches(ours: list, theirs: list) -> int:
    """Clipped matches, counted by crossing out."""
    theirs, found = list(theirs), 0
    for gram in ours:
        if gram in theirs:
            theirs.remove(gram)
            found += 1
    return found


def grams(tokens, n: int) -> list:
    return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]


def literal_bleu(hypothesis, reference) -> float:
    """BLEU-4, add one on orders 2..4, orders longer than the hypothesis left out; counted by lists, not by Counters."""
    if not hypothesis or not reference:
        return 1.0 if hypothesis == reference else 0.0
    product, orders = 1.0, min(4, len(hypothesis))
    for n in range(1, orders + 1):
        found, total = matches(grams(hypothesis, n), grams(reference, n)), len(hypothesis) - n + 1
        product *= found / total if n == 1 else (found + 1) / (total + 1)
    brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))
    return brevity * product ** (1 / orders)


@settings(max_examples=150, deadline=None)
@given(SENTENCES, SENTENCES)
def test_sentence_bleu_is_its_definition(hypothesis, reference):
    assert sentence_bleu(hypothesis, reference) == pytest.approx(literal_bleu(hypothesis, reference), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(SENTENCES, SENTENCES, st.sampled_from(SMOOTHINGS))
def test_sentence_bleu_is_between_0_and_1(one, other, smoothing):
    score = sentence_bleu(one, other, smoothing)
    assert 0.0 <= score <= 1.0
    assert sentence_bleu([f"w{t}" for t in one], [f"w{t}" for t in other], smoothing) == score
    if len(one) >= 4 or smoothing != "method4":
        assert sentence_bleu(one, one, smoothing) == pytest.approx(1.0)
    if not set(one) & set(other) and (one or other) and smoothing != "add1_all":
        assert score == 0.0


def test_sentence_bleu_known_values():
    assert sentence_bleu(["the", "cat", "sat", "down"], ["the", "cat", "sat"]) == pytest.approx(
        (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert sentence_bleu(["the", "cat"], ["the", "cat", "sat"]) == pytest.approx(math.exp(-0.5))
    assert sentence_bleu(["the", "the", "the"], ["the", "cat"]) == pytest.approx((1 / 3 * 1 / 3 * 1 / 2) ** (1 / 3))
    assert sentence_bleu([], []) == 1.0 and sentence_bleu([], [1]) == 0.0 and sentence_bleu([1], []) == 0.0
    with pytest.raises(ValueError, match="must be one of add1, add1_all, method4, exp, got 'add2'"):
        sentence_bleu([1], [1], "add2")


@pytest.mark.parametrize(("hypothesis", "reference", "score"), [
    (*GUITAR, 0.07948346282299562), (*CAT, 0.293945703509473), (*REPEAT, 0.10073051057692405),
    ("the cat", CAT[0], 0.029961687346935995), ("the", "the", 1.0), ("no", "overlap", 0.0)])
def test_method4_is_nltk(hypothesis, reference, score):
    """Golden values: NLTK 3.10.4, sentence_bleu(..., smoothing_function=SmoothingFunction().method4)."""
    assert sentence_bleu(hypothesis.split(), reference.split(), "method4") == pytest.approx(score, abs=1e-14)


@pytest.mark.parametrize(("hypothesis", "reference", "score"), [
    (*GUITAR, 0.2208959113415788), (*CAT, 0.488923022434901), (*REPEAT, 0.2653856085536222),
    ("completely different words here", "no overlap at all", 0.3021375397356768)])
def test_add1_all_is_the_script_of_ar_diffusion(hypothesis, reference, score):
    """Golden values: what the published selection script gives for these sentences, smoothing 1."""
    assert sentence_bleu(hypothesis.split(), reference.split(), "add1_all") == pytest.approx(score, abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(SENTENCES.filter(bool), SENTENCES.filter(bool))
def test_exp_is_sacrebleu(hypothesis, reference):
    ours = sentence_bleu(hypothesis, reference, "exp")
    texts = [" ".join(map(str, tokens)) for tokens in (hypothesis, reference)]
    theirs = BLEU(tokenize="none", effective_order=True, force=True).sentence_score(texts[0], [texts[1]])
    assert ours == pytest.approx(theirs.score / 100, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.text("ab c", min_size=1, max_size=12), st.text("ab c", min_size=1, max_size=12))
def test_chrf_is_sacrebleu(hypothesis, reference):
    theirs = CHRF().sentence_score(hypothesis, [reference]).score / 100
    if hypothesis.strip() or reference.strip():
        assert chrf(hypothesis, reference) == pytest.approx(theirs, abs=1e-12)
    else:
        assert chrf(hypothesis, reference) == 1.0


@settings(max_examples=80, deadline=None)
@given(SENTENCES, SENTENCES)
def test_edit_similarity_and_f1_are_their_definitions(one, other):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    if one and other:
        found = matches(one, other)
        precision, recall = found / len(one), found / len(other)
        f1 = 2 * precision * recall / (precision + recall) if found else 0.0
        expected = (1 - distance(len(one), len(other)) / max(len(one), len(other)), f1)
    else:
        expected = (float(one == other),) * 2
    assert (edit_similarity(one, other), unigram_f1(one, other)) == pytest.approx(expected, abs=1e-12)
    assert edit_similarity(one, other) == edit_similarity(other, one) and unigram_f1(one, other) == unigram_f1(other, one)


def test_several_references():
    """NLTK's sentence_bleu([..], ..) with method4; a reference that is the hypothesis is enough."""
    skis = "a skier skis down the mountain".split()
    one, two, three = (text.split() for text in (
        "skier skis down a mountain", "three skiers are skiing on a snowy mountain", "a skier goes down"))
    assert sentence_bleu(skis, one, "method4", two, three) == pytest.approx(0.293945703509473, abs=1e-12)
    assert sentence_bleu(skis, two, "method4", skis) == 1.0
    assert sentence_bleu([], one, "add1", []) == 1.0 and sentence_bleu(skis, [], "add1", []) == 0.0
