"""ROUGE against golden values of rouge-score and its definition; diversity by hand; BERTScore through a stand-in."""

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.decoding import pairwise_utilities
from pydiffseq.metrics import distinct_n, rouge_l, rouge_n, rouge_tokens, self_bleu, sentence_bleu
from pydiffseq.metrics.bert_score import Unavailable, bert_score
from pydiffseq.metrics.rouge import common_subsequence

WORDS = st.lists(st.sampled_from("abc"), max_size=9)


@pytest.mark.parametrize(("hypothesis", "reference", "scores"), [
    ("how do i learn to play the guitar ?", "what is the best way to learn guitar ?", (0.5, 0.0, 0.25)),
    ("the cat sat on the mat", "the cat is on the mat", (0.8333333333333334, 0.6, 0.8333333333333334)),
    ("the cat", "the cat sat on the mat", (0.5, 0.33333333333333337, 0.5)),
    ("the", "the", (1.0, 0.0, 1.0)),
    ("a b a b a b a b", "a b c a b", (0.6153846153846154, 0.36363636363636365, 0.6153846153846154)),
    ("Police killed the gunman, on Monday!", "the gunman was killed by police on Monday 24.",
     (0.8, 0.3076923076923077, 0.5333333333333333)),
    ("Größe 1,000", "Gr e 1 000", (1.0, 1.0, 1.0))])
def test_rouge_is_rouge_score(hypothesis, reference, scores):
    """Golden values: rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"]), F measures."""
    ours, theirs = rouge_tokens(hypothesis), rouge_tokens(reference)
    assert (rouge_n(ours, theirs, 1), rouge_n(ours, theirs, 2), rouge_l(ours, theirs)) == pytest.approx(scores, abs=1e-15)


@settings(max_examples=150, deadline=None)
@given(WORDS, WORDS)
def test_common_subsequence_is_its_recursion(one, other):
    lengths = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, ours in enumerate(one):
        for j, theirs in enumerate(other):
            lengths[i + 1, j + 1] = max(lengths[i, j + 1], lengths[i + 1, j], lengths[i, j] + (ours == theirs))
    assert common_subsequence(one, other) == lengths[-1, -1]
    assert rouge_l(one, other) == pytest.approx(2 * lengths[-1, -1] / max(1, len(one) + len(other)))


def test_distinct_n():
    assert distinct_n(["a a b".split()], 1) == pytest.approx(2 / 3)
    assert distinct_n(["a b c d".split(), "a b c d e".split()], 4) == pytest.approx(2 / 3)
    assert distinct_n([[], ["a"]], 4) == 0.0


def test_self_bleu_is_the_mean_over_ordered_pairs():
    candidates = ["a b c d e".split(), "a b c d".split(), "x b c d e f".split()]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(sentence_bleu(candidates[i], candidates[j], "method4") for i, j in pairs) / 3
    assert self_bleu(pairwise_utilities(candidates, "bleu", "method4")) == pytest.approx(expected, abs=1e-14)
    reversed_roles = sum(sentence_bleu(candidates[j], candidates[i], "method4") for i, j in pairs) / 3
    assert abs(expected - reversed_roles) > 1e-3


def test_bert_score_asks_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(Unavailable, match="the package bert-score is not there"):
        bert_score(["a"], [["b"]], tmp_path)
    asked = {}

    def score(hypotheses, references, **options):
        asked.update(options, texts=(hypotheses, references))
        return None, None, np.array([0.25, 0.75])

    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(score=score))
    with pytest.raises(Unavailable, match="no folder of a Hugging Face model"):
        bert_score(["a"], [["b"]], tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert bert_score(("a", "c"), (["b"], ("d", "e")), tmp_path, 7) == 0.5
    assert asked == {"model_type": str(tmp_path), "num_layers": 7, "lang": "en", "texts": (["a", "c"], [["b"], ["d", "e"]])}
