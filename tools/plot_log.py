"""Draw the training curves of one or several runs: loss, accuracies and learning rate by epoch, from their log.txt."""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import labelled
from training import LOG_NAME
from utils import InputError, atomic_file, run_stage

PANELS = {"train_loss": "training loss", "test_": "top-1 accuracy, %", "train_lr": "learning rate"}


def get_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("png", type=Path, help="the chart to write")
    parser.add_argument("runs", nargs="+", help="LABEL=FOLDER, the --output-dir of a training run")
    return parser.parse_args()


def draw(runs, path):
    """runs: [(label, records of a log)]."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (prefix, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for label, records in runs:
            for name in dict.fromkeys(name for record in records for name in record if name.startswith(prefix)):
                points = [(record["epoch"], record[name]) for record in records if name in record]
                axes.plot(*zip(*points, strict=True), label=f"{label} {name.removeprefix(prefix)}")
        axes.set(xlabel="epoch", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(args):
    runs = []
    for label, path in (labelled(text, LOG_NAME) for text in args.runs):
        try:
            runs.append((label, [json.loads(line) | {} for line in path.read_text().splitlines()]))
        except (ValueError, TypeError):
            raise InputError(f"{path}: not a log of one JSON object a line") from None
    draw(runs, args.png)
    print(f"wrote {args.png}")


if __name__ == "__main__":
    run_stage(main, get_args())
