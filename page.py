"""A page of a super-network's sizes: one HTML file, by plotly, that needs no connection."""

from plotly.subplots import make_subplots

from report import TITLES
from utils import atomic_file, with_unit

# Pixels below the charts at which the figures, the command and the slider stand.
BELOW = (60, 112, 150)


def write(rows, loaded, commands, others, path):
    """Write the page of a SuperNetwork to ``path``: a slider over the steps of its table, and what follows it.

    rows: of its results table. commands: what cuts each step. others: [(label, rows)] of further super-networks, whose
    accuracies are laid over this one's.
    """
    curves = [(label, tested(results)) for label, results in ((loaded.spec.name, rows), *others)]
    titles = ("accuracy", *(f"{title}: kept width by block" for title in TITLES.values()))
    page = make_subplots(2, 2, specs=[[{"rowspan": 2}, {}], [None, {}]], subplot_titles=titles, horizontal_spacing=0.08)
    steps = [_state(widths, loaded, curves[0][1]) for widths in loaded.table.steps]
    macs, kept, figures = steps[0]
    for row, (name, values) in enumerate(zip(TITLES, kept, strict=True), 1):
        page.add_bar(y=values, text=values, showlegend=False, row=row, col=2)
        page.update_yaxes(range=[0, 1.1 * max(getattr(loaded.costs.full, name))], row=row, col=2)
    for label, results in curves:
        points = sorted((row["macs"] / 1e6, row["top1"], row["asked"]) for row in results)
        x, y, text = zip(*points, strict=True) if points else ((), (), ())
        page.add_scatter(x=x, y=y, text=text, mode="lines+markers", name=label, row=1, col=1)
    page.add_vline(macs, line_dash="dot", row=1, col=1)
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "yanchor": "top", "showarrow": False, "align": "left"}
    page.add_annotation(text=figures, yshift=-BELOW[0], **place)
    page.add_annotation(text=commands[0], yshift=-BELOW[1], font={"family": "monospace", "size": 11}, **place)
    last, moves = len(page.layout.annotations) - 1, []
    for step, (macs, kept, figures) in enumerate(steps):
        words = {f"annotations[{last - 1}].text": figures, f"annotations[{last}].text": commands[step]}
        layout = words | {"shapes[0].x0": macs, "shapes[0].x1": macs}
        moves.append({"label": str(step), "method": "update", "args": [{"y": kept, "text": kept}, layout, [0, 1]]})
    slider = {"currentvalue": {"prefix": "step of the width table: "}, "pad": {"t": BELOW[2]}, "steps": moves}
    page.update_layout(title=f"{loaded.spec.name}, {loaded.source}", margin_b=BELOW[2] + 100, sliders=[slider])
    page.update_xaxes(title="MACs, millions (paper's convention)", rangemode="tozero", row=1, col=1)
    page.update_yaxes(title="top-1 accuracy, %", row=1, col=1)
    with atomic_file(path) as temporary:
        # An annotation that can be edited can be marked and copied.
        page.write_html(temporary, config={"edits": {"annotationText": True}})


def tested(rows):
    """The rows of sub-networks that have an accuracy, without those of exports."""
    return [row for row in rows if row["top1"] is not None and not row.get("file")]


def _state(widths, loaded, rows):
    """(millions of MACs, kept widths of attention and MLP, figures in words) of one size."""
    macs = loaded.costs.macs(widths)
    words = f"{with_unit(macs)} MACs ({macs / loaded.costs.macs(loaded.costs.full):.3f} of the full network), "
    words += f"{with_unit(loaded.costs.parameters(widths))} parameters"
    if rows:
        row = min(rows, key=lambda row: abs(row["macs"] - macs))
        words += f"<br>top-1 {row['top1']:.2f}"
        words += f", {row['latency_ms']:.2f} ms per batch" if row["latency_ms"] else ""
        exact = row["widths"] == widths.as_dict()
        words += "" if exact else f" (measured at {with_unit(row['macs'])} MACs, the nearest that was)"
    words += "<br>The command that cuts this size; a click marks it for copying:"
    return macs / 1e6, [widths.attn, widths.mlp], words
