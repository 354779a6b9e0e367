"""Turn parallel text into fairseq's binarised data (memory-mapped), with a joint vocabulary that both languages share.

The vocabulary is a sentencepiece model trained on the training split (the default), a sentencepiece model that you
have, subword-nmt codes, or a fairseq dictionary of tokens that are already split at blanks. Text may be plain, .gz or
.xz and is read as a stream. The output folder appears only when it is complete.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydiffseq.errors import InputError
from pydiffseq.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from pydiffseq.data.binarize import SplitReport
    from pydiffseq.data.text import Corpus
    from pydiffseq.data.vocabulary import Encoder

Item = TypeVar("Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text (prefixes as for fairseq-preprocess: PREFIX.LANG, PREFIX.LANG.xz or .gz)")
    text.add_argument("-s", "--source-lang", metavar="LANG", help="source language: suffix of the source files")
    text.add_argument("-t", "--target-lang", metavar="LANG", help="target language: suffix of the target files")
    text.add_argument("--trainpref", metavar="PREFIX", required=True, help="training text")
    text.add_argument("--validpref", metavar="PREFIX[,PREFIX]", default="", help="validation text")
    text.add_argument("--testpref", metavar="PREFIX[,PREFIX]", default="", help="test text")
    text.add_argument("--jsonl", action="store_true",
                      help="the prefixes name files of JSON lines (FILE or PREFIX.jsonl, .xz or .gz), one "
                           '{"src": "...", "trg": "..."} per line; the languages are then called src and tgt'
                           " unless given")
    text.add_argument("--source-key", metavar="KEY", default="src", help="key of the source text in JSON lines")
    text.add_argument("--target-key", metavar="KEY", default="trg", help="key of the target text in JSON lines")

    words = parser.add_argument_group("vocabulary")
    words.add_argument("--vocab-size", type=int, default=6000, metavar="N",
                       help="size of the dictionary, its four special symbols included, when a model is trained")
    words.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram",
                       help="kind of sentencepiece model to train")
    words.add_argument("--normalization", choices=("nmt_nfkc", "nmt_nfkc_cf"), default="nmt_nfkc",
                       help="normalisation inside the sentencepiece model; nmt_nfkc_cf also lower-cases")
    words.add_argument("--character-coverage", type=float, default=1.0, metavar="SHARE",
                       help="share of the characters of the training text that get a piece of their own; the rarest "
                            "others become <unk>")
    words.add_argument("--sentencepiece-model", type=Path, metavar="FILE",
                       help="use this model instead of training one")
    words.add_argument("--srcdict", type=Path, metavar="FILE",
                       help="fairseq dictionary for both languages; without a model or codes, text is split at blanks")
    words.add_argument("--bpe-codes", type=Path, metavar="FILE",
                       help="subword-nmt codes to split tokens with; without --srcdict the dictionary is counted")

    output = parser.add_argument_group("output")
    output.add_argument("--destdir", type=Path, required=True, metavar="DIR", help="folder to write")
    output.add_argument("--overwrite", action="store_true", help="replace the prepared data that DIR holds")
    output.add_argument("--workers", type=int, default=None, metavar="N",
                        help="threads that encode sentencepieces (default: all processors)")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    from pydiffseq.data.binarize import MARKER, check_destination, new_folder

    check_arguments(args)
    check_destination(args.destdir, args.overwrite)
    started = time.monotonic()
    splits = find_splits(args)
    require_fairseq("prepare")
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up
    try:
        sizes = read_through(splits, args.quiet)
        with new_folder(args.destdir, args.overwrite) as folder:
            encoder, counts = make_encoder(args, splits["train"], sizes["train"])
            reports = write_splits(args, splits, sizes, encoder, counts, folder)
            record = describe(args, splits, encoder, reports)
            (folder / MARKER).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"{args.destdir}: {len(encoder.dictionary):,} dictionary entries, {time.monotonic() - started:.0f} s")
    print(f"decode with: {decoding_options(args)}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in the languages of JSON lines and refuse options that do not go together."""
    if args.jsonl:
        args.source_lang, args.target_lang = args.source_lang or "src", args.target_lang or "tgt"
    if not (args.source_lang and args.target_lang):
        raise InputError("--source-lang and --target-lang are needed for text files (or --jsonl for JSON lines)")
    if args.source_lang == args.target_lang:
        raise InputError(f"--source-lang and --target-lang must differ, both are {args.source_lang!r}")
    if args.bpe_codes and args.sentencepiece_model:
        raise InputError("--bpe-codes and --sentencepiece-model exclude each other; give one")
    if args.sentencepiece_model and not args.sentencepiece_model.is_file():
        raise InputError(f"no sentencepiece model {args.sentencepiece_model}")
    if args.vocab_size < 8:
        raise InputError(f"--vocab-size must be at least 8, got {args.vocab_size}")
    if not 0 < args.character_coverage <= 1:
        raise InputError(f"--character-coverage must be above 0 and at most 1, got {args.character_coverage}")
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, got {args.workers}")


def find_splits(args: argparse.Namespace) -> dict[str, Corpus]:
    """``train``, ``valid``, ``valid1``, ..., ``test``, ... with their files."""
    from pydiffseq.data.text import JsonLines, TextFiles

    def find(prefix: str) -> Corpus:
        if args.jsonl:
            return JsonLines.find(prefix, args.source_key, args.target_key)
        return TextFiles.find(prefix, args.source_lang, args.target_lang)

    splits = {"train": find(args.trainpref)}
    for name, prefixes in (("valid", args.validpref), ("test", args.testpref)):
        for i, prefix in enumerate(filter(None, prefixes.split(","))):
            splits[f"{name}{i or ''}"] = find(prefix)
    return splits


