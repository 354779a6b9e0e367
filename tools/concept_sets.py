"""More concept sets for CommonGen: those of a training sentence, with further concepts that the sentence mentions.

    python tools/concept_sets.py commongen --out more

Three in four training sets have three concepts, every test set four or five. So each training sentence gets a set of four
or five: its own concepts and others among its words, where a concept is a word that at least --often training sets have,
found without s, es, ed, ing and the like. Sets that valid, test or train have are left out. Writes OUT.src and OUT.tgt.
"""

from __future__ import annotations

import argparse
import lzma
import random
import re
from collections import Counter
from pathlib import Path

ENDINGS = (("", ""), ("s", ""), ("es", ""), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e"), ("ies", "y"), ("ied", "y"))
SHORTEST = 3    # letters of a concept
LARGEST = 5     # concepts of a set


def lines(folder: Path, split: str, side: str) -> list[str]:
    plain, packed = folder / f"{split}.{side}", folder / f"{split}.{side}.xz"
    if plain.exists():
        return plain.read_text(encoding="utf-8").splitlines()
    if not packed.exists():
        raise SystemExit(f"no {split}.{side} in {folder}: a line for each set or sentence, plain or as {packed.name}")
    return lzma.decompress(packed.read_bytes()).decode().splitlines()


def concept_of(word: str, concepts: set[str]) -> str | None:
    """The concept that ``word`` is a form of, by its ending."""
    for ending, instead in ENDINGS:
        stem = word.removesuffix(ending) + instead if word.endswith(ending) else ""
        doubled = stem[:-1] if len(stem) > SHORTEST and stem[-1] == stem[-2] else stem   # running -> run
        for form in (stem, doubled):
            if len(form) >= SHORTEST and form in concepts:
                return form
    return None


def mentioned(sentence: str, own: list[str], concepts: set[str]) -> list[str]:
    """Concepts among the words of ``sentence``, each once; none that shares its first four letters with an ``own`` one."""
    found: list[str] = []
    for word in re.findall("[a-z]+", sentence.lower()):
        concept = concept_of(word, concepts)
        if concept and concept not in found and not any(concept[:4] == other[:4] for other in own):
            found.append(concept)
    return found


def more_sets(pairs: list[tuple[str, str]], taken: set[tuple[str, ...]], often: int, seed: int) -> list[tuple[str, str]]:
    """New (set, sentence) pairs, at most one for each pair."""
    counts = Counter(word for source in {source for source, _ in pairs} for word in source.split())
    concepts = {word for word, count in counts.items() if count >= often}
    taken, draw, made = set(taken), random.Random(seed), []
    for source, sentence in pairs:
        own = source.split()
        others = mentioned(sentence, own, concepts)
        size = draw.choice((LARGEST - 1, LARGEST))
        wanted = min(len(others), max(1, size - len(own)))
        if len(own) >= LARGEST or len(own) + wanted < LARGEST - 1:
            continue
        chosen = own + draw.sample(others, wanted)
        draw.shuffle(chosen)
        key = tuple(sorted(chosen))
        if key not in taken:
            taken.add(key)
            made.append((" ".join(chosen), sentence))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train, valid and test .src and .tgt, plain or .xz")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the files to write")
    parser.add_argument("--often", type=int, default=10, help="training sets that have a concept, at least")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    pairs = list(zip(lines(args.data, "train", "src"), lines(args.data, "train", "tgt"), strict=True))
    sources = [source for split in ("train", "valid", "test") for source in lines(args.data, split, "src")]
    taken = {tuple(sorted(source.split())) for source in sources}
    made = more_sets(pairs, taken, args.often, args.seed)
    if not made:
        raise SystemExit(f"no new sets: no sentence of {args.data}/train.tgt mentions enough further concepts")
    for side, column in zip(("src", "tgt"), zip(*made, strict=True), strict=True):
        args.out.with_name(f"{args.out.name}.{side}").write_text("".join(f"{line}\n" for line in column), encoding="utf-8")
    print(f"{len(made):,} sets of {Counter(len(source.split()) for source, _ in made)} concepts")


if __name__ == "__main__":
    main()
