"""Stage 3: cut sub-networks of any size out of a super-network, evaluate them, and write a table and files of them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import datasets
import utils
from engine import evaluate
from models import export, latency, peel, store
from models.calibration import calibrate
from models.cost import MATMULS, Shapes
from models.statistics import OBJECTIVES
from models.supernet import as_supernet
from models.vit import ModelSpec
from models.width_table import BUDGET_KINDS, Budget
from options import add_budget_options, stage_parser
from tools import results
from utils import InputError, say

# Without a budget: these shares of the full network's MACs, as in the paper's figures.
DEFAULT_LADDER = tuple(Budget("macs_ratio", share) for share in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6))


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_budget_options(parser, several=True)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default=None, help="for results.json and results.csv; output/test/<model>")
    group.add_argument("--save", default=None, metavar="DIR", help="write what is cut: model.safetensors, config.json")
    group.add_argument(
        "--export", nargs="+", default=[], choices=["onnx", "pt2", "int8"],
        help="also as ONNX, torch.export or int8 ONNX (which needs the first); into --save, <output_dir>/saved",
    )  # fmt: skip
    group.add_argument("--benchmark", action="store_true", help="measure latency and images/s in turns")
    group.add_argument("--plot", action="store_true", help="draw costs, kept widths and where the knowledge lies")
    return parser.parse_args(argv)


def budgets(args):
    """The budgets on the command line, in the order of the flags."""
    kinds = (*BUDGET_KINDS, "latency_ms")
    return [Budget(kind, value) for kind in kinds for value in _as_list(getattr(args, kind))]


def _as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


@dataclass
class Setting:
    """What the sub-networks of one run have in common."""

    spec: ModelSpec
    shapes: Shapes
    loader: object
    args: object
    device: object

    def rows(self, network, widths, about, folder=None):
        """Rows of the table: of ``network`` and of its int8 export; writes it to ``folder`` if there is one.

        ``about``: what the rows say beside costs and accuracy.
        """
        args = self.args
        costs = {
            "macs": self.shapes.macs(widths),
            "macs_with_attention_matmuls": self.shapes.macs(widths, MATMULS),
            "parameters": sum(p.numel() for p in network.parameters()),
            "widths": widths.as_dict(),
        }
        figures = evaluate(network.to(self.device), self.loader, self.device, args.amp)
        if about.get("latency_ms"):
            figures["images_per_s"] = 1e3 * args.latency_batch_size / about["latency_ms"]
        rows = [about | costs | figures]
        if folder:
            ratio, formats = args.eval_crop_ratio, args.export
            export.save(network, self.spec, widths, self.shapes, folder, about, ratio, formats)
            if "int8" in formats:
                figures = evaluate(export.OnnxNetwork(folder / export.INT8_NAME), self.loader, torch.device("cpu"))
                rows.append(about | {"asked": f"{about['asked']}, int8", "latency_ms": None} | costs | figures)
        return rows


def test_images(args, classes, model):
    """The loader of the test set, checked against the classifier."""
    if not classes:
        raise InputError(
            "the checkpoint has no classifier to test; models.store.load_supernet(...).cut(widths) cuts it"
        )
    images = datasets.load_images(args, train=False)
    own = datasets.count_classes(images)
    if own and own != classes:
        raise InputError(f"--data_set {args.data_set} has {own} classes, the checkpoint {classes}")
    return datasets.eval_loader(images, datasets.eval_transform(args, datasets.data_config(model)), args)


def test_supernet(net, args, device, saved):
    """Rows for every budget, each on an extracted network."""
    asked = budgets(args) or DEFAULT_LADDER
    folders = dict.fromkeys(asked, saved) if len(asked) == 1 else {b: saved and saved / b.folder for b in asked}
    if saved and len(set(folders.values())) < len(asked):
        raise InputError("--save: two budgets would be written to one folder; ask for each of them once")
    setting = Setting(net.spec, net.shapes, test_images(args, net.spec.num_classes, net.model), args, device)
    choices = latency.choose(net, asked, args, device)
    if args.benchmark:
        choices = latency.benchmark(net, choices, args, device)
    origin = {"checkpoint": str(net.source), "compensated": net.memory is not None, "calibrated": args.calibrate}
    if net.memory:
        say("compensating with the statistics beside the weights (--no_compensate for plain slices)")
    rows = []
    for budget, choice in zip(asked, choices, strict=True):
        about = {"asked": str(budget), "step": choice.step, "finer": choice.finer, "latency_ms": choice.latency_ms}
        network = cut(net, choice.widths, args, device)
        rows += setting.rows(network, choice.widths, about | origin, folders[budget])
    return rows


def cut(net, widths, args, device):
    """The sub-network of ``widths``, calibrated on training images if ``--calibrate`` asks for it."""
    network = net.cut(widths)
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


def load_alone(path, content, args, **kwargs):
    """The network, its spec and widths of a checkpoint that is a sub-network already; budgets are refused."""
    for budget in budgets(args):
        raise InputError(f"--{budget}: {path} is one sub-network of one size; budgets need the super-network")
    content = content | {"model": store.chosen_weights(content, args.use_ema, path)}
    return peel.load_peeled(content, path, args.input_size, **kwargs)


def test_peeled(network, spec, widths, path, args, device, saved):
    """The row of a network that is a sub-network already: fine-tuned, or saved."""
    loader = test_images(args, spec.num_classes, network)
    about = {"asked": "as it is", "step": None, "finer": False, "latency_ms": None, "checkpoint": str(path)}
    if args.benchmark:
        conditions = latency.Conditions.of(network, device, args.latency_batch_size, args.amp)
        (about["latency_ms"],) = latency.measure([network.to(device)], device, conditions)
        say(f"latencies: {conditions}")
    return Setting(spec, Shapes.of(as_supernet(spec.build())), loader, args, device).rows(network, widths, about, saved)


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    export.require(args.export)
    path = store.resolve(args)
    content, net = store.read(path), None
    if "peeled" in content:
        network, spec, widths = load_alone(path, content, args)
        test = partial(test_peeled, network, spec, widths, path)
    else:
        net = store.load_supernet(path, content, **store.loading_options(args))
        test, spec = partial(test_supernet, net), net.spec
    output = utils.output_folder(args.output_dir or Path("output/test") / spec.name)
    saved = Path(args.save) if args.save else output / "saved" if args.export else None
    rows = test(args, device, saved and utils.output_folder(saved, "--save"))
    results.show(rows)
    results.write({"checkpoint": str(path), "model": spec.name, "data_set": args.data_set, "rows": rows}, output)
    if args.plot and utils.is_main():
        from tools import plot  # matplotlib takes a second to import

        say(f"drew {', '.join(plot.draw_all(rows, net, output))}")
    if net:
        say("to fine-tune one of them:")
        table = f" --mask_table {args.mask_table}" if args.mask_table else ""
        tail = f"--macs_ratio 0.5 --data_set {args.data_set} --data_path {args.data_path}"
        say(f"  python main_finetune_peeled.py --model {spec.name} --checkpoint {path}{table} {tail}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
