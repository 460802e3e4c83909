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
    """The table as a user reads it, without the columns that no row has a figure for."""
    top = ["top-1", "top-5"] if not rows[0].get("probe") else [f"{k} ({rows[0]['probe']})" for k in ("top-1", "top-5")]
    lines = [["asked", "step", "MACs", "with matmuls", "parameters", *top, "ms", "images/s"]]
    for row in rows:
        figures = ((row["top1"], ".2f"), (row["top5"], ".2f"), (row["latency_ms"], ".2f"), (row["images_per_s"], ".0f"))
        lines.append([
            row["asked"], "-" if row["step"] is None else f"{row['step']}{'+' * row['finer']}", with_unit(row["macs"]),
            with_unit(row["macs_with_attention_matmuls"]), with_unit(row["parameters"]),
            *("-" if value is None else format(value, digits) for value, digits in figures),
        ])  # fmt: skip
    empty = [all(word == "-" for word in column) for column in zip(*lines[1:], strict=True)]
    print_once(table_text([[word for word, gone in zip(line, empty, strict=True) if not gone] for line in lines]))


def write(results, folder):
    """results.json, and the rows of ``results`` as results.csv."""
    save_text(json.dumps(results, indent=1), folder / "results.json")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["rows"])
    save_text(text.getvalue(), folder / "results.csv")


def labelled(text, name):
    """(label, path of the file ``name``) of the words LABEL=FOLDER. Raises InputError if there is no such file."""
    label, equals, folder = text.partition("=")
    path = Path(folder) / name
    if not equals or not path.is_file():
        raise InputError(f"{text}: expected LABEL=FOLDER, a folder with {name} in it")
    return label, path


def read(text):
    """(label, rows) of the results.json that the words LABEL=FOLDER name. Raises InputError."""
    label, path = labelled(text, "results.json")
    results, wanted = parse_json(path.read_text(), path), {"asked", "macs", "top1"}
    rows = results.get("rows") if isinstance(results, dict) else None
    if not rows or not isinstance(rows, list) or not all(isinstance(r, dict) and wanted <= r.keys() for r in rows):
        raise InputError(f"{path}: not the results of main_test.py")
    return label, rows


def draw_all(results, loaded, folder):
    """Draw ladder.png from the results that ``write`` takes, widths.png and knowledge.png from a SuperNetwork."""
    rows, title = results["rows"], f"{loaded.spec.name}, {loaded.source}"
    tested = f"{results['data_set']}, {rows[0]['images']} images\n" if rows[0].get("images") else ""
    save_figure(ladder(rows), folder / "ladder.png", tested + title)
    save_figure(widths_map(loaded), folder / "widths.png", title)
    save_figure(knowledge(loaded), folder / "knowledge.png", title)


def save_figure(figure, path, title):
    """Write a picture as PNG, complete or not at all. Main rank only."""
    if is_main():
        figure.suptitle(title, fontsize=9)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def ladder(rows):
    """Accuracy, parameters and latency, those that the rows have, against MACs."""
    by = f" ({rows[0]['probe']} on the features)" if rows[0].get("probe") else ""
    series = {"top1": (f"top-1 accuracy, %{by}", 1), "parameters": ("parameters, millions", 1e6)}
    series["latency_ms"] = ("latency, ms per batch", 1)
    series = {key: about for key, about in series.items() if any(row[key] is not None for row in rows)}
    figure = Figure(figsize=(4.2 * len(series), 3.8), layout="constrained")
    for axes, (key, (label, unit)) in zip(
        figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True
    ):
        for kind, style in (("float32", "o-"), ("onnx", "^:"), ("int8", "s--")):
            of_kind = [row for row in rows if (row["asked"].rpartition(", ")[2] if row["file"] else "float32") == kind]
            points = sorted((row["macs"] / 1e6, row[key] / unit) for row in of_kind if row[key] is not None)
            # An export has as many MACs and parameters, and in float32 the same accuracy.
            if points and (kind == "float32" or key == "latency_ms" or (kind, key) == ("int8", "top1")):
                axes.plot(*zip(*points, strict=True), style, label=kind)
        axes.set(xlabel="MACs, millions (paper's convention)", ylabel=label)
        axes.set_xlim(left=0)
        if key != "top1":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    return figure


