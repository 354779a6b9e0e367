"""Merge what fairseq-generate wrote in shards: the lines of every sentence in the order of their ids, then the score.

The shards (--num-shards N --shard-id I, or the processes of torchrun) may come in any order; lines of the log are left
out. What one process wrote comes out the same. Of one file the score line is kept; of several it is computed anew from
the T- and D-lines if they were scored by sacrebleu, and left out, with a word on standard error, if not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydiffseq.errors import InputError

LINE = re.compile(r"[STHDPIEACRV]-(\d+)(?:_\d+)?\t")   # E-lines of --print-step carry the step: E-12_3
SCORE = re.compile(r"Generate (.*?): (.*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("outputs", nargs="+", type=Path, metavar="FILE", help="standard output of a fairseq-generate")


@dataclass
class Output:
    """What one process wrote: the lines of each sentence, and the score line."""

    path: Path
    sentences: dict[int, list[str]] = field(default_factory=dict)
    score: str | None = None


def run(args: argparse.Namespace) -> int:
    outputs = [read_output(path) for path in args.outputs]
    merged = merge(outputs)
    for number in sorted(merged):
        sys.stdout.writelines(line + "\n" for line in merged[number])
    score = merged_score(outputs, merged)
    if score is not None:
        print(score)
    return 0


def read_output(path: Path) -> Output:
    """Read one output.

    Raises:
        OSError: no such file. InputError: it holds no line of fairseq-generate, or the lines of a sentence are apart.
    """
    output, current = Output(path), None
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            found = LINE.match(line)
            if found is None:
                output.score = line.rstrip("\n") if SCORE.fullmatch(line.rstrip("\n")) else output.score
                continue
            sentence = int(found.group(1))
            if sentence != current and sentence in output.sentences:
                raise InputError(f"sentence {sentence} is twice in {path}, again in line {number}")
            current = sentence
            output.sentences.setdefault(sentence, []).append(line.rstrip("\n"))
    if not output.sentences and output.score is None:   # a shard may have no batch
        raise InputError(f"{path} must be the output of fairseq-generate, but has no S-, H- or D-lines")
    return output


def merge(outputs: Iterable[Output]) -> dict[int, list[str]]:
    """Sentence id -> its lines.

    Raises:
        InputError: two files have the same sentence.
    """
    merged: dict[int, list[str]] = {}
    owner: dict[int, Path] = {}
    for output in outputs:
        for sentence, lines in output.sentences.items():
            if sentence in merged:
                raise InputError(f"sentence {sentence} is in {owner[sentence]} and in {output.path}; give each shard once")
            merged[sentence], owner[sentence] = lines, output.path
    return merged


def merged_score(outputs: list[Output], merged: dict[int, list[str]]) -> str | None:
    """The score line of all sentences, or ``None`` where there is none or it cannot be computed here."""
    lines = [output.score for output in outputs if output.score is not None and output.sentences]
    if sum(bool(output.sentences) for output in outputs) == 1 or not lines:
        return lines[0] if lines else None
    found = SCORE.fullmatch(lines[0])
    if found is None or not found.group(2).startswith("BLEU = "):
        print("pydiffseq merge-generate: the shards were not scored by --scoring sacrebleu, so there is no score of all; "
              "use fairseq-score or pydiffseq evaluate on the D- and T-lines", file=sys.stderr)
        return None
    return f"Generate {found.group(1)}: {sacrebleu_of(merged)}"


def sacrebleu_of(merged: dict[int, list[str]]) -> str:
    """BLEU of the first D-lines against the T-lines, as fairseq's sacrebleu scorer with its defaults prints it."""
    import sacrebleu

    systems, references = [], []
    for number in sorted(merged):
        texts = {line[0]: line.split("\t")[-1] for line in reversed(merged[number]) if line[0] in "TD"}
        systems.append(texts.get("D", ""))
        references.append(texts.get("T", ""))
    return sacrebleu.corpus_bleu(systems, [references], tokenize="13a").format()
