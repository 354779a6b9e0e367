"""Decoding end to end: sentences per second and peak memory, with random weights at published sizes.

    python benchmarks/decode.py --sizes iwslt14 --batches 8 --candidates 10 --steps 20 --official PATH --json out.json

Contenders: this project in float32 and bfloat16; with ``--official PATH`` (a checkout of AR-Diffusion; ``transformers``
must be installed) its network and its sampling loop in float32, at the same sizes, steps and candidates; fairseq's
Transformer of the same width and depth with beam 5, made to write as many tokens for each sentence. ``--real`` takes
the lengths of the bundled Tatoeba sentences: this project then decodes what a length head would ask for, the official
code its fixed length.
Every case (decode_case.py) runs in a process of its own, so that the peak memory is its own. ``--device cuda`` measures on
a GPU, with and without CUDA graphs; its peak memory is what tensors took there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from decode_case import SIZES

CONTENDERS = ("pydiffseq float32", "pydiffseq bfloat16", "official float32", "transformer float32")
GPU_CONTENDERS = ("pydiffseq float16", "pydiffseq bfloat16", "pydiffseq bfloat16 without graphs", "official float32",
                  "transformer float16", "transformer float32")
CASE = Path(__file__).parent / "decode_case.py"


def cases(args: argparse.Namespace) -> list[dict]:
    made = []
    for size, batch, candidates, steps in itertools.product(args.sizes, args.batches, args.candidates, args.steps):
        first = (candidates, steps) == (args.candidates[0], args.steps[0])
        for contender in args.contenders or (CONTENDERS if args.device == "cpu" else GPU_CONTENDERS):
            if contender.startswith("official") and not args.official or contender.startswith("transformer") and not first:
                continue
            made.append({"size": size, "batch": batch, "candidates": candidates, "steps": steps, "real": args.real,
                         "contender": contender, "official": args.official, "seconds": args.seconds, "device": args.device})
    return made


def in_a_process(case: dict, limit: float | None) -> dict | None:
    """What the case's process says; where it took more than ``limit`` seconds, a bound of its speed and no more."""
    command = [sys.executable, str(CASE), json.dumps(case)]
    # Errors go to a file: a pipe that nobody reads while the process loads could fill up and stop it.
    with tempfile.TemporaryFile("w+") as errors, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        sentences = next((int(line.split()[1]) for line in process.stdout if line.startswith("measuring ")), None)
        try:
            output, _ = process.communicate(timeout=limit if sentences else None)   # loading does not count
        except subprocess.TimeoutExpired:
            process.kill()
            return {**case, "sentences_per_second": sentences / limit, "seconds_per_run": None, "peak_mb": None}
        errors.seek(0)
        why = errors.read().strip().splitlines()
    if process.returncode:
        why = why or [f"exit status {process.returncode}"]
        print(f"{case['contender']} failed: {why[-1]}", file=sys.stderr)
        return None
    return json.loads(output.splitlines()[-1])


def hopeless(case: dict, results: list[dict]) -> bool:
    """Whether the contender has run out of time with as many sentences, candidates and steps, or fewer."""
    return any(r["seconds_per_run"] is None and all(r[key] == case[key] for key in ("size", "real", "contender", "device"))
               and all(r[key] <= case[key] for key in ("batch", "candidates", "steps")) for r in results)


def place(result: dict) -> tuple:
    """The row of the table. Candidates and steps do not apply to the Transformer, measured once for a size and a batch."""
    lengths = "real" if result["real"] else "padded"
    steps = ("", "") if result["contender"].startswith("transformer") else (result["candidates"], result["steps"])
    return (result["size"], lengths, result["batch"], *steps)


def speed(result: dict | None) -> str:
    """Sentences per second, three digits; a bound (<) where the time ran out."""
    if result is None:
        return ""
    return ("< " if result["seconds_per_run"] is None else "") + f"{float(format(result['sentences_per_second'], '.3g')):g}"


def ratio(own: dict | None, other: dict | None) -> str:
    """Of the speeds, three digits; a bound (>) where the other one ran out of time."""
    if own is None or other is None or own["seconds_per_run"] is None:
        return "-"
    mark = "> " if other["seconds_per_run"] is None else ""
    return f"{mark}{float(format(own['sentences_per_second'] / other['sentences_per_second'], '.3g')):g}"


def table(results: list[dict]) -> str:
    """A row for each case: sentences/s, ours over the official code's and over the fastest Transformer's, peak memory."""
    names = list(dict.fromkeys(r["contender"] for r in results))
    found = {(place(r), r["contender"]): r for r in results}
    places = list(dict.fromkeys(place(r) for r in results))
    lines = [f"| size | lengths | batch | k | steps | {' | '.join(names)} | x official | x Transformer | MB |",
             "|---|---|---:|---:|---:|" + "---:|" * len(names) + "---|---|---|"]
    for at in places:
        if at[3] == "" and any(other[:3] == at[:3] and other != at for other in places):
            continue   # stands in the rows of the other contenders
        row = {name: found.get((at, name)) or found.get(((*at[:3], "", ""), name)) for name in names}
        transformers = [r for name, r in row.items() if name.startswith("transformer") and r]
        fastest = max(transformers, key=lambda r: r["sentences_per_second"], default=None)
        ours = [r for name, r in row.items() if name.startswith("pydiffseq")]
        cells = [*map(str, at), *map(speed, row.values())]
        cells += [" / ".join(ratio(r, other) for r in ours) for other in (row.get("official float32"), fastest)]
        cells.append(" / ".join(f"{r['peak_mb']:.0f}" if r and r["peak_mb"] else "-" for r in row.values()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 10, 50], metavar="K")
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 3, 20])
    parser.add_argument("--contenders", nargs="+", choices=sorted({*CONTENDERS, *GPU_CONTENDERS}))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--real", action="store_true", help="lengths of the bundled sentences instead of full ones")
    parser.add_argument("--official", help="folder AR-diffusion of a checkout of the official code")
    parser.add_argument("--seconds", type=float, default=0.0, help="repeat each case for so long; the best run counts")
    parser.add_argument("--limit", type=float, help="seconds after which a case is given up, and with it those of its "
                        "contender with as many sentences, candidates and steps, or more")
    parser.add_argument("--json", type=Path, help="write the results, too; cases that are there are not measured again")
    args = parser.parse_args()
    if args.official:
        args.official = os.path.abspath(args.official)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    failed = False
    for case in cases(args):
        described = {key: value for key, value in case.items() if key not in ("official", "seconds")}
        if any(described.items() <= result.items() for result in results) or hopeless(case, results):
            continue
        result = in_a_process(case, args.limit)
        if result is None:
            failed = True
            continue
        results.append({key: value for key, value in result.items() if key not in ("official", "seconds")})
        print(*place(result), result["contender"], speed(result), "sentences/s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print(f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(results))
    if failed:
        sys.exit("some cases failed")


if __name__ == "__main__":
    main()
