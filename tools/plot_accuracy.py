"""Draw accuracy against MACs of several main_test.py runs, and print the table behind the chart; or with --training the
loss, accuracies and learning rate of training runs by epoch."""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import labelled, read, save_figure
from training import LOG_NAME
from utils import InputError, parse_json, run_stage, with_unit

# {the beginning of a figure's name in a log: its axis}.
TRAINING = {"train_loss": "training loss", "test_": "top-1 accuracy, %", "train_lr": "learning rate"}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("png", type=Path, help="the chart to write")
    parser.add_argument("curves", nargs="+", help="LABEL=FOLDER, the --output-dir of a run")
    parser.add_argument("--title", help="of the chart (default: Accuracy against cost, or Training)")
    parser.add_argument("--training", action="store_true", help="draw what training runs have logged")
    return parser.parse_args(argv)


def draw(axes, prefix, curves, x, markers):
    """The figures named ``prefix``... in the rows of ``curves`` [(label, rows)] over x(row)."""
    for (label, rows), marker in zip(curves, markers * len(curves), strict=False):
        for name in dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)):
            points = [(x(row), row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker=marker, label=f"{label} {name.removeprefix(prefix)}".strip())
    axes.grid(alpha=0.3)
    axes.legend()


def table(curves):
    """Print the figures behind the chart."""
    asked = list(dict.fromkeys(row["asked"] for _, rows in curves for row in rows))
    for index, (label, _) in enumerate(curves):
        print(f"({chr(97 + index)}) {label}")
    print("asked for         " + "".join(f"{f'({chr(97 + i)}) MACs':>12}{'top-1':>7}" for i in range(len(curves))))
    for budget in asked:
        found = (next((row for row in rows if row["asked"] == budget), None) for _, rows in curves)
        cells = (f"{with_unit(row['macs']):>12}{row['top1']:7.2f}" if row else f"{'-':>12}{'-':>7}" for row in found)
        print(f"{budget:<18}" + "".join(cells))


def main(args):
    figure = Figure(figsize=(13, 4) if args.training else (7.5, 4.6), layout="constrained")
    if args.training:
        logs = [labelled(text, LOG_NAME) for text in args.curves]
        runs = [(label, [parse_json(line, path) for line in path.read_text().splitlines()]) for label, path in logs]
        for (_, rows), (_, path) in zip(runs, logs, strict=True):
            if not all(isinstance(row, dict) and "epoch" in row for row in rows):
                raise InputError(f"{path}: not the log of a training run")
        for axes, (prefix, title) in zip(figure.subplots(1, len(TRAINING)), TRAINING.items(), strict=True):
            draw(axes, prefix, runs, lambda row: row["epoch"], [None])
            axes.set(xlabel="epoch", ylabel=title)
    else:
        curves = [read(text) for text in args.curves]
        for label, rows in curves:
            if any(row["top1"] is None for row in rows):
                raise InputError(f"{label}: not tested (no classifier); main_test.py --probe does")
        table(curves)
        axes = figure.subplots()
        # Runs may have asked in any order; an export lies where its sub-network lies.
        curves = [
            (label, sorted((r for r in rows if not r.get("file")), key=lambda r: r["macs"])) for label, rows in curves
        ]
        draw(axes, "top1", curves, lambda row: row["macs"] / 1e6, "osD^v<>p")
        axes.set(xlabel="MACs per image, millions (the paper's convention)", ylabel="top-1 accuracy, %")
        axes.set_xlim(left=0)
    save_figure(figure, args.png, args.title or ("Training" if args.training else "Accuracy against cost"))
    print(f"wrote {args.png}")


if __name__ == "__main__":
    run_stage(main, get_args())
