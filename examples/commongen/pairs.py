"""CommonGen's JSON lines (concept_set, scene) -> one {"src", "trg"} pair per sentence, for ``pydiffseq prepare --jsonl``.

Usage: pairs.py commongen.train.jsonl > train.jsonl
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator


def pairs(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """``ski_V#mountain_N#skier_N`` becomes ``ski mountain skier``; a concept set has a pair for each of its scenes."""
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            concepts, scenes = record["concept_set"], record["scene"]
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(
                f"line {number} must be a JSON object with concept_set and scene, got {line[:60]!r}") from error
        source = " ".join(re.sub(r"_[A-Z]$", "", concept) for concept in concepts.split("#"))
        for scene in scenes:
            yield {"src": source, "trg": scene.strip()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        for pair in pairs(file):
            print(json.dumps(pair, ensure_ascii=False))
