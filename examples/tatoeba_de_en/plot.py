"""Draws curves.csv, SacreBLEU on valid against the target tokens trained on, as curves.svg (pip install matplotlib)."""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "pydiffseq"   # the same file every time
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).parent


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Name of the system -> points (million target tokens, SacreBLEU)."""
    curves = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            curves[row["system"]].append((float(row["million_target_tokens"]), float(row["valid_sacrebleu"])))
    return curves


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (system, points), marker in zip(read_curves(HERE / "curves.csv").items(), "osD^v", strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=system)
    axes.set(xlabel="million target tokens", ylabel="SacreBLEU on valid", title="Tatoeba German-English")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
