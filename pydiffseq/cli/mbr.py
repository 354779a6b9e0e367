"""Choose one candidate per sentence by minimum Bayes risk: the one that is closest to all the others.

Candidates come from fairseq-generate or fairseq-interactive with --nbest, from a file with a JSON list of strings per
line, or from several files with one hypothesis per line (plain, or DiffuSeq's JSON objects with "recover"). One line per
sentence is written, in the order of the sentences; with --sources also what was translated, so that both are parallel
text from which another network can learn (distillation). As published: DiffuSeq --smoothing method4; AR-Diffusion
--smoothing add1_all --direction reference --tokenize 13a --lowercase.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydiffseq.data.candidates import FORMATS
from pydiffseq.errors import InputError
from pydiffseq.metrics import SMOOTHINGS, UTILITIES

if TYPE_CHECKING:
    from pydiffseq.data.candidates import Sentence

TOKENIZERS = ("none", "13a", "intl", "char", "zh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write (default: standard output)")
    parser.add_argument("--sources", type=Path, metavar="FILE", help="also write the sources, a line for each sentence")
    add_selection_arguments(parser, "--")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE",
                        help="files of candidates, plain, .gz or .xz; several files are one candidate each")
    parser.add_argument("--format", choices=FORMATS, help="what the files hold (default: what the first line looks like)")
    parser.add_argument("--fairseq-line", choices=("H", "D"), default="H",
                        help="lines of fairseq-generate to read: H or D (detokenised)")
    parser.add_argument("--lowercase", action="store_true", help="compare lower-cased text")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_selection_arguments(parser: argparse._ActionsContainer, prefix: str) -> None:
    """The options of the choice itself, as ``<prefix>metric`` and so on."""
    parser.add_argument(f"{prefix}metric", choices=tuple(UTILITIES), default="bleu", dest="metric",
                        help="utility of a pair of candidates: sentence BLEU, chrF, unigram F1 or edit similarity")
    parser.add_argument(f"{prefix}smoothing", choices=SMOOTHINGS, default="add1", dest="smoothing",
                        help="smoothing of sentence BLEU: add1 above order one, add1_all, NLTK's method4, sacrebleu's exp")
    parser.add_argument(f"{prefix}direction", choices=("hypothesis", "reference"), default="hypothesis",
                        dest="direction", help="role of the judged candidate")
    parser.add_argument(f"{prefix}tokenize", choices=TOKENIZERS, default="none", dest="tokenize",
                        help="sacrebleu's tokeniser before splitting at blanks")


def selection(args: argparse.Namespace) -> Callable[[Sequence[str]], int]:
    """The function that chooses among candidate texts by the options of :func:`add_selection_arguments`."""
    from sacrebleu import BLEU

    from pydiffseq.decoding.mbr import mbr_order

    tokenize = BLEU(tokenize=args.tokenize).tokenizer

    def choose(texts: Sequence[str]) -> int:
        if len(texts) == 1:
            return 0
        texts = [text.lower() for text in texts] if args.lowercase else texts
        symbols = texts if args.metric == "chrf" else [tokenize(text).split() for text in texts]
        return mbr_order(symbols, args.direction, args.metric, args.smoothing)[0][0]

    return choose


def sentences(args: argparse.Namespace, label: str) -> Iterator[Sentence]:
    """What the input options name, under a progress bar."""
    from tqdm import tqdm

    from pydiffseq.data.candidates import read_candidates

    for path in args.files:
        if not path.exists():
            raise InputError(f"no file {path}")
    found = read_candidates(args.files, args.format, args.fairseq_line)
    return tqdm(found, desc=label, disable=args.quiet, unit=" sentences", mininterval=0.2 if sys.stderr.isatty() else 2.0)


def write_lines(lines: Sequence[str], path: Path | None) -> None:
    """To ``path``, which appears only when it is complete, or to standard output."""
    if path is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def source_of(sentence: Sentence, files: Sequence[Path]) -> str:
    if sentence.source is None:
        raise InputError(f"--sources: sentence {sentence.number} of {files[0]} has no source; S- lines of fairseq-generate "
                         "and DiffuSeq's JSON lines have one")
    return sentence.source


def run(args: argparse.Namespace) -> int:
    if args.sources and args.output and args.sources.resolve() == args.output.resolve():
        raise InputError(f"--sources and --output must be two files, got {args.output} for both")
    choose = selection(args)
    # Only what was chosen is kept: it is written when all the input has proved whole, ordered by sentence.
    chosen: dict[int, str] = {}
    sources: dict[int, str] = {}
    for sentence in sentences(args, "mbr"):
        chosen[sentence.number] = sentence.candidates[choose(sentence.candidates)]
        if args.sources:
            sources[sentence.number] = source_of(sentence, args.files)
    if args.sources:
        write_lines([sources[number] for number in sorted(sources)], args.sources)
    write_lines([chosen[number] for number in sorted(chosen)], args.output)
    return 0
