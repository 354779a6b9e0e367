"""Candidates in pieces: each once, within the budget, and with no effect on what is decoded."""

import dataclasses

import pytest
import torch
from test_decode import IDS, PREDICT, SOURCE, tiny, words

from pydiffseq.decoding import DecodeOptions, Decoder, decode
from pydiffseq.decoding.candidates import split_candidates


@pytest.mark.parametrize("enough", [1, 20, 10**6])
@pytest.mark.parametrize("budget", [9, 10, 17, 18, 40, 100, 10**6])
def test_pieces_hold_every_candidate_once_within_the_budget(budget, enough):
    lengths = torch.tensor([[3, 4, 2], [9, 8, 7], [1, 2, 1], [5, 5, 6], [9, 9, 9]])
    seen = []
    for piece in split_candidates(lengths, budget, enough):
        assert piece.sentences == sorted(piece.sentences)
        assert piece.width == max(int(lengths[s].max()) for s in piece.sentences)
        assert len(piece.sentences) * len(piece.candidates) * piece.width <= budget
        seen += [(s, c) for s in piece.sentences for c in piece.candidates]
    assert len(seen) == 15 and set(seen) == {(s, c) for s in range(5) for c in range(3)}


def test_pieces_have_sentences_of_like_length():
    lengths = torch.tensor([[1], [30], [2], [29]])
    assert [piece.sentences for piece in split_candidates(lengths, 60, 60)] == [[0, 2], [1, 3]]


def test_pieces_with_enough_tokens_are_not_padded_by_longer_sentences():
    lengths = torch.tensor([[8], [9], [20], [8], [9], [21]])
    assert [piece.sentences for piece in split_candidates(lengths, 1000, 1000)] == [[0, 1, 2, 3, 4, 5]]
    assert [piece.sentences for piece in split_candidates(lengths, 1000, 30)] == [[0, 1, 3, 4], [2, 5]]
    assert [piece.sentences for piece in split_candidates(lengths, 1000, 35)] == [[0, 1, 2, 3, 4], [5]]


@pytest.mark.parametrize("changes", [{}, PREDICT, {"time_injection": "rotary"}, {"time_injection": "add"}], ids=str)
@pytest.mark.parametrize("budget", [7, 8, 20, 50])
def test_the_budget_changes_no_output(changes, budget):
    model, length_beam = tiny(**changes), 2 if "length_policy" in changes else 1
    options = DecodeOptions(steps=3, noise_beam=5, length_beam=length_beam)
    whole = decode(model, SOURCE, IDS, options)
    pieces = decode(model, SOURCE, IDS, dataclasses.replace(options, candidate_tokens=budget))
    assert words(whole) == words(pieces)


def test_a_budget_below_one_sentence_is_refused():
    with pytest.raises(ValueError, match="candidate_tokens must hold one candidate of a sentence, here 7 tokens, got 6"):
        decode(tiny(), SOURCE, IDS, DecodeOptions(candidate_tokens=6))


def test_a_decoder_serves_many_batches():
    model, options = tiny(**PREDICT), DecodeOptions(steps=3, noise_beam=2)
    decoder = Decoder(model, options)
    for order in (torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1]), torch.tensor([2])):
        assert words(decoder(SOURCE[order], IDS[order])) == words(decode(model, SOURCE[order], IDS[order], options))
