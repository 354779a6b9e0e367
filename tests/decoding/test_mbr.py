"""Minimum Bayes risk selection against its definition; the kernel's utilities against the Python ones."""

import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.decoding import mbr, mbr_order, pairwise_utilities
from pydiffseq.metrics import SMOOTHINGS, UTILITIES, sentence_bleu

SENTENCES = st.lists(st.integers(0, 4), max_size=9)
CASES = [("bleu", smoothing) for smoothing in SMOOTHINGS] + [(name, "add1") for name in ("chrf", "f1", "edit")]
kernel = pytest.mark.skipif(mbr.C is None, reason="the extension was not built")


def python_utilities(candidates, metric, smoothing):
    options = (smoothing,) if metric == "bleu" else ()
    return np.array([[UTILITIES[metric](one, other, *options) for other in candidates] for one in candidates])


def paraphrases(seed: int, count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Candidates as a sampler gives them: one sentence with some tokens changed, dropped and repeated."""
    draw = random.Random(seed)
    sentence = [draw.randrange(vocabulary) for _ in range(length)]
    result = []
    for _ in range(count):
        noisy = [draw.randrange(vocabulary) if draw.random() < 0.2 else token for token in sentence]
        result.append([token for token in noisy if draw.random() < 0.9 for _ in range(1 + (draw.random() < 0.05))])
    return result


@kernel
@pytest.mark.parametrize(("metric", "smoothing"), CASES)
@settings(max_examples=40, deadline=None)
@given(candidates=st.lists(SENTENCES, min_size=1, max_size=7))
def test_kernel_is_the_python_utility(metric, smoothing, candidates):
    theirs = python_utilities(candidates, metric, smoothing)
    np.testing.assert_allclose(pairwise_utilities(candidates, metric, smoothing), theirs, rtol=0, atol=1e-14)


@kernel
@pytest.mark.parametrize(("metric", "smoothing"), CASES)
@pytest.mark.parametrize(("length", "vocabulary"), [(30, 5), (64, 40), (65, 40), (150, 40)])
def test_kernel_on_long_sentences(metric, smoothing, length, vocabulary):
    """Lengths around the 64 bits of a word; more candidates than one thread's task takes."""
    candidates = [[], *paraphrases(length, 5, length, vocabulary), [3], [10**12, 3], list(range(length))]
    theirs = python_utilities(candidates, metric, smoothing)
    np.testing.assert_allclose(pairwise_utilities(candidates, metric, smoothing), theirs, rtol=0, atol=1e-14)


@kernel
def test_threads_share_rows():
    candidates = paraphrases(1, 90, 12, 30)
    expected = python_utilities(candidates, "f1", "add1")
    np.testing.assert_allclose(pairwise_utilities(candidates, "f1"), expected, rtol=0, atol=1e-14)


def test_any_hashable_token():
    words = [["1", "01", "b"], ["1", "b"], ["01", "b", "é"]]
    for metric in ("bleu", "f1", "edit"):
        np.testing.assert_allclose(pairwise_utilities(words, metric), python_utilities(words, metric, "add1"), atol=1e-14)
    texts = ["Ein Haus", "ein Häuschen ", "E i nHaus", ""]
    np.testing.assert_allclose(pairwise_utilities(texts, "chrf"), python_utilities(texts, "chrf", ""), atol=1e-14)
    assert pairwise_utilities([]).shape == (0, 0)


def literal_mbr(candidates, direction, metric, smoothing):
    utility = python_utilities(candidates, metric, smoothing)
    utility = utility if direction == "hypothesis" else utility.T
    return [float(np.delete(row, i).mean()) if len(candidates) > 1 else 0.0 for i, row in enumerate(utility)]


@settings(max_examples=80, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=6), st.sampled_from(["hypothesis", "reference"]), st.sampled_from(CASES))
def test_mbr_is_its_definition(candidates, direction, case):
    order, scores = mbr_order(candidates, direction, *case)
    assert scores == pytest.approx(literal_mbr(candidates, direction, *case), abs=1e-12)
    assert sorted(order) == list(range(len(candidates)))
    for before, after in zip(order[:-1], order[1:], strict=True):
        assert scores[before] > scores[after] or (scores[before] == scores[after] and before < after)


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=6), st.sampled_from(["hypothesis", "reference"]), st.sampled_from(CASES))
def test_same_choice_without_the_kernel(candidates, direction, case):
    order, scores = mbr_order(candidates, direction, *case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mbr, "kernels", lambda: False)
        assert mbr_order(candidates, direction, *case) == (order, scores)


def test_mbr_ties_go_to_the_lower_number_and_duplicates_support_each_other():
    assert mbr_order([[1], [2], [3]]) == ([0, 1, 2], [0.0, 0.0, 0.0])
    order, scores = mbr_order([[7, 8, 9], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert order == [1, 2, 0] and scores == pytest.approx([0.0, 0.5, 0.5])
    assert mbr_order([[1, 2]]) == ([0], [0.0])
    assert mbr_order([]) == ([], [])


def test_a_tie_is_a_tie_in_any_order_of_adding():
    """The first two candidates differ only in names; sums of their utilities in floating point need not be equal."""
    rest = [[1, 2, 9, 8, 7], [3, 4, 9, 8, 7], [1, 2, 5], [3, 4, 5], [1, 6, 6, 7, 1, 0], [3, 6, 6, 7, 3, 0]]
    for shift in range(len(rest)):
        order, scores = mbr_order([[1, 2, 6, 7], [3, 4, 6, 7], *rest[shift:], *rest[:shift]])
        assert scores[0] == scores[1] and order.index(0) < order.index(1)


@pytest.mark.parametrize("seed", range(3))
def test_same_choice_as_the_loop_over_sacrebleu(seed):
    texts = [" ".join(f"w{token}" for token in tokens) for tokens in paraphrases(seed, 12, 15, 60)]
    scorer = sacrebleu.BLEU(effective_order=True)
    loop = [sum(scorer.sentence_score(one, [other]).score for j, other in enumerate(texts) if j != i) / 11
            for i, one in enumerate(texts)]
    order, scores = mbr_order([text.split() for text in texts], smoothing="exp")
    assert order[0] == int(np.argmax(loop))
    assert scores == pytest.approx(np.array(loop) / 100, abs=1e-12)


def test_mbr_directions_and_metrics_differ():
    candidates = [[1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3, 4]]
    assert mbr_order(candidates, "hypothesis")[1] != mbr_order(candidates, "reference")[1]
    assert sentence_bleu(candidates[0], candidates[1]) == pairwise_utilities(candidates)[0, 1]
    with pytest.raises(ValueError, match="MBR direction must be one of hypothesis, reference, got 'both'"):
        mbr_order(candidates, "both")
    with pytest.raises(ValueError, match="MBR metric must be one of bleu, chrf, f1, edit, got 'ter'"):
        mbr_order(candidates, metric="ter")
    with pytest.raises(ValueError, match="MBR smoothing must be one of add1, add1_all, method4, exp, got 'none'"):
        pairwise_utilities(candidates, smoothing="none")
