"""Score hypotheses with the metrics of the DiffuSeq and AR-Diffusion papers.

Hypotheses come from text files (one line per sentence), from fairseq-generate's output, from JSON lists of candidates, or
from DiffuSeq's JSON lines (recover, reference, source). Several files, or several hypotheses of a sentence, are
candidates: diversity is measured over all of them, quality on the first, or with --mbr on the one that minimum Bayes
risk chooses. SacreBLEU goes from 0 to 100, everything else from 0 to 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
    parser.add_argument("-r", "--references", type=Path, metavar="FILE",
                        help="reference per line, where the files hold none")
    parser.add_argument("--bleu-tokenize", choices=TOKENIZERS, default="13a", help="tokeniser of SacreBLEU")
    parser.add_argument("--bert-model", type=Path, metavar="DIR",
                        help="local Hugging Face model for BERTScore (published: deberta-xlarge-mnli); needs bert-score")
    parser.add_argument("--bert-layer", type=int, default=40, metavar="N", help="its layer that BERTScore compares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the values to this file")
    choice = parser.add_argument_group("which candidate is scored (default: the first)")
    choice.add_argument("--mbr", action="store_true", help="the one that minimum Bayes risk chooses")
    add_selection_arguments(choice, "--mbr-")


def read(args: argparse.Namespace) -> list[Sentence]:
    """All sentences in order, each with a reference."""
    from pydiffseq.data.text import read_lines

    found = sorted(sentences(args, "reading"), key=lambda sentence: sentence.number)
    if args.references:
        lines = [line.strip() for line in read_lines(args.references)]
        if len(lines) != len(found):
            raise InputError(f"{args.references} has {len(lines)} references, but there are {len(found)} sentences")
        for sentence, line in zip(found, lines, strict=True):
            sentence.reference = line
    missing = next((sentence for sentence in found if sentence.reference is None), None)
    if missing is not None:
        raise InputError(f"sentence {missing.number} (of {args.files[0]}, counted from 0) has no reference; give "
                         "--references FILE")
    if args.lowercase:
        for sentence in found:
            sentence.candidates = [text.lower() for text in sentence.candidates]
            sentence.reference = str(sentence.reference).lower()
    return found


def quality(hypotheses: Sequence[str], references: Sequence[str], tokenize: str, lowercase: bool) -> dict[str, Any]:
    """Scores of one hypothesis per sentence; ``signature`` says how sacrebleu counted."""
    from sacrebleu import BLEU

    from pydiffseq.metrics import distinct_n, rouge_l, rouge_n, rouge_tokens, sentence_bleu

    corpus = BLEU(tokenize=tokenize, lowercase=lowercase)
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        words, ours, theirs = hypothesis.split(), rouge_tokens(hypothesis), rouge_tokens(reference)
        rows.append((sentence_bleu(words, reference.split(), "method4"), rouge_n(ours, theirs, 1),
                     rouge_n(ours, theirs, 2), rouge_l(ours, theirs), distinct_n([words], 1), float(len(words))))
    names = ("sentence_bleu", "rouge1", "rouge2", "rougeL", "dist1", "length")
    means = {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    score = corpus.corpus_score(list(hypotheses), [list(references)]).score
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
    references = [str(sentence.reference) for sentence in found]
    values: dict[str, Any] = quality(hypotheses, references, args.bleu_tokenize, args.lowercase)
    values |= diversity([sentence.candidates for sentence in found])
    values["bert_score"], remark = _bert_score(hypotheses, references, args)
    values |= {"sentences": len(found), "candidates": max(len(sentence.candidates) for sentence in found),
               "scored": f"MBR ({args.metric}, {args.smoothing}, {args.direction})" if args.mbr else "first candidate"}
    print(table(values, remark))
    if args.json:
        write_lines([json.dumps(values, indent=2)], args.json)
    return 0


def _bert_score(hypotheses: Sequence[str], references: Sequence[str],
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