def widths_map(loaded):
    """Two maps, attention and MLP: the share of every block's width (rows) that a budget of so many MACs keeps."""
    figure, table = Figure(figsize=(8, 5), layout="constrained"), loaded.table
    macs = np.array([loaded.costs.macs(widths) for widths in table.steps]) / 1e6
    edges = np.append(macs[::-1], macs[0] * 1.01)  # what is obtained between a step's MACs and those of the step before
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        kept = np.array([getattr(widths, name) for widths in table.steps[::-1]], dtype=float).T  # [L, steps]
        rows = np.arange(len(kept) + 1) - 0.5
        image = axes.pcolormesh(edges, rows, kept / kept[:, -1:], vmin=0, vmax=1, cmap="viridis")
        axes.set(ylabel=f"block, {title}", yticks=range(len(kept)))
        axes.invert_yaxis()
    panels[-1].set_xlabel("budget in MACs, millions (paper's convention)")
    figure.colorbar(image, ax=panels, label="kept share of the width")
    return figure


def knowledge(loaded):
    """Two maps, attention and MLP: the share of a block's importance (rows) that its dimensions or hidden units beyond
    the kept ones hold, against the kept share of the width (columns), of MLPs on a logarithmic axis. Dark early: it can
    be cut well."""
    own, figure = branches(loaded.supernet), Figure(figsize=(8, 5), layout="constrained")
    known, norm = loaded.compensation or [None] * len(own), colors.LogNorm(1e-4, 1)
    for axes, (name, title) in zip(figure.subplots(2, 1), TITLES.items(), strict=True):
        rows = [importance(*pair) for pair in zip(own, known, strict=True) if pair[0].name == name]
        most = max(map(len, rows))
        edges = np.linspace(0, 1, 65) if name == "attn" else np.geomspace(1 / most, 1, 65)
        lost = np.ones((len(rows), 64))
        for row, values in zip(lost, rows, strict=True):
            tail = 1 - np.concatenate(([0], np.cumsum(values) / values.sum()))
            row[:] = tail[(edges[:-1] * len(values) + 1e-9).astype(int)]
        image = axes.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, lost.clip(1e-4), norm=norm, cmap="magma")
        axes.set(ylabel=f"block, {title}", yticks=range(len(rows)), xscale="linear" if name == "attn" else "log")
        axes.invert_yaxis()
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
    """Two maps, before and after stage 1, of what ``densities`` found: the share of the expected loss (colour) that the
    first dimensions hold. Rows: of every block the heads, q and k together, and the MLP."""
    figure, grid = Figure(figsize=(8, 6), layout="constrained"), np.linspace(0, 1, 65)
    starts = np.cumsum([0, *(len(before) for before, _ in found.values())])[:-1] - 0.5
    panels = figure.subplots(1, 2, sharey=True)
    for axes, when, rows in zip(panels, ("before", "after"), zip(*found.values(), strict=True), strict=True):
        curves = [curve for one in rows for curve in one.cpu().numpy()]
        held = [np.interp(grid, np.linspace(0, 1, len(curve)), curve) for curve in curves]
        image = axes.imshow(held, aspect="auto", vmin=0, vmax=1, extent=(0, 1, len(held) - 0.5, -0.5), cmap="viridis")
        axes.set(title=f"{when} stage 1", xlabel="first dimensions, share of the width")
        axes.set_yticks(starts, [name.removeprefix("blocks.") for name in found])
        axes.hlines(starts, 0, 1, color="white", linewidth=0.5)
    figure.colorbar(image, ax=panels, label="share of the expected loss that they hold")
    return figure
