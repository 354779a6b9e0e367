"""Reading parallel text, one pair at a time: two plain, ``.gz`` or ``.xz`` files, or one file of JSON lines.

Every reader checks what it reads and raises :class:`~pydiffseq.errors.InputError` with the file and line.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydiffseq.errors import InputError

SUFFIXES = ("", ".xz", ".gz")
Pair = tuple[str, str]


def open_bytes(path: Path) -> BinaryIO:
    """Open a plain, ``.gz`` or ``.xz`` file for reading bytes."""
    if path.suffix == ".xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def find_file(stem: str) -> Path:
    """The file ``stem``, ``stem.xz`` or ``stem.gz``; ``InputError`` where there is none."""
    for suffix in SUFFIXES:
        path = Path(stem + suffix)
        if path.is_file():
            return path
    raise InputError(f"no file {stem} (nor {stem}.xz or {stem}.gz)")


def read_lines(path: Path) -> Iterator[str]:
    """Lines without their line end (LF or CR LF), as a stream.

    Raises:
        InputError: a line is not UTF-8 (named ``file:line``), or the file cannot be decompressed.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            # Only LF ends a line, as for the line-counting tools; U+2028 and its like are text.
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at position "
                         f"{error.start + 1}); convert the file, for example with iconv") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path} is damaged after line {number}: {error}") from error


@dataclass(frozen=True)
class TextFiles:
    """Two files of the same number of lines; line *n* of one translates line *n* of the other."""

    source: Path
    target: Path

    @classmethod
    def find(cls, prefix: str, source_lang: str, target_lang: str) -> TextFiles:
        """``prefix.source_lang`` and ``prefix.target_lang``, compressed or not."""
        return cls(find_file(f"{prefix}.{source_lang}"), find_file(f"{prefix}.{target_lang}"))

    @property
    def name(self) -> str:
        return f"{self.source.name} and {self.target.name}"

    def __iter__(self) -> Iterator[Pair]:
        sources, targets = read_lines(self.source), read_lines(self.target)
        pairs = 0
        for pairs, source in enumerate(sources, 1):
            target = next(targets, None)
            if target is None:
                raise self._different(pairs + sum(1 for _ in sources), pairs - 1)
            yield source, target
        extra = sum(1 for _ in targets)
        if extra:
            raise self._different(pairs, pairs + extra)

    def _different(self, sources: int, targets: int) -> InputError:
        return InputError(f"{self.source} has {sources} lines, but {self.target} has {targets}; parallel files must "
                          "have the same number of lines")


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line, such as ``{"src": "...", "trg": "..."}``."""

    path: Path
    source_key: str = "src"
    target_key: str = "trg"

    @classmethod
    def find(cls, prefix: str, source_key: str = "src", target_key: str = "trg") -> JsonLines:
        """``prefix`` itself or ``prefix.jsonl``, compressed or not."""
        path = Path(prefix)
        return cls(path if path.is_file() else find_file(f"{prefix}.jsonl"), source_key, target_key)

    @property
    def name(self) -> str:
        return self.path.name

    def __iter__(self) -> Iterator[Pair]:
        for number, line in enumerate(read_lines(self.path), 1):
            yield self._parse(line, number)

    def _parse(self, line: str, number: int) -> Pair:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{self.path}:{number} is not a JSON object: {error.msg}") from error
        if not isinstance(record, dict):
            raise InputError(f"{self.path}:{number} is a JSON {type(record).__name__}, not an object")
        values = []
        for key in (self.source_key, self.target_key):
            value = record.get(key)
            if not isinstance(value, str):
                found = ", ".join(map(repr, record)) or "nothing" if key not in record else f"{type(value).__name__}"
                raise InputError(f"{self.path}:{number} must have a string under the key {key!r}, but it has {found}")
            # A line break inside a value would end the sentence in fairseq's line-based tools.
            values.append(" ".join(value.splitlines()))
        return values[0], values[1]


Corpus = TextFiles | JsonLines
