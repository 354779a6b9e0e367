"""Score one sentence per concept set against all its references: SacreBLEU, and how many concepts it mentions.

Usage: score.py generate.txt test.jsonl [--lowercase]

generate.txt is the output of fairseq-generate on the pairs of test.jsonl. The hypothesis of a set is the first one of the
first of its pairs; sets are told apart by their ``src``.
"""

import argparse
import json
from pathlib import Path

import sacrebleu

from pydiffseq.data.candidates import read_candidates


def grouped(hypotheses: dict[int, str], pairs: list[dict[str, str]]) -> list[tuple[str, str, list[str]]]:
    """``(source, hypothesis, references)`` of every concept set, in their order."""
    sets: dict[str, tuple[str, str, list[str]]] = {}
    for number, pair in enumerate(pairs):
        sets.setdefault(pair["src"], (pair["src"], hypotheses[number], []))[2].append(pair["trg"])
    return list(sets.values())


def mentioned(source: str, hypothesis: str) -> float:
    """Share of the concepts that begin a word of the hypothesis, a rough stand-in for coverage of lemmas."""
    words, concepts = hypothesis.lower().split(), source.lower().split()
    stems = [concept[: max(3, len(concept) - 2)] for concept in concepts]
    return sum(any(word.startswith(stem) for word in words) for stem in stems) / len(stems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="what fairseq-generate printed")
    parser.add_argument("pairs", type=Path, help="JSON lines with src and trg")
    parser.add_argument("--lowercase", action="store_true", help="compare lower-cased text")
    args = parser.parse_args()
    pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    found = {sentence.number: sentence.candidates[0] for sentence in read_candidates([args.output], "fairseq", "D")}
    if len(found) != len(pairs):
        raise SystemExit(f"{args.output} has {len(found)} sentences, but {args.pairs} has {len(pairs)} pairs")
    sets = grouped(found, pairs)
    most = max(len(references) for _, _, references in sets)
    # sacrebleu takes as many references for every sentence; None stands for one that is not there.
    streams = [[references[i] if i < len(references) else None for _, _, references in sets] for i in range(most)]
    bleu = sacrebleu.corpus_bleu([hypothesis for _, hypothesis, _ in sets], streams, lowercase=args.lowercase)
    share = sum(mentioned(source, hypothesis) for source, hypothesis, _ in sets) / len(sets)
    print(f"{len(sets)} concept sets: SacreBLEU {bleu.score:.2f}, concepts mentioned {100 * share:.1f} %")


if __name__ == "__main__":
    main()
