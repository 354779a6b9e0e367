"""Writing fairseq's binarised data: a stream of encoded pairs to memory-mapped ``.bin`` and ``.idx`` files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pydiffseq.data.text import Pair
from pydiffseq.data.vocabulary import Encoder
from pydiffseq.errors import InputError

Item = TypeVar("Item")
BATCH = 1000
MARKER = "prepare.json"  # written last; a folder that holds it was made by this module


@dataclass
class SplitReport:
    """What one split came to. Token counts include the ``</s>`` of each sentence."""

    pairs: int = 0
    skipped: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    unknown: list[int] = field(default_factory=lambda: [0, 0])

    def sentence(self) -> str:
        rates = [100 * unknown / max(tokens, 1) for unknown, tokens in zip(self.unknown, self.tokens, strict=True)]
        text = (f"{self.pairs:,} pairs, {self.tokens[0]:,} + {self.tokens[1]:,} tokens, "
                f"{rates[0]:.2f} % + {rates[1]:.2f} % unknown")
        return text + (f"; {self.skipped:,} pairs with an empty side skipped" if self.skipped else "")


def batches(items: Iterable[Item], size: int = BATCH) -> Iterator[list[Item]]:
    """Consecutive lists of up to ``size`` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def write_split(pairs: Iterable[Pair], encoder: Encoder, prefixes: tuple[str, str], *, skip_empty: bool,
                counts: np.ndarray | None = None) -> SplitReport:
    """Encode ``pairs`` and write ``prefix.bin`` and ``prefix.idx`` of both sides.

    Args:
        prefixes: path prefixes of the source and the target side, such as ``.../train.de-en.de``.
        skip_empty: leave out pairs of which a side has no token (training); otherwise sentence *n* is line *n*.
        counts: int64 ``[V]``, to which the occurrences of every id on both sides are added.
    """
    from fairseq.data import indexed_dataset

    size = len(encoder.dictionary)
    builders = [indexed_dataset.make_builder(f"{prefix}.bin", "mmap", size) for prefix in prefixes]
    report = SplitReport()
    for batch in batches(pairs):
        encoded = [encoder([pair[side] for pair in batch]) for side in (0, 1)]
        keep = [not (skip_empty and min(len(source), len(target)) < 2) for source, target in zip(*encoded, strict=True)]
        report.pairs += sum(keep)
        report.skipped += len(keep) - sum(keep)
        for side, sentences in enumerate(encoded):
            kept = [ids for ids, kept in zip(sentences, keep, strict=True) if kept]
            for ids in kept:
                builders[side].add_item(torch.from_numpy(ids))
            histogram = np.bincount(np.concatenate(kept), minlength=size) if kept else np.zeros(size, np.int64)
            report.tokens[side] += int(histogram.sum())
            report.unknown[side] += int(histogram[encoder.dictionary.unk()])
            if counts is not None:
                counts += histogram
    for builder, prefix in zip(builders, prefixes, strict=True):
        builder.finalize(f"{prefix}.idx")
    return report


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ``InputError`` unless ``destination`` may be (re)placed: new, empty, or prepared data and ``overwrite``."""
    if not (destination.exists() or destination.is_symlink()):
        return
    if not destination.is_dir() or destination.is_symlink():
        raise InputError(f"--destdir {destination} exists and is not a folder")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--destdir {destination} exists already; give another folder, or --overwrite to replace it")
    if not (destination / MARKER).is_file():
        raise InputError(f"--destdir {destination} does not hold data from pydiffseq prepare (no {MARKER}), so it is "
                         "not overwritten; give another folder or remove it yourself")


@contextlib.contextmanager
def new_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``destination`` that takes its place at the end, or vanishes when the block fails."""
    check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        check_destination(destination, overwrite)
        if destination.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
            os.replace(destination, old)
            os.replace(temporary, destination)
            shutil.rmtree(old)
        else:
            os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
