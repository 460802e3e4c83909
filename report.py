"""What stage 3 reports: the table of results, and pictures of a super-network."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import colors
from matplotlib.figure import Figure

from models.vit.supernet import branches
from utils import InputError, atomic_file, is_main, parse_json, print_once, save_text, table_text, with_unit

TITLES = {"attn": "attention", "mlp": "MLP"}
COLUMNS = ("asked", "step", "macs", "macs_with_attention_matmuls", "parameters", "top1", "top5", "latency_ms")
COLUMNS += ("images_per_s",)
DENSITY_NAME = "density.png"


def show(rows):
    """The table as a user reads it; milliseconds where they have been measured."""
    lines = [["asked", "step", "MACs", "with matmuls", "parameters", "top-1", "top-5", "ms", "images/s"]]
    for row in rows:
        lines.append([
            row["asked"], "-" if row["step"] is None else f"{row['step']}{'+' * row['finer']}", with_unit(row["macs"]),
            with_unit(row["macs_with_attention_matmuls"]), with_unit(row["parameters"]),
            f"{row['top1']:.2f}", f"{row['top5']:.2f}",
            f"{row['latency_ms']:.2f}" if row["latency_ms"] else "-", f"{row['images_per_s']:.0f}",
        ])  # fmt: skip
    if not any(row["latency_ms"] for row in rows):
        lines = [[*line[:7], line[8]] for line in lines]
    print_once(table_text(lines))


def write(results, folder):
    """results.json, and the rows of ``results`` as results.csv."""
    save_text(json.dumps(results, indent=1), folder / "results.json")
    save_text(as_csv(results["rows"]), folder / "results.csv")
    print_once(f"wrote {folder / 'results.json'} and results.csv")


def labelled(text, name):
    """(label, path of the file ``name``) of the words LABEL=FOLDER. Raises InputError if there is no such file."""
    label, equals, folder = text.partition("=")
    path = Path(folder) / name
    if not equals or not path.is_file():
        raise InputError(f"{text}: expected LABEL=FOLDER, a folder with {name} in it")
    return label, path


def read(text):
    """(label, rows) of the results.json that the words LABEL=FOLDER name."""
    label, path = labelled(text, "results.json")
    return label, parse_json(path.read_text(), path)["rows"]


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_all(rows, loaded, folder):
    """Draw ladder.png from the rows of a results table, widths.png and knowledge.png from a SuperNetwork.

    Returns their names.
    """
    figures = {"ladder.png": ladder(rows), "widths.png": widths_map(loaded.table), "knowledge.png": knowledge(loaded)}
    for name, figure in figures.items():
        save_figure(figure, folder / name, f"{loaded.spec.name}, {loaded.source}")
    return [str(folder / name) for name in figures]


def save_figure(figure, path, title):
    """Write a picture as PNG, complete or not at all. Main rank only."""
    if is_main():
        figure.suptitle(title, fontsize=9)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def ladder(rows):
    """Accuracy, parameters and, if measured, latency against MACs."""
    series = [("top1", "top-1 accuracy, %", 1), ("parameters", "parameters, millions", 1e6)]
    if any(row["latency_ms"] for row in rows):
        series.append(("latency_ms", "latency, ms per batch", 1))
    figure = Figure(figsize=(4.2 * len(series), 3.8), layout="constrained")
    panels = figure.subplots(1, len(series))
    for axes, (key, label, unit) in zip(panels, series, strict=True):
        for quantised, style in ((False, "o-"), (True, "s--")):
            points = sorted(
                (row["macs"] / 1e6, row[key] / unit)
                for row in rows
                if row[key] is not None and row["asked"].endswith("int8") == quantised
            )
            if quantised and key != "top1":
                continue  # as many MACs and parameters as in float32, and not measured
            if points:
                axes.plot(*zip(*points, strict=True), style, label="int8" if quantised else "float32")
        axes.set(xlabel="MACs, millions (paper's convention)", ylabel=label)
        axes.set_xlim(left=0)
        if key != "top1":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if len(panels[0].lines) > 1:
        panels[0].legend()
    return figure


def widths_map(table):
    """Two maps, attention and MLP: the kept share of every block (rows) at every step of the table (columns)."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        kept = np.array([getattr(widths, name) for widths in table.steps], dtype=float).T  # [L, steps]
        image = axes.imshow(
            kept / kept[:, :1], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest", origin="upper"
        )
        axes.set(ylabel=f"block, {title}", yticks=range(len(kept)))
    panels[-1].set_xlabel("step of the width table (0 is the full network)")
    figure.colorbar(image, ax=panels, label="kept share of the width")
    return figure


