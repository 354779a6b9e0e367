"""Which candidates are decoded, and in which pieces, so that memory stays within a budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from pydiffseq.decoding.model import DenoisingNetwork

# Tokens of a piece from which on a processor of this kind gains less by more of them than it loses by padding.
ENOUGH_TOKENS = {"cpu": 2048, "cuda": 16384}
MOST_PADDING = 1.125   # tokens over tokens without padding


def candidate_lengths(model: DenoisingNetwork, encoded: Any, length_beam: int, noise_beam: int) -> Tensor:
    """Target length of every candidate, int64 ``[B, C]``: the likeliest lengths, each ``noise_beam`` times.

    Raises:
        ValueError: ``length_beam > 1`` for a network without length prediction.
    """
    if model.length_head is None:
        if length_beam > 1:
            raise ValueError("length_beam > 1 needs a model with length prediction, got one with length policy 'pad'")
        lengths = model.fixed_lengths(encoded)[:, None]
    else:
        logits = model.length_logits(encoded)
        logits[:, 0] = float("-inf")   # a sentence with words has a translation with words
        lengths = logits.topk(min(length_beam, logits.size(1) - 1), dim=1).indices
    return lengths.repeat_interleave(noise_beam, dim=1)


class Piece(NamedTuple):
    """Candidates that are denoised together: the same ones of each of some sentences."""

    sentences: list[int]   # ascending
    candidates: range
    width: int   # the longest of them


def split_candidates(lengths: Tensor, budget: int, enough: int) -> Iterator[Piece]:
    """Pieces of at most ``budget`` tokens, padding included, that together have every candidate once.

    Sentences are taken by length, so that there is little padding. A piece of ``enough`` tokens takes no longer sentence
    that would pad it by more than an eighth. A sentence whose candidates do not fit is split.

    Args:
        lengths: int64 ``[B, C]``.

    Raises:
        ValueError: not even one candidate of some sentence fits.
    """
    widths = lengths.amax(1).tolist()
    count, longest = lengths.size(1), max(widths)
    if budget < longest:
        raise ValueError(f"candidate_tokens must hold one candidate of a sentence, here {longest} tokens, got {budget}")
    group: list[int] = []
    own = 0   # tokens of the group without padding
    for sentence in sorted(range(len(widths)), key=widths.__getitem__):
        width, more = count * widths[sentence], (len(group) + 1) * count * widths[sentence]
        if group and (more > budget or (own >= enough and more > MOST_PADDING * (own + width))):
            yield Piece(sorted(group), range(count), widths[group[-1]])
            group, own = [], 0
        if width <= budget:
            group.append(sentence)
            own += width
            continue
        together = budget // widths[sentence]
        for first in range(0, count, together):
            yield Piece([sentence], range(first, min(first + together, count)), widths[sentence])
    if group:
        yield Piece(sorted(group), range(count), widths[group[-1]])
