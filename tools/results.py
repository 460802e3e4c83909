"""The table of main_test.py: printed, and as results.json and results.csv."""

import csv
import io
import json

from utils import human, save_text, say, say_table

COLUMNS = ("asked", "step", "macs", "macs_with_attention_matmuls", "parameters", "top1", "top5", "latency_ms")
COLUMNS += ("images_per_s",)


def show(rows):
    """The table as a user reads it; milliseconds where they have been measured."""
    lines = [["asked", "step", "MACs", "with matmuls", "parameters", "top-1", "top-5", "ms", "images/s"]]
    for row in rows:
        lines.append([
            row["asked"], "-" if row["step"] is None else f"{row['step']}{'+' * row['finer']}", human(row["macs"]),
            human(row["macs_with_attention_matmuls"]), human(row["parameters"]),
            f"{row['top1']:.2f}", f"{row['top5']:.2f}",
            f"{row['latency_ms']:.2f}" if row["latency_ms"] else "-", f"{row['images_per_s']:.0f}",
        ])  # fmt: skip
    if not any(row["latency_ms"] for row in rows):
        lines = [[*line[:7], line[8]] for line in lines]
    say_table(lines)


def write(results, folder):
    """results.json, and the rows of ``results`` as results.csv."""
    save_text(json.dumps(results, indent=1), folder / "results.json")
    save_text(as_csv(results["rows"]), folder / "results.csv")
    say(f"wrote {folder / 'results.json'} and results.csv")


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
