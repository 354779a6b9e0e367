"""Turn the JSON of pytest-benchmark into a table: time, ratio to the best alternative, share of the measured limits.

    python benchmarks/table.py build/bench/cpu.json [--markdown docs/benchmarks_cpu.md]

The limits are measured here, in the same minutes: the copy bandwidth, and the FLOP/s of torch's largest matrix product
in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

OURS = "pydiffseq"


def fastest(function, seconds: float = 1.0) -> float:
    """Shortest run of ``function`` within about ``seconds``."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def limits() -> dict[str, float]:
    """Copy bandwidth (bytes/s, read + write, 64 MB) and matrix-product FLOP/s (2048^3) of this machine."""
    source = torch.randn(16 << 20)
    target = torch.empty_like(source)
    result = {"copy": 2 * source.numel() * 4 / fastest(lambda: target.copy_(source))}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(2048, 2048).to(dtype)
        result[name] = 2 * 2048**3 / fastest(lambda a=a: a @ a)
    return result


def machine(report: dict) -> str:
    cpu = report.get("machine_info", {}).get("cpu", {}).get("brand_raw") or platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def groups(report: dict) -> dict[str, dict[str, dict]]:
    """group -> contender -> benchmark."""
    table: dict[str, dict[str, dict]] = {}
    for bench in report["benchmarks"]:
        contender = bench["extra_info"].get("contender", bench["name"])
        table.setdefault(bench["group"] or bench["name"], {})[contender] = bench
    return table


def share(bench: dict, measured: dict[str, float]) -> str:
    """Achieved share of the copy limit and of the matrix-product limit, where the benchmark counts them."""
    info, seconds, parts = bench["extra_info"], bench["stats"]["min"], []
    if info.get("bytes"):
        parts.append(f"{info['bytes'] / seconds / measured['copy']:.0%} copy")
    if info.get("flops"):
        kind = "bfloat16" if "bfloat16" in bench["group"] else "float32"
        parts.append(f"{info['flops'] / seconds / measured[kind]:.0%} {kind} FLOP/s")
    return ", ".join(parts)


def rows(report: dict, measured: dict[str, float]) -> list[str]:
    lines = ["| case | pydiffseq ms | best other | its ms | ratio | all others (ratio) | share of the limits |",
             "|---|---:|---|---:|---:|---|---|"]
    for name, contenders in groups(report).items():
        if OURS not in contenders or len(contenders) < 2:
            continue
        ours = contenders[OURS]["stats"]["min"]
        others = {key: bench["stats"]["min"] for key, bench in contenders.items() if key != OURS}
        best = min(others, key=others.get)
        ranked = sorted(others.items(), key=lambda item: item[1])
        every = ", ".join(f"{key} {value / ours:.1f}" for key, value in ranked)
        cells = [name, f"{ours * 1e3:.3f}", best, f"{others[best] * 1e3:.3f}", f"**{others[best] / ours:.1f}**", every,
                 share(contenders[OURS], measured)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON written by pytest --benchmark-json")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    report = json.loads(args.report.read_text(encoding="utf-8"))
    measured = limits()
    text = "\n".join([
        "# CPU benchmarks", "",
        f"Machine: {machine(report)}. Shortest of the repetitions of one run; made by `make bench`.", "",
        f"Measured limits: copy {measured['copy'] / 1e9:.0f} GB/s, matrix product {measured['float32'] / 1e9:.0f} "
        f"GFLOP/s (float32), {measured['bfloat16'] / 1e9:.0f} GFLOP/s (bfloat16).", "",
        *rows(report, measured), ""])
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
