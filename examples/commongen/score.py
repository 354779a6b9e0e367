"""How many of its concepts one sentence per concept set mentions.

Usage: score.py generate.txt test.jsonl

generate.txt is the output of fairseq-generate on the pairs of test.jsonl. The hypothesis of a set is the first one of the
first of its pairs; sets are told apart by their ``src``.
"""

import argparse
import json
from pathlib import Path

from pydiffseq.data.candidates import read_candidates


def mentioned(source: str, hypothesis: str) -> float:
    """Share of the concepts that begin a word of the hypothesis, a rough stand-in for coverage of lemmas."""
    words, concepts = hypothesis.lower().split(), source.lower().split()
    stems = [concept[: max(3, len(concept) - 2)] for concept in concepts]
    return sum(any(word.startswith(stem) for word in words) for stem in stems) / len(stems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="what fairseq-generate printed")
    parser.add_argument("pairs", type=Path, help="JSON lines with src and trg")
    args = parser.parse_args()
    sources = [json.loads(line)["src"] for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    found = {sentence.number: sentence.candidates[0] for sentence in read_candidates([args.output], "fairseq", "D")}
    if len(found) != len(sources):
        raise SystemExit(f"{args.output} has {len(found)} sentences, but {args.pairs} has {len(sources)} pairs")
    first: dict[str, str] = {}
    for number, source in enumerate(sources):
        first.setdefault(source, found[number])
    share = sum(mentioned(source, hypothesis) for source, hypothesis in first.items()) / len(first)
    print(f"{len(first)} concept sets: concepts mentioned {100 * share:.1f} %")


if __name__ == "__main__":
    main()
