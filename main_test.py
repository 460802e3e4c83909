"""Stage 3: cut sub-networks of any size out of a super-network, evaluate them, and write a table of them."""

import csv
import io
import json
from pathlib import Path

import datasets
import utils
from engine import evaluate
from models import peel, store
from models.calibration import calibrate
from models.cost import MATMULS, Shapes
from models.statistics import OBJECTIVES
from models.vit import as_supernet, read_checkpoint
from models.width_table import Budget
from options import add_budget_options, stage_parser
from utils import human, say

# Without a budget: these shares of the full network's MACs, as in the paper's figures.
DEFAULT_LADDER = (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6)
COLUMNS = ("asked", "step", "macs", "macs_with_attention_matmuls", "parameters", "top1", "top5", "images_per_s")


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_budget_options(parser, several=True)
    parser.add_argument_group("output").add_argument(
        "--output_dir", default=None, help="for results.json and results.csv; output/test/<model>"
    )
    return parser.parse_args(argv)


def budgets(args):
    """The budgets on the command line, in the order of the flags; without any, the default ladder."""
    kinds = ("op_code", "macs", "macs_ratio", "params")
    asked = [Budget(kind, value) for kind in kinds for value in _as_list(getattr(args, kind))]
    return asked or [Budget("macs_ratio", share) for share in DEFAULT_LADDER]


def _as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def measure(network, shapes, widths, loader, device, args):
    """One row of the results: costs and accuracy of a peeled network."""
    figures = evaluate(network.to(device), loader, device, args.amp)
    return {
        "macs": shapes.macs(widths),
        "macs_with_attention_matmuls": shapes.macs(widths, MATMULS),
        "parameters": sum(p.numel() for p in network.parameters()),
        "top1": figures["top1"],
        "top5": figures["top5"],
        "images_per_s": figures["images_per_s"],
        "loss": figures["loss"],
        "widths": widths.as_dict(),
    }


def test_images(args, classes, model):
    """The loader of the test set, checked against the classifier."""
    if not classes:
        raise utils.InputError(
            "the checkpoint has no classifier to test; models.store.load_supernet(...).cut(step) cuts it"
        )
    images = datasets.load_images(args, train=False)
    own = datasets.count_classes(images)
    if own and own != classes:
        raise utils.InputError(f"--data_set {args.data_set} has {own} classes, the checkpoint {classes}")
    return datasets.eval_loader(images, datasets.eval_transform(args, datasets.data_config(model)), args)


def test_supernet(path, content, args, device):
    """Rows for every budget, each on an extracted network."""
    net = store.load_supernet(path, content, **store.loading_options(args))
    chosen = [(budget, budget.step(net.table, net.shapes)) for budget in budgets(args)]
    loader, rows = test_images(args, net.spec.num_classes, net.model), []
    how = {"compensated": net.memory is not None, "calibrated": args.calibrate}
    if net.memory:
        say("compensating with the statistics beside the weights (--no_compensate for plain slices)")
    for budget, step in chosen:
        row = measure(cut(net, step, args, device), net.shapes, net.table.steps[step], loader, device, args)
        rows.append({"asked": str(budget), "step": step} | how | row)
    return net.spec, rows


def cut(net, step, args, device):
    """The sub-network of a step of the table, calibrated on training images if ``--calibrate`` asks for it."""
    network = net.cut(step)
    if not args.calibrate:
        return network
    images, transform = (
        datasets.load_images(args, train=True),
        datasets.eval_transform(args, datasets.data_config(network)),
    )
    loader = datasets.proxy_loader(images, transform, args, args.calibrate)
    batches = list(loader)
    datasets.report_bad_images(loader, "calibration")
    return calibrate(network.to(device), net.model.to(device), batches, OBJECTIVES["feature"], device)


def test_peeled(path, content, args, device):
    """One row: a fine-tuned sub-network says its own widths."""
    network, spec, widths = peel.load_peeled(content, path)
    shapes = Shapes.of(as_supernet(spec.build()))
    loader = test_images(args, spec.num_classes, network)
    return spec, [{"asked": "as fine-tuned", "step": None} | measure(network, shapes, widths, loader, device, args)]


def show(rows):
    """The table as a user reads it."""
    lines = [("asked", "step", "MACs", "with matmuls", "parameters", "top-1", "top-5", "images/s")]
    for row in rows:
        lines.append((
            row["asked"], "-" if row["step"] is None else str(row["step"]), human(row["macs"]),
            human(row["macs_with_attention_matmuls"]), human(row["parameters"]),
            f"{row['top1']:.2f}", f"{row['top5']:.2f}", f"{row['images_per_s']:.0f}",
        ))  # fmt: skip
    lengths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        say(
            "  ".join(
                word.rjust(n) if i else word.ljust(n) for i, (word, n) in enumerate(zip(line, lengths, strict=True))
            )
        )


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    path = store.resolve(args)
    content = read_checkpoint(path)
    peeled = "peeled" in content
    spec, rows = (test_peeled if peeled else test_supernet)(path, content, args, device)
    show(rows)
    output = utils.output_folder(args.output_dir or Path("output/test") / spec.name)
    results = {"checkpoint": str(path), "model": spec.name, "data_set": args.data_set, "rows": rows}
    utils.save_text(json.dumps(results, indent=1), output / "results.json")
    utils.save_text(as_csv(rows), output / "results.csv")
    say(f"wrote {output / 'results.json'} and results.csv")
    if not peeled:
        say("to fine-tune one of them:")
        table = f" --mask_table {args.mask_table}" if args.mask_table else ""
        tail = f"--macs_ratio 0.5 --data_set {args.data_set} --data_path {args.data_path}"
        say(f"  python main_finetune_peeled.py --model {spec.name} --checkpoint {path}{table} {tail}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
