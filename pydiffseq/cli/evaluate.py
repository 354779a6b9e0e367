"""Score hypotheses with the metrics of the DiffuSeq and AR-Diffusion papers.

Hypotheses come from text files (one line per sentence), from fairseq-generate's output, from JSON lists of candidates, or
from DiffuSeq's JSON lines (recover, reference, source). Several files, or several hypotheses of a sentence, are
candidates: diversity is measured over all of them, quality on the first, or with --mbr on the one that minimum Bayes
risk chooses. Where a sentence has several references, both BLEUs take all of them, ROUGE and BERTScore the best one.
SacreBLEU goes from 0 to 100, everything else from 0 to 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydiffseq.cli.mbr import TOKENIZERS, add_input_arguments, add_selection_arguments, selection, sentences, write_lines
from pydiffseq.errors import InputError

if TYPE_CHECKING:
    from pydiffseq.data.candidates import Sentence

ROWS = {
    "sacrebleu": "SacreBLEU", "sentence_bleu": "sentence BLEU (method4)", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L", "bert_score": "BERTScore", "dist1": "dist-1", "length": "words", "self_bleu": "self-BLEU",
    "div4": "div-4"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("-r", "--references", type=Path, nargs="+", metavar="FILE",
                        help="reference per line, where the files hold none; several files hold a reference each, and an "
                             "empty line in them none")
    parser.add_argument("--join-sources", action="store_true",
                        help="sentences in a row that have the same source count as one with all their references and the "
                             "candidates of the first (CommonGen); the files must hold the sources")
    parser.add_argument("--bleu-tokenize", choices=TOKENIZERS, default="13a", help="tokeniser of SacreBLEU")
    parser.add_argument("--bert-model", type=Path, metavar="DIR",
                        help="local Hugging Face model for BERTScore (published: deberta-xlarge-mnli); needs bert-score")
    parser.add_argument("--bert-layer", type=int, default=40, metavar="N", help="its layer that BERTScore compares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the values to this file")
    choice = parser.add_argument_group("which candidate is scored (default: the first)")
    choice.add_argument("--mbr", action="store_true", help="the one that minimum Bayes risk chooses")
    add_selection_arguments(choice, "--mbr-")


def read(args: argparse.Namespace) -> list[Sentence]:
    """All sentences in order, each with at least one reference."""
    found = sorted(sentences(args, "reading"), key=lambda sentence: sentence.number)
    if args.references:
        for sentence, texts in zip(found, _references(args.references, len(found)), strict=True):
            sentence.references = texts
    missing = next((sentence for sentence in found if not sentence.references), None)
    if missing is not None:
        raise InputError(f"sentence {missing.number} (of {args.files[0]}, counted from 0) has no reference; give "
                         "--references FILE")
    if args.join_sources:
        found = joined(found, str(args.files[0]))
    if args.lowercase:
        for sentence in found:
            sentence.candidates = [text.lower() for text in sentence.candidates]
            sentence.references = [text.lower() for text in sentence.references]
    return found


def _references(paths: Sequence[Path], count: int) -> list[list[str]]:
    """The references of each of ``count`` sentences; of several files, without the empty lines."""
    from pydiffseq.data.text import read_lines

    columns = []
    for path in paths:
        columns.append([line.strip() for line in read_lines(path)])
        if len(columns[-1]) != count:
            raise InputError(f"{path} has {len(columns[-1])} references, but there are {count} sentences")
    rows = zip(*columns, strict=True)
    return [[text for text in row if text] if len(paths) > 1 else list(row) for row in rows]


def joined(found: Sequence[Sentence], name: str) -> list[Sentence]:
    """One sentence for each run of the same source, with the references of all and the candidates of the first.

    Raises:
        InputError: a sentence has no source; ``name`` says whose.
    """
    groups: list[Sentence] = []
    for sentence in found:
        if sentence.source is None:
            raise InputError(f"--join-sources needs the source of each sentence, but sentence {sentence.number} (of "
                             f"{name}, counted from 0) has none")
        if groups and groups[-1].source == sentence.source:
            groups[-1].references += sentence.references
        else:
            groups.append(sentence)
    return groups


def quality(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a",
            lowercase: bool = False) -> dict[str, Any]:
    """Scores of one hypothesis per sentence, which has one or more references; ``signature``: how sacrebleu counted."""
    from sacrebleu import BLEU

    from pydiffseq.metrics import distinct_n, rouge_l, rouge_n, rouge_tokens, sentence_bleu

    corpus = BLEU(tokenize=tokenize, lowercase=lowercase)
    rows = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words, ours = hypothesis.split(), rouge_tokens(hypothesis)
        bleu = sentence_bleu(words, texts[0].split(), "method4", *(text.split() for text in texts[1:]))
        theirs = [rouge_tokens(text) for text in texts]
        rouge = (max(score(ours, tokens) for tokens in theirs)
                 for score in (partial(rouge_n, n=1), partial(rouge_n, n=2), rouge_l))
        rows.append((bleu, *rouge, distinct_n([words], 1), float(len(words))))
    names = ("sentence_bleu", "rouge1", "rouge2", "rougeL", "dist1", "length")
    means = {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    # sacrebleu takes as many references for every sentence; None stands for one that is not there.
    streams = [list(column) for column in zip_longest(*references)]
    score = corpus.corpus_score(list(hypotheses), streams).score
    return {"sacrebleu": score, **means, "signature": str(corpus.get_signature())}


def diversity(candidates: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean self-BLEU and div-4 over the sentences that have several candidates."""
    from pydiffseq.decoding.mbr import pairwise_utilities
    from pydiffseq.metrics import distinct_n, self_bleu

    groups = [[text.split() for text in texts] for texts in candidates if len(texts) > 1]
    if not groups:
        return {}
    return {"self_bleu": sum(self_bleu(pairwise_utilities(group, "bleu", "method4")) for group in groups) / len(groups),
            "div4": sum(distinct_n(group, 4) for group in groups) / len(groups)}


