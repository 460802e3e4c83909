"""Draw accuracy against MACs of several main_test.py runs, and print the table behind the chart."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import read
from utils import InputError, atomic_file, run_stage, with_unit


def get_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("png", type=Path, help="the chart to write")
    parser.add_argument("curves", nargs="+", help="LABEL=FOLDER, the --output-dir of a main_test.py run")
    parser.add_argument("--title", default="Accuracy against cost")
    return parser.parse_args()


def draw(curves, title, path):
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for (label, rows), marker in zip(curves, "osD^v<>p" * len(curves), strict=False):
        axes.plot([r["macs"] / 1e6 for r in rows], [r["top1"] for r in rows], marker=marker, label=label)
    axes.set(xlabel="MACs per image, millions (the paper's convention)", ylabel="top-1 accuracy, %", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(args):
    curves = [read(text) for text in args.curves]
    for label, rows in curves:
        if any(row["top1"] is None for row in rows):
            raise InputError(f"{label}: not tested (no classifier); main_test.py --probe does")
    asked = list(dict.fromkeys(row["asked"] for _, rows in curves for row in rows))
    for index, (label, _) in enumerate(curves):
        print(f"({chr(97 + index)}) {label}")
    print("asked for         " + "".join(f"{f'({chr(97 + i)}) MACs':>12}{'top-1':>7}" for i in range(len(curves))))
    for budget in asked:
        found = (next((row for row in rows if row["asked"] == budget), None) for _, rows in curves)
        cells = (f"{with_unit(row['macs']):>12}{row['top1']:7.2f}" if row else f"{'-':>12}{'-':>7}" for row in found)
        print(f"{budget:<18}" + "".join(cells))
    draw(curves, args.title, args.png)
    print(f"wrote {args.png}")


if __name__ == "__main__":
    run_stage(main, get_args())