def read_through(splits: dict[str, Corpus], quiet: bool) -> dict[str, int]:
    """Number of lines of each split. Finds what is wrong with the text before any work is done."""
    sizes = {}
    for name, corpus in splits.items():
        lines = usable = 0
        for source, target in progress(corpus, f"reading {name}", None, quiet):
            lines += 1
            usable += bool(source.strip() and target.strip())
        sizes[name] = lines
        if name == "train" and not usable:
            raise InputError(f"the training text {corpus.name} has no pair with text on both sides")
    return sizes


def require_fairseq(command: str) -> None:
    # fairseq mentions at import what its speech tasks lack.
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    try:
        import fairseq.data  # noqa: F401
    except ImportError as error:
        raise InputError(f"pydiffseq {command} needs fairseq ({error}): pip install fairseq-fixed") from error


def progress(items: Iterable[Item], label: str, total: int | None, quiet: bool) -> Iterator[Item]:
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, disable=quiet, unit=" pairs", unit_scale=True,
                mininterval=0.2 if sys.stderr.isatty() else 2.0)


def make_encoder(args: argparse.Namespace, train: Corpus, size: int) -> tuple[Encoder, np.ndarray | None]:
    """The encoder that the options ask for, and zeros int64 ``[V]`` if its dictionary is still to be counted."""
    import numpy as np

    from pydiffseq.data import vocabulary

    def sentences(label: str) -> Iterator[str]:
        return itertools.chain.from_iterable(progress(train, label, size, args.quiet))

    dictionary = vocabulary.load_dictionary(args.srcdict) if args.srcdict else None
    if args.bpe_codes or (dictionary is not None and not args.sentencepiece_model):
        split = vocabulary.load_bpe_codes(args.bpe_codes) if args.bpe_codes else None
        files = {"bpe.codes": args.bpe_codes.read_bytes()} if args.bpe_codes else None
        if dictionary is None:
            dictionary = vocabulary.count_dictionary(sentences("counting tokens"), split)
        return vocabulary.TokenEncoder(dictionary, split, files), None
    if args.sentencepiece_model:
        model = args.sentencepiece_model.read_bytes()
    else:
        print(f"training a sentencepiece model ({args.model_type}, {args.vocab_size:,} entries)", file=sys.stderr)
        model = vocabulary.train_sentencepiece(
            sentences("feeding sentencepiece"), args.vocab_size, model_type=args.model_type,
            normalization=args.normalization, character_coverage=args.character_coverage)
    encoder = vocabulary.SentencePieceEncoder(model, dictionary, args.workers)
    return encoder, None if dictionary is not None else np.zeros(len(encoder.dictionary), np.int64)


def write_splits(args: argparse.Namespace, splits: dict[str, Corpus], sizes: dict[str, int], encoder: Encoder,
                 counts: np.ndarray | None, folder: Path) -> dict[str, SplitReport]:
    """Write data, dictionaries and the vocabulary's own files into ``folder``."""
    from pydiffseq.data.binarize import write_split
    from pydiffseq.data.vocabulary import set_counts

    languages = (args.source_lang, args.target_lang)
    reports = {}
    for name, corpus in splits.items():
        stem = folder / f"{name}.{'-'.join(languages)}"
        pairs = progress(corpus, f"encoding {name}", sizes[name], args.quiet)
        training = name == "train"
        reports[name] = write_split(pairs, encoder, (f"{stem}.{languages[0]}", f"{stem}.{languages[1]}"),
                                    skip_empty=training, counts=counts if training else None)
        print(f"{name}: {reports[name].sentence()}")
        if training and not reports[name].pairs:
            raise InputError(f"every pair of the training text {corpus.name} has an empty side")
    if counts is not None:
        set_counts(encoder.dictionary, counts)
    for language in languages:
        encoder.dictionary.save(str(folder / f"dict.{language}.txt"))
    for name, content in encoder.files.items():
        (folder / name).write_bytes(content)
    return reports


def describe(args: argparse.Namespace, splits: dict[str, Corpus], encoder: Encoder,
             reports: dict[str, SplitReport]) -> dict:
    """What ``prepare.json`` records: where the data came from, without machine-specific paths."""
    return {
        "pydiffseq": __version__,
        "source_lang": args.source_lang,
        "target_lang": args.target_lang,
        "dictionary_entries": len(encoder.dictionary),
        "vocabulary_files": sorted(encoder.files),
        "splits": {name: {"text": splits[name].name, **asdict(report)} for name, report in reports.items()},
    }


def decoding_options(args: argparse.Namespace) -> str:
    """The options that make fairseq-interactive and -generate undo the encoding."""
    if args.bpe_codes:
        return f"--bpe subword_nmt --bpe-codes {args.destdir / 'bpe.codes'} --remove-bpe"
    if args.srcdict and not args.sentencepiece_model:
        return "nothing to undo, the tokens are as given (--remove-bpe if they hold '@@ ' marks)"
    model = args.destdir / "sentencepiece.model"
    return f"--bpe sentencepiece --sentencepiece-model {model} --remove-bpe sentencepiece"
