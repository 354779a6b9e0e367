"""SacreBLEU of a checkpoint against steps and candidates, as a table: the figures of RESULTS.md.

    python examples/tatoeba_de_en/evaluate.py [CHECKPOINT] [--subsets valid test]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from demo import MODEL, ROOT, generate, prepare, sacrebleu_score

STEPS = (2, 3, 5, 10, 20, 100)
UNROUNDED_STEPS = (3, 10)
# (steps, lengths, noises); the curves over steps have one candidate.
BEAMS = ((3, 3, 1), (3, 3, 2), (10, 3, 2), (3, 5, 4))


def cases() -> list[tuple[int, int, int, str]]:
    """(steps, length beam, noise beam, rounding) of every row."""
    curves = [(steps, 1, 1, "every") for steps in STEPS] + [(steps, 1, 1, "off") for steps in UNROUNDED_STEPS]
    return curves + [(*beam, "every") for beam in BEAMS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODEL / "checkpoint.pt")
    parser.add_argument("--subsets", nargs="+", default=["valid", "test"])
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_args()
    os.chdir(ROOT)
    prepare()
    found = []
    for steps, lengths, noises, rounding in cases():
        row = {"steps": steps, "length_beam": lengths, "noise_beam": noises, "rounding": rounding}
        decode = ["--decode-steps", str(steps), "--length-beam", str(lengths), "--noise-beam", str(noises),
                  "--rounding", rounding]
        for subset in args.subsets:
            rows, seconds = generate(args.checkpoint.resolve(), decode, subset)
            row[subset], row[f"{subset}_seconds"] = round(sacrebleu_score(rows).score, 2), round(seconds, 1)
        found.append(row)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("| steps | lengths x noises | rounding | " + " | ".join(args.subsets) + " | seconds |")
    print("|---:|---|---|" + "---:|" * (len(args.subsets) + 1))
    for row in found:
        scores = " | ".join(f"{row[subset]:.2f}" for subset in args.subsets)
        print(f"| {row['steps']} | {row['length_beam']} x {row['noise_beam']} | {row['rounding']} | {scores} | "
              f"{row[f'{args.subsets[-1]}_seconds']} |")


if __name__ == "__main__":
    main()
