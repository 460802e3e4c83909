"""Pictures of a super-network: what its sub-networks cost, what each of them keeps, where the knowledge lies."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from models.supernet import blocks_of
from utils import InputError, whole_file

BRANCHES = ("attention", "MLP")


def draw_all(rows, net, folder):
    """Draw ladder.png from the rows of a results table, widths.png and knowledge.png from a SuperNet.

    Returns their names. Raises InputError without a super-network.
    """
    if net is None:
        raise InputError("--plot draws a super-network: this checkpoint is one sub-network")
    figures = {"ladder.png": ladder(rows), "widths.png": widths_map(net.table), "knowledge.png": knowledge(net)}
    for name, figure in figures.items():
        figure.suptitle(f"{net.spec.name}, {net.source}", fontsize=9)
        with whole_file(folder / name) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)
    return [str(folder / name) for name in figures]


# ------------------------------------------------------------------------------------------ the ladder


def ladder(rows):
    """Accuracy, parameters and, if measured, latency against MACs."""
    series = [("top1", "top-1 accuracy, %", 1), ("parameters", "parameters, millions", 1e6)]
    if any(row["latency_ms"] for row in rows):
        series.append(("latency_ms", "latency, ms per batch", 1))
    figure, panels = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.8), layout="constrained")
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


# ------------------------------------------------------------------------------------------ the widths


def widths_map(table):
    """Two maps, attention and MLP: the kept share of every block (rows) at every step of the table (columns)."""
    flat = np.array([widths.flat for widths in table.steps], dtype=float)
    figure, panels = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for branch, (axes, name) in enumerate(zip(panels, BRANCHES, strict=True)):
        kept = flat[:, branch::2].T  # [L, steps]
        image = axes.imshow(
            kept / kept[:, :1], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest", origin="upper"
        )
        axes.set(ylabel=f"block, {name}", yticks=range(len(kept)))
    panels[-1].set_xlabel("step of the width table (0 is the full network)")
    figure.colorbar(image, ax=panels, label="kept share of the width")
    return figure


# ------------------------------------------------------------------------------------------ the knowledge


def knowledge(net):
    """How concentrated the knowledge is, in every head and every MLP: the importance of its dimensions or units,
    sorted, on a logarithmic scale (left), and the share of the sum that the first ones hold, as they stand (right)."""
    depth = len(blocks_of(net.model))
    colours = plt.get_cmap("viridis", depth)
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")

    def draw(row, per_block, label, **style):
        lines = [(colours(block), values) for block, many in enumerate(per_block) for values in np.atleast_2d(many)]
        for index, (colour, values) in enumerate(lines):
            kept, ranked = np.arange(1, len(values) + 1) / len(values), np.sort(values)[::-1]
            style |= {"color": colour, "label": None if index else label}
            row[0].semilogy(kept, np.maximum(ranked / ranked[0], 1e-12), **style)
            row[1].plot([0, *kept], [0, *np.cumsum(values) / values.sum()], **style)

    spectra = head_spectra(net)
    if any(len(each) for each in spectra):
        draw(panels[0], spectra, "each head, from the weights", lw=0.7, alpha=0.6)
    else:
        panels[0][0].set_title("heads are kept whole or dropped whole", fontsize=9)
    cut = [not block.parts[0].whole for block in blocks_of(net.model)]
    if net.memory and all(cut) and all(sums.attn_error.sum() > 0 for sums in net.memory):
        errors = [sums.attn_error.float().cpu().numpy() for sums in net.memory]
        draw(panels[0], errors, "all heads of a block, measured on the proxy set", lw=2, ls="--")
    how = "measured on the proxy set" if net.memory else "from the weights"
    draw(panels[1], unit_importances(net), f"each MLP, {how}", lw=1)
    for (spectrum, share), width in zip(panels, ("head width", "hidden width"), strict=True):
        share.plot([0, 1], [0, 1], "k:", lw=1, label="spread evenly")
        spectrum.set(xlabel=f"share of the {width}, sorted", ylabel="importance, relative to the largest")
        share.set(xlabel=f"kept share of the {width}", ylabel="share of the importance held")
        for axes in (spectrum, share):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=8)
    scale = plt.cm.ScalarMappable(plt.Normalize(-0.5, depth - 0.5), colours)
    figure.colorbar(scale, ax=panels, label="block", ticks=range(depth))
    return figure


def head_spectra(net):
    """L arrays [H, d]: for each dimension of a head |v_j|^2 |W_o,j|^2, from rows of v and columns of proj; empty where
    heads cannot be cut.

    With the value's variance in place of |v_j|^2 this would be the energy that the dimension adds to the residual
    stream; in the balanced basis it falls from the first dimension to the last.
    """
    spectra = []
    for block in blocks_of(net.model):
        part = block.parts[0]
        if part.whole:
            spectra.append(np.empty((0, part.width)))
            continue
        qkv, proj = block.attn.qkv.whole("weight").detach().float(), block.output("attn").whole("weight").detach()
        value = qkv.unflatten(0, (3, part.heads, part.width))[2]  # [H, d, D]
        output = proj.float().unflatten(1, (part.heads, part.width))  # [D, H, d]
        spectra.append((value.square().sum(-1) * output.square().sum(0)).cpu().numpy())
    return spectra


def unit_importances(net):
    """L arrays [M]: the error that dropping a hidden unit leaves, as measured; else |W1_j|^2 |W2_j|^2, W1_j the rows
    that make the unit, of a gated pair the product of both."""
    if net.memory:
        return [sums.mlp_error.clamp(min=0).float().cpu().numpy() for sums in net.memory]
    return [_squared_weights(block.mlp, block.parts[1]) for block in blocks_of(net.model)]


@torch.no_grad()
def _squared_weights(mlp, part):
    energy = 1
    for layer in (layer for layer in part.layers if layer.side != "norm"):
        weight = getattr(mlp, layer.name).whole("weight").float().square()
        each = weight.sum(0) if layer.side == "in" else weight.sum(1).unflatten(0, (layer.groups, -1)).sum(0)
        energy = energy * each
    return energy.cpu().numpy()
