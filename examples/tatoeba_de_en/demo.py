"""The demo behind ``make demo``: translate with the shipped model, train one from scratch, translate again.

Every step is a stock command, printed before it runs; this script only runs them in order and shows their results.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import sacrebleu

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = Path("work/tatoeba_distilled")
MODEL = HERE / "model"
BIN = Path(sys.executable).parent
SHOWN = 10
DECODE = ["--decode-steps", "3", "--length-beam", "3", "--noise-beam", "2"]
# The recipe of the shipped checkpoint but for the warm-up, the moving average and the learning rate's end (see RESULTS.md).
RECIPE = [
    "--task", "diffusion_seq2seq", "--arch", "ar_diffusion_plus", "--criterion", "diffusion_seq2seq",
    "--mse-weight", "0.1",
    "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "2e-3", "--lr-scheduler", "inverse_sqrt",
    "--warmup-updates", "300", "--clip-norm", "1.0", "--weight-decay", "0.01", "--max-tokens", "3000",
    "--required-batch-size-multiple", "32", "--required-seq-len-multiple", "2",
]


def heading(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


def show(command: list[str]) -> list[str]:
    """Print a command as one would type it, and return it with the program's full path."""
    words = [f"'{word}'" if re.search(r"[\s()]", word) else word for word in map(str, command)]
    print("$ " + " ".join(words), flush=True)
    return [str(BIN / command[0]), *map(str, command[1:])]


def environment() -> dict[str, str]:
    # The warnings of fairseq's own imports tell a user of this demo nothing.
    return {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}


def run(command: list[str], keep: re.Pattern | None = None) -> list[str]:
    """Run a command; print the output lines that match ``keep`` as they come, and return all lines."""
    process = subprocess.Popen(show(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               cwd=ROOT, env=environment())
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if keep and (match := keep.search(line)):
            print("  " + match.group(0), flush=True)
    if process.wait():
        print("\n".join(lines[-20:]), file=sys.stderr)
        raise SystemExit(f"demo: {command[0]} ended with status {process.returncode}; its last lines are above")
    return lines


def prepare() -> None:
    if (ROOT / DATA / "dict.en.txt").exists():
        print(f"{DATA} is there already")
        return
    command = ["pydiffseq", "prepare", "-s", "de", "-t", "en", "--destdir", str(DATA),
               "--sentencepiece-model", str(HERE.relative_to(ROOT) / "sentencepiece.model")]
    for split, name in (("train", "distilled"), ("valid", "valid"), ("test", "test")):
        command += [f"--{split}pref", str(HERE.relative_to(ROOT) / name)]
    subprocess.run(show(command), check=True, cwd=ROOT, env=environment())


def generate(checkpoint: Path, decode: list[str], subset: str) -> tuple[list[dict[str, str]], float]:
    """Translate a split with fairseq-generate: rows with S(ource), T(arget) and D(ecoded), and the seconds it took."""
    command = ["fairseq-generate", str(DATA), "-s", "de", "-t", "en", "--task", "diffusion_seq2seq", "--path",
               str(checkpoint), "--gen-subset", subset, "--remove-bpe", "sentencepiece", "--max-tokens", "4000",
               *decode]
    started = time.monotonic()
    table: dict[int, dict[str, str]] = {}
    for line in run(command):
        if match := re.match(r"([STD])-(\d+)\t(?:(-?[\d.e+-]+)\t)?(.*)$", line):
            kind, number, _, text = match.groups()
            table.setdefault(int(number), {})[kind] = text
    return [table[number] for number in sorted(table)], time.monotonic() - started


def sacrebleu_score(rows: list[dict[str, str]]) -> sacrebleu.BLEUScore:
    return sacrebleu.corpus_bleu([row.get("D", "") for row in rows], [[row["T"] for row in rows]])


def translate(checkpoint: Path, decode: list[str], subset: str = "test") -> float:
    """Translate a split; print SacreBLEU and ten translations; return the score."""
    rows, seconds = generate(checkpoint, decode, subset)
    for row in rows[:: max(1, len(rows) // SHOWN)][:SHOWN]:
        print(f"  source      {row['S']}\n  reference   {row['T']}\n  translation {row.get('D', '')}\n")
    score = sacrebleu_score(rows)
    print(f"SacreBLEU {score.score:.2f} on {len(rows)} {subset} sentences in {seconds:.0f} s ({score})", flush=True)
    return score.score


def train(minutes: float, directory: Path) -> Path:
    """Train from scratch with the stock command for ``minutes``; show losses and validation BLEU as they come."""
    if (ROOT / directory).exists():
        shutil.rmtree(ROOT / directory)
    interval = max(100, int(50 * minutes))
    command = [
        "fairseq-train", str(DATA), "-s", "de", "-t", "en", *RECIPE, *precision(), "--stop-time-hours",
        f"{minutes / 60:.4f}", "--max-update", "1000000", "--save-dir", str(directory), "--no-epoch-checkpoints",
        "--seed", "1",
        "--log-format", "simple", "--log-interval", "50", "--eval-bleu", "--eval-bleu-remove-bpe", "sentencepiece",
        "--decode-steps", "3", "--valid-subset", "valid",
        "--validate-interval-updates", str(interval),
        "--save-interval-updates", str(10 * interval), "--keep-interval-updates", "1",
    ]
    run(command, keep=re.compile(r"epoch \d+ ?[:|].*?(loss=\S+|valid on.*?\| loss \S+).*?(num_updates[= ]\S+|bleu \S+)"))
    return ROOT / directory / "checkpoint_last.pt"


def precision() -> list[str]:
    """bfloat16 where the processor computes with it, else float32."""
    from pydiffseq.ops._extension import C

    fast = C is not None and C.detected_isa() in ("avx512_bf16", "amx")
    return ["--bf16", "--cpu"] if fast else ["--cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="training time")
    parser.add_argument("--goal", type=float, default=0.0, help="fail unless the trained model scores this SacreBLEU")
    parser.add_argument("--decode", nargs="*", default=DECODE, help="options of fairseq-generate")
    args = parser.parse_args()

    heading("prepare the bundled corpus")
    prepare()
    heading("translate the test set with the shipped model (about a minute)")
    translate(MODEL / "checkpoint.pt", args.decode)
    heading(f"train from scratch for {args.minutes:g} minutes, on what a Transformer wrote for the German of train")
    checkpoint = train(args.minutes, Path("work/demo_checkpoints"))
    heading("translate the test set with the model just trained")
    score = translate(checkpoint, args.decode)
    if score < args.goal:
        raise SystemExit(f"demo: SacreBLEU {score:.2f} is below the goal of {args.goal:g}")


if __name__ == "__main__":
    main()