def knowledge(loaded):
    """Two maps, attention and MLP: the share of a block's importance (rows) that its dimensions or hidden units beyond
    the kept ones hold, against the kept share of the width (columns). Dark early: it can be cut well."""
    own, figure = branches(loaded.supernet), Figure(figsize=(8, 5), layout="constrained")
    known = loaded.compensation or [None] * len(own)
    for axes, (name, title) in zip(figure.subplots(2, 1, sharex=True), TITLES.items(), strict=True):
        rows = [importance(*pair) for pair in zip(own, known, strict=True) if pair[0].name == name]
        lost = np.ones((len(rows), 64))
        for row, values in zip(lost, rows, strict=True):
            tail = 1 - np.concatenate(([0], np.cumsum(values) / values.sum()))
            row[:] = tail[np.linspace(0, len(values), len(row), endpoint=False).astype(int)]
        extent, norm = (0, 1, len(rows) - 0.5, -0.5), colors.LogNorm(1e-4, 1)
        image = axes.imshow(lost.clip(1e-4), aspect="auto", norm=norm, cmap="magma", extent=extent)
        axes.set(ylabel=f"block, {title}", yticks=range(len(rows)))
    axes.set_xlabel("kept share of the width")
    how = "measured on the proxy set" if loaded.compensation else "from the weights"
    figure.colorbar(image, ax=figure.axes, label=f"share of the importance that is lost\n({how})")
    return figure


@torch.no_grad()
def importance(branch, known):
    """What each dimension of all heads, or each hidden unit, holds, [width]: as ``known`` (Compensation) says, or else
    |in_j|^2 |out_j|^2 of the weights that make and that read it. Of an indivisible branch the last one holds it all."""
    if branch.indivisible:
        return np.eye(branch.full)[-1]
    if known:
        return known.errors.clamp(min=0).float().cpu().numpy()
    energy = 1
    for layer, module in ((layer, module) for layer, module in branch.layers if layer.side != "norm"):
        weight = module.weight.float().square()
        entries = (weight.sum(0) if layer.side == "in" else weight.sum(1)).unflatten(0, (layer.groups, -1))
        heads_of_v = slice(-branch.part.heads, None) if branch.name == "attn" else slice(None)
        energy = energy * entries[heads_of_v]
    return energy.sum(0).cpu().numpy()


def density(found):
    """Two maps, before and after stage 1, of Density ``found``: the share of the expected loss (colour) that the first
    dimensions hold. Rows: of every block the heads, q and k together, and the MLP."""
    figure, grid = Figure(figsize=(8, 6), layout="constrained"), np.linspace(0, 1, 65)
    sizes = [len(one.before) for one in found]
    starts, labels = np.cumsum([0, *sizes[:-1]]) - 0.5, [one.branch.removeprefix("blocks.") for one in found]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, when in zip(panels, ("before", "after"), strict=True):
        curves = [row for one in found for row in getattr(one, when).cpu().numpy()]
        held = [np.interp(grid, np.linspace(0, 1, len(curve)), curve) for curve in curves]
        image = axes.imshow(held, aspect="auto", vmin=0, vmax=1, extent=(0, 1, len(held) - 0.5, -0.5), cmap="viridis")
        axes.set(title=f"{when} stage 1", xlabel="first dimensions, share of the width")
        axes.set_yticks(starts, labels)
        axes.hlines(starts, 0, 1, color="white", linewidth=0.5)
    figure.colorbar(image, ax=panels, label="share of the expected loss that they hold")
    return figure
