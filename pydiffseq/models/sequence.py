"""DiffuSeq's layout: source, separator and target as one sequence, built for a whole batch by index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One side of a batch: tokens int64 ``[B, W]``, of which the first ``lengths`` (int64 ``[B]``) of a row count."""

    tokens: Tensor
    lengths: Tensor


def words_of(tokens: Tensor, specials: tuple[int, ...]) -> Part:
    """The tokens int64 ``[B, M]`` other than ``specials``, moved to the left in their order."""
    keep = torch.ones_like(tokens, dtype=torch.bool)
    for special in specials:
        keep &= tokens.ne(special)
    order = keep.logical_not().byte().argsort(dim=1, stable=True)
    return Part(tokens.gather(1, order), keep.sum(1))


def splice_index(lengths: Tensor, first_width: int, second_width: int, width: int) -> Tensor:
    """Where the columns of a spliced row come from, int64 ``[B, width]``.

    The row is the first ``lengths`` columns of the first part, then the second part; the index is into both side by
    side, ``cat([first, second], 1)``. Columns beyond the second part repeat its last one.
    """
    column = torch.arange(width, device=lengths.device)
    index = torch.where(column < lengths[:, None], column, first_width + column - lengths[:, None])
    return index.clamp_max(first_width + second_width - 1)


def splice(first: Part, second: Part, width: int, fill: int) -> Part:
    """Rows of ``first`` followed by those of ``second``, then ``fill`` up to ``width``."""
    index = splice_index(first.lengths, first.tokens.size(1), second.tokens.size(1), width)
    lengths = first.lengths + second.lengths
    tokens = torch.cat([first.tokens, second.tokens], 1).gather(1, index)
    beyond = torch.arange(width, device=tokens.device) >= lengths[:, None]
    return Part(tokens.masked_fill(beyond, fill), lengths)


def constant(tokens: tuple[int, ...], like: Part) -> Part:
    """A part whose rows are all ``tokens``."""
    row = torch.tensor(tokens, dtype=torch.int64, device=like.tokens.device)
    return Part(row.expand(len(like.tokens), -1), torch.full_like(like.lengths, len(tokens)))


def framed(before: tuple[int, ...], words: Part, after: tuple[int, ...], fill: int) -> Part:
    """``before``, the words, ``after``, then ``fill``."""
    width = words.tokens.size(1) + len(before)
    part = splice(constant(before, words), words, width, fill) if before else words
    return splice(part, constant(after, words), width + len(after), fill) if after else part


def trimmed_lengths(source: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Lengths int64 ``[B]`` that together take at most ``most``: tokens go from the end of the longer side.

    From both where they are equally long, as DiffuSeq does it (spec 1.1), so an odd ``most`` may leave one place free.
    """
    def kept(own: Tensor, other: Tensor) -> Tensor:
        return torch.minimum(own, (most - other).clamp_min(most // 2))

    both = source + target > most
    return (torch.where(both, kept(source, target), source), torch.where(both, kept(target, source), target))
