"""Decodes a split with many option sets, one network for all: quality against steps and candidates, for each solver.

    python tools/quality_curve.py qqp checkpoints/checkpoint_last.pt --sentences 500 --bf16 --out curve.jsonl \\
        --solver ddim ancestral --steps 2 5 10 20 100 --candidates 1 3 10

Steps are measured with one candidate; candidates with 10 steps. Every line of --out is one option set with the values of
pydiffseq evaluate; a second call adds what is not there yet, so it may be interrupted. --table and --csv show what the
file holds, as Markdown and for tools/plot_curves.py. Sources that come several times in a row (CommonGen) are decoded
once and scored against all their references. Text is compared as the data has it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CANDIDATE_STEPS = 10
KEYS = ("solver", "steps", "noise_beam", "length_beam", "rounding", "sentences", "bf16", "split")


class Data:
    """The sources of a split, one for each run of equal ones, with their texts and references."""

    def __init__(self, task: Any, split: str, sentences: int) -> None:
        task.load_dataset(split)
        data, words = task.dataset(split), task.target_dictionary
        self.string = lambda tokens: words.string(tokens, "sentencepiece")
        pairs = (data[i] for i in range(len(data)))
        runs = ((source, list(run)) for source, run in
                itertools.groupby(pairs, key=lambda pair: tuple(pair["source"].tolist())))
        chosen = [(run[0]["id"], run[0]["source"], [self.string(pair["target"]) for pair in run])
                  for _, run in itertools.islice(runs, sentences or None)]
        chosen.sort(key=lambda row: len(row[1]))   # so that there is little padding
        self.ids, self.sources, self.references = zip(*chosen, strict=True)
        self.pad = words.pad()

    def batches(self, size: int) -> Iterator[tuple[Any, Any]]:
        import torch

        for start in range(0, len(self.ids), size):
            rows = slice(start, start + size)
            sources = torch.nn.utils.rnn.pad_sequence(list(self.sources[rows]), True, self.pad)
            yield sources, torch.tensor(self.ids[rows])


def load(folder: Path, checkpoint: Path, bf16: bool) -> tuple[Any, Any]:
    """The averaged network of a checkpoint, and its task."""
    from fairseq import checkpoint_utils

    import pydiffseq.fairseq_plugin  # noqa: F401

    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides={"data": str(folder)})
    network = models[0].eval().network().eval()
    return network.bfloat16() if bf16 else network, task


def score(network: Any, data: Data, options: dict[str, Any], batch: int) -> dict[str, Any]:
    """What ``pydiffseq evaluate`` says of decoding with ``options``, how many outputs copy their source, and seconds."""
    from pydiffseq.cli.evaluate import diversity, quality
    from pydiffseq.decoding import DecodeOptions, Decoder

    started, decoder = time.time(), Decoder(network, DecodeOptions(**options))
    groups = [[data.string(hypothesis.tokens) for hypothesis in group]
              for sources, ids in data.batches(batch) for group in decoder(sources, ids)]
    values = quality([group[0] for group in groups], data.references) | diversity(groups)
    copies = sum(group[0] == data.string(source) for group, source in zip(groups, data.sources, strict=True))
    return values | {"copies": copies, "seconds": round(time.time() - started, 1)}


def option_sets(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Steps with one candidate first, then candidates; cheap ones first, so that an interrupted run has a table."""
    common = {"rounding": args.rounding}
    for steps, solver in itertools.product(args.steps, args.solver):
        yield {"solver": solver, "steps": steps, "noise_beam": 1, "length_beam": 1, **common}
    for candidates, solver in itertools.product(args.candidates, args.solver):
        for lengths in args.lengths:
            if candidates % lengths == 0 and candidates > 1:
                yield {"solver": solver, "steps": CANDIDATE_STEPS, "noise_beam": candidates // lengths,
                       "length_beam": lengths, **common}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(args: argparse.Namespace) -> None:
    import torch

    done = {tuple(row[key] for key in KEYS) for row in read(args.out)}
    network, task = load(args.folder, args.checkpoint, args.bf16)
    data = Data(task, args.split, args.sentences)
    fixed = {"sentences": len(data.ids), "bf16": args.bf16, "split": args.split}
    for options in option_sets(args):
        if tuple((options | fixed)[key] for key in KEYS) in done:
            continue
        with torch.inference_mode():
            row = options | fixed | score(network, data, options, args.batch)
        with args.out.open("a") as file:
            print(json.dumps(row), file=file)
        print(row["solver"], row["steps"], row["noise_beam"] * row["length_beam"], round(row["sacrebleu"], 2),
              f"{row['seconds']} s", flush=True)


def named(row: dict[str, Any]) -> str:
    return row["solver"] + ("" if row["rounding"] == "every" else f", rounding {row['rounding']}")


def table(rows: Sequence[dict[str, Any]], column: str, value: str) -> str:
    """Markdown: a line for each solver, a column for each number of steps or candidates."""
    cells = {(named(row), row[column]): row[value] for row in rows if value in row}
    heads = sorted({head for _, head in cells})
    lines = [f"| | {' | '.join(map(str, heads))} |", "|---|" + "---:|" * len(heads)]
    digits = 2 if value in ("sacrebleu", "length") else 3
    for name in dict.fromkeys(name for name, _ in cells):
        texts = [f"{cells[name, head]:.{digits}f}" if (name, head) in cells else "" for head in heads]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def chosen(rows: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """The rows of a curve: of the steps those with one candidate, of the candidates those with ten steps."""
    rows = [row | {"candidates": row["noise_beam"] * row["length_beam"]} for row in rows]
    if column == "steps":
        return [row for row in rows if row["candidates"] == 1]
    return [row for row in rows if row["steps"] == CANDIDATE_STEPS]


def show(args: argparse.Namespace) -> None:
    rows = chosen(read(args.out), args.show)
    if args.csv:
        lines = [f"{named(row)},{row[args.show]},{row[args.value]}" for row in rows]
        args.csv.write_text("\n".join([f"solver,{args.show},{args.value}", *lines]) + "\n")
    print(table(rows, args.show, args.value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="binarised data")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, to which is added")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sentences", type=int, default=0, metavar="N", help="the first N of the split (0: all)")
    parser.add_argument("--solver", nargs="+", default=["ddim", "ancestral"])
    parser.add_argument("--steps", nargs="*", type=int, default=[2, 5, 10, 20, 100])
    parser.add_argument("--candidates", nargs="*", type=int, default=[])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1], metavar="K",
                        help="of the candidates, how many lengths; the rest of the factor are noises")
    parser.add_argument("--rounding", default="every")
    parser.add_argument("--batch", type=int, default=125, metavar="N", help="sentences at once")
    parser.add_argument("--bf16", action="store_true", help="the network in bfloat16")
    parser.add_argument("--show", choices=("steps", "candidates"), help="measure nothing, print the table of --out")
    parser.add_argument("--value", default="sacrebleu", help="which value --show prints")
    parser.add_argument("--csv", type=Path, help="also write what --show prints here, for tools/plot_curves.py")
    args = parser.parse_args()
    if args.show:
        show(args)
    elif args.checkpoint is None:
        parser.error("give the data folder and a checkpoint, or --show")
    else:
        measure(args)


if __name__ == "__main__":
    main()
