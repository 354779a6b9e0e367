"""Reading the candidates of sentences, one sentence at a time, from what the decoding commands write.

Formats: ``fairseq`` (output of fairseq-generate or -interactive), ``json`` (a JSON list of strings per line), ``diffuseq``
(files of JSON objects with ``recover``, ``reference`` and ``source``; one file per candidate) and ``text`` (one
hypothesis per line; one file per candidate). Whatever is missing is an :class:`~pydiffseq.errors.InputError` with file
and line.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydiffseq.data.text import read_lines
from pydiffseq.errors import InputError

FORMATS = ("fairseq", "json", "diffuseq", "text")
FAIRSEQ_LINE = re.compile(r"([A-Z])-(\d+)\t(.*)")
BERT_MARKS = ("[CLS]", "[SEP]", "[PAD]")   # DiffuSeq decodes special tokens, too, and its evaluation deletes them


@dataclass
class Sentence:
    """The candidates of one sentence, at least one, in the order of the files; source and references where known."""

    number: int
    candidates: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    source: str | None = None


def read_candidates(paths: Sequence[Path], form: str | None = None, fairseq_line: str = "H") -> Iterator[Sentence]:
    """The sentences of ``paths`` in the order in which they come, as a stream.

    Args:
        form: a member of :data:`FORMATS`; ``None`` looks at the first line.
        fairseq_line: the letter of the lines that hold hypotheses, ``H`` or ``D`` (detokenised).

    Raises:
        InputError: a file, a sentence or a candidate is missing, or a line is not what the format says.
    """
    if form is None:
        if not paths[0].is_file():   # a pipe, which cannot be read twice
            raise InputError(f"{paths[0]} is no plain file; say which format it has ({', '.join(FORMATS)})")
        form = detect(next(read_lines(paths[0]), ""))
    if form in ("fairseq", "json") and len(paths) > 1:
        raise InputError(f"the format {form} takes one file, got {len(paths)} ({', '.join(map(str, paths))})")
    if form == "fairseq":
        return _read_fairseq(paths[0], fairseq_line)
    if form == "json":
        return _read_lists(paths[0])
    return _read_parallel(paths, _diffuseq_record if form == "diffuseq" else _text_line)


def detect(line: str) -> str:
    """The format that a first line belongs to."""
    if FAIRSEQ_LINE.fullmatch(line):
        return "fairseq"
    return {"[": "json", "{": "diffuseq"}.get(line.lstrip()[:1], "text")


def _read_fairseq(path: Path, letter: str) -> Iterator[Sentence]:
    lines: dict[int, int] = {}   # sentence -> line on which its block begins
    for (number, start), block in itertools.groupby(_fairseq_blocks(path), key=lambda row: row[0]):
        if number in lines:
            raise InputError(f"{path}:{start} begins a second block of sentence {number}; the first is on line "
                             f"{lines[number]}")
        lines[number] = start
        sentence = Sentence(number)
        for _, kind, text in block:
            if kind == letter:
                sentence.candidates.append(text.partition("\t")[2])   # after the score
            elif kind == "T":
                sentence.references = [text]
            elif kind == "S":
                sentence.source = text
        if not sentence.candidates:
            raise InputError(f"{path}:{start} begins a block of sentence {number} without {letter}- lines")
        yield sentence
    if not lines:
        raise InputError(f"{path} holds no {letter}- lines of fairseq-generate")
    for expected, number in enumerate(sorted(lines)):
        if number != expected:
            raise InputError(f"{path}:{lines[number]} is the block of sentence {number}, but no block of sentence "
                             f"{expected} is there")


def _fairseq_blocks(path: Path) -> Iterator[tuple[tuple[int, int], str, str]]:
    """``((sentence, line of its block's first line), letter, rest)`` of every line that belongs to a sentence."""
    key = (-1, 0)
    for line_number, line in enumerate(read_lines(path), 1):
        match = FAIRSEQ_LINE.fullmatch(line)
        if match:
            kind, number, text = match.groups()
            if int(number) != key[0]:
                key = (int(number), line_number)
            yield key, kind, text


def _read_lists(path: Path) -> Iterator[Sentence]:
    number = -1
    for number, line in enumerate(read_lines(path)):
        candidates = _parse_json(line, f"{path}:{number + 1}", list)
        if not candidates or not all(isinstance(text, str) for text in candidates):
            raise InputError(f"{path}:{number + 1} must be a JSON list of at least one string")
        yield Sentence(number, [one_line(text) for text in candidates])
    if number < 0:
        raise InputError(f"{path} is empty; it must hold a JSON list of strings per line")


Record = tuple[str, str | None, str | None]   # hypothesis, reference, source


def _read_parallel(paths: Sequence[Path], parse: Callable[[str, str], Record]) -> Iterator[Sentence]:
    number = -1
    for number, lines in enumerate(itertools.zip_longest(*map(read_lines, paths))):
        sentence = Sentence(number)
        for path, line in zip(paths, lines, strict=True):
            if line is None:
                longer = next(other for other, there in zip(paths, lines, strict=True) if there is not None)
                raise InputError(f"{path} ends before line {number + 1}, which {longer} has")
            text, reference, sentence.source = parse(line, f"{path}:{number + 1}")
            sentence.candidates.append(text)
            given = [] if reference is None else [reference]
            if sentence.references not in ([], given):
                raise InputError(f"{path}:{number + 1} has another reference than {paths[0]}:{number + 1}")
            sentence.references = given
        yield sentence
    if number < 0:
        raise InputError(f"{paths[0]} is empty")


def _text_line(line: str, where: str) -> Record:
    return line.strip(), None, None


def _diffuseq_record(line: str, where: str) -> Record:
    record = _parse_json(line, where, dict)
    texts = []
    for key in ("recover", "reference"):
        if not isinstance(record.get(key), str):
            found = type(record[key]).__name__ if key in record else "no such key"
            raise InputError(f"{where} must have a string under the key {key!r}, but it has {found}")
        text = record[key]
        for mark in BERT_MARKS:
            text = text.replace(mark, "")
        texts.append(one_line(text))
    source = record.get("source")
    return texts[0], texts[1], source if isinstance(source, str) else None


def _parse_json(line: str, where: str, kind: type) -> Any:
    name = "object" if kind is dict else "list of strings"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not a JSON {name}: {error.msg}") from error
    if not isinstance(value, kind):
        raise InputError(f"{where} is a JSON {type(value).__name__}, not a {name}")
    return value


def one_line(text: str) -> str:
    """``text`` with its line breaks as blanks, so that it stays one line of output."""
    return " ".join(text.splitlines()).strip()
