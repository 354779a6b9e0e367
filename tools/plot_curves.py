"""Draws the columns of a CSV file as curves, one for each value of the first column (needs matplotlib).

    python tools/plot_curves.py examples/tatoeba_de_en/curves.csv --x million_target_tokens --y valid_sacrebleu
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "pydiffseq"   # the same file every time
from matplotlib import pyplot  # noqa: E402


def read_curves(path: Path, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Name of the curve, which the first column holds -> its points."""
    curves = defaultdict(list)
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            curves[next(iter(row.values()))].append((float(row[x]), float(row[y])))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="the picture goes beside it, as .svg")
    parser.add_argument("--x", required=True, metavar="COLUMN")
    parser.add_argument("--y", required=True, metavar="COLUMN")
    parser.add_argument("--log-x", action="store_true")
    options = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    curves = read_curves(options.csv, options.x, options.y)
    for (name, points), marker in zip(curves.items(), "osD^vP*", strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=4, label=name)
    highest = max(y for points in curves.values() for _, y in points)
    axes.set(xlabel=options.x.replace("_", " "), ylabel=options.y.replace("_", " "), ylim=(0, 1.08 * highest))
    if options.log_x:
        places = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
    else:
        axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(options.csv.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