def run(args: argparse.Namespace) -> int:
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"the folder {args.json.parent} of --json does not exist")
    found = read(args)
    choose = selection(args)
    hypotheses = [sentence.candidates[choose(sentence.candidates) if args.mbr else 0] for sentence in found]
    references = [sentence.references for sentence in found]
    values: dict[str, Any] = quality(hypotheses, references, args.bleu_tokenize, args.lowercase)
    values |= diversity([sentence.candidates for sentence in found])
    values["bert_score"], remark = _bert_score(hypotheses, references, args)
    values |= {"sentences": len(found), "candidates": max(len(sentence.candidates) for sentence in found),
               "scored": f"MBR ({args.metric}, {args.smoothing}, {args.direction})" if args.mbr else "first candidate"}
    print(table(values, remark))
    if args.json:
        write_lines([json.dumps(values, indent=2)], args.json)
    return 0


def _bert_score(hypotheses: Sequence[str], references: Sequence[Sequence[str]],
                args: argparse.Namespace) -> tuple[float | None, str]:
    """The score, or ``None`` and why; a model that was asked for and cannot be used is an error."""
    from pydiffseq.metrics.bert_score import Unavailable, bert_score

    if args.bert_model is None:
        return None, "not computed: give a local model with --bert-model DIR"
    try:
        return bert_score(hypotheses, references, args.bert_model, args.bert_layer), ""
    except Unavailable as error:
        raise InputError(f"BERTScore cannot be computed: {error}") from error


def table(values: dict[str, Any], bert_remark: str) -> str:
    """The values as lines of a table; what was not computed says why."""
    lines = [f"{values['sentences']:,} sentences, {values['candidates']} candidate(s), scored: {values['scored']}"]
    for name, label in ROWS.items():
        if values.get(name) is not None:
            digits = 2 if name in ("sacrebleu", "length") else 4
            lines.append(f"{label:24} {values[name]:8.{digits}f}")
    if bert_remark:
        lines.append(f"{ROWS['bert_score']:24}        - ({bert_remark})")
    return "\n".join([*lines, f"SacreBLEU: {values['signature']}"])
