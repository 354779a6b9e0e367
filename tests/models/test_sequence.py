"""DiffuSeq's layout against the description of its merge (spec 1.1), one pair at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.models.sequence import Part, framed, splice_index, trimmed_lengths, words_of

BOS, PAD, EOS = 0, 1, 2


def merge(source: list[int], target: list[int], length: int) -> tuple[list[int], int]:
    """DiffuSeq's merge of two encoded sides, ``<s> words </s>`` each: the ids, and where the target part begins."""
    source, target = source[:-1], target[:-1]
    while len(source) + len(target) > length - 3:
        longer = len(source) - len(target)
        if longer >= 0:
            source.pop()
        if longer <= 0:
            target.pop()
    ids = [*source, EOS, EOS, *target, EOS]
    return ids + [PAD] * (length - len(ids)), len(source) + 2


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_trimming_is_the_published_loop(source, target, most):
    expected = [source, target]
    while sum(expected) > most:
        longer = expected[0] - expected[1]
        expected = [expected[0] - (longer >= 0), expected[1] - (longer <= 0)]
    kept = trimmed_lengths(torch.tensor([source]), torch.tensor([target]), most)
    assert [int(kept[0]), int(kept[1])] == expected


def test_words_move_to_the_left_whatever_side_is_padded():
    words = words_of(torch.tensor([[1, 1, 5, 6, 2], [7, 8, 9, 2, 1], [1, 1, 1, 1, 2]]), (BOS, PAD, EOS))
    assert words.lengths.tolist() == [2, 3, 0]
    assert words.tokens[0, :2].tolist() == [5, 6] and words.tokens[1, :3].tolist() == [7, 8, 9]


def test_frames():
    words = Part(torch.tensor([[5, 6, 9], [7, 9, 9]]), torch.tensor([2, 1]))   # 9: not part of the row
    part = framed((0,), words, (2, 2), 1)
    assert part.tokens.tolist() == [[0, 5, 6, 2, 2, 1], [0, 7, 2, 2, 1, 1]] and part.lengths.tolist() == [5, 4]
    assert framed((), words, (), 1) is words


def test_splice_index_of_ragged_rows():
    index = splice_index(torch.tensor([1, 3]), first_width=3, second_width=2, width=6)
    assert index.tolist() == [[0, 3, 4, 4, 4, 4], [0, 1, 2, 3, 4, 4]]


@pytest.mark.parametrize("length", [8, 9, 16, 21])
def test_pad_layout_is_the_published_merge(length):
    from test_diffuseq import tiny

    model = tiny(sequence_length=length, positions=21)
    sizes = [(0, 0), (1, 0), (0, 3), (2, 3), (9, 2), (2, 9), (9, 9), (12, 11)]
    sides = [[torch.arange(5, 5 + pair[side]).tolist() + [EOS] for pair in sizes] for side in (0, 1)]
    padded = [torch.tensor([row + [PAD] * (13 - len(row)) for row in side]) for side in sides]
    batch = model.layout(*padded)
    for row, (source, target) in enumerate(zip(*sides, strict=True)):
        ids, begin = merge([BOS, *source], [BOS, *target], length)
        assert batch.tokens[row].tolist() == ids
        assert batch.noised[row].tolist() == [n >= begin for n in range(length)]
        assert batch.source.lengths[row] == begin and batch.lengths[row] == length - begin
    assert batch.real is None and batch.scored.all()
