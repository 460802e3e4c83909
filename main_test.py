"""Stage 3: cut sub-networks of any size out of a super-network, evaluate them, and write a table and files of them."""

from importlib.util import find_spec
from pathlib import Path

import torch

import datasets
import report
import utils
from engine import evaluate
from models.subnet import export
from models.subnet.budget import Budget
from models.vit.cost import MATMULS
from options import add_budget_options, benchmark, budgets, choose, command, cut, load, print_command, stage_parser
from utils import InputError, print_once

# Without a budget: these shares of the full network's MACs, as in the paper's figures.
DEFAULT_LADDER = tuple(Budget("macs_ratio", share) for share in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6))


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_budget_options(parser, several=True)
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", help="folder of results.json and results.csv (default: output/test/<model>)")
    add("--save", metavar="DIR", help="write what is cut: model.safetensors, config.json")
    add(
        "--export",
        nargs="+",
        default=[],
        choices=export.FORMATS,
        help="also as ONNX, torch.export or int8 ONNX (which needs the first), into --save (default: "
        "<output-dir>/saved)",
    )
    add("--benchmark", action="store_true", help="measure latency and images/s in turns")
    add("--plot", action="store_true", help="draw costs, kept widths and where the knowledge lies")
    words = "write page.html, a slider over all sizes, with these results laid over it (needs plotly)"
    add("--page", nargs="*", metavar="LABEL=FOLDER", help=words)
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    check_export(args)
    loaded = load(args)
    if loaded.one_size and (args.plot or args.page is not None):
        flag = "--plot" if args.plot else "--page"
        raise InputError(f"{flag} draws a super-network: {loaded.source} is one sub-network")
    others = [report.read(text) for text in args.page or ()]
    output = utils.output_folder(args.output_dir or Path("output/test") / loaded.spec.name)
    saved = Path(args.save) if args.save else output / "saved" if args.export else None
    test = test_images(args, loaded)
    rows = test_all(loaded, test, args, device, saved and utils.output_folder(saved, "--save"))
    report.show(rows)
    report.write(
        {"checkpoint": str(loaded.source), "model": loaded.spec.name, "data_set": args.data_set, "rows": rows}, output
    )
    if args.plot and utils.is_main():
        print_once(f"drew {', '.join(report.draw_all(rows, loaded, output))}")
    flags = ["--model", loaded.spec.name, "--checkpoint", loaded.source]
    flags += ["--mask-table", args.mask_table] if args.mask_table else []
    if args.page is not None and utils.is_main():
        import page  # plotly is there only if wanted

        def cutting(step):
            return command(args, "main_test.py", *flags, "--op-code", step, "--save", f"{loaded.spec.name}_{step}")

        page.write(rows, loaded, cutting, others, output / "page.html")
        print_once(f"wrote {output / 'page.html'}")
    if not loaded.one_size:
        print_once("to fine-tune one of them:")
        print_command(args, "main_finetune_peeled.py", *flags, "--macs-ratio", 0.5)


def check_export(args):
    """Raise InputError if packages that --export or --page needs are not installed, or if ranks would export alike."""
    if args.page is not None and not find_spec("plotly"):
        raise InputError("--page needs plotly: pip install plotly")
    missing = export.missing_packages(args.export)
    if missing:
        words = " ".join(missing)
        raise InputError(f"--export {' '.join(args.export)} needs {', '.join(missing)}: pip install {words}")
    if args.export and utils.world_size() > 1:
        raise InputError("--export runs in one process: start it without torchrun")


def test_images(args, loaded):
    """The loader of the test set, checked against the classifier."""
    classes = loaded.spec.num_classes
    if not classes:
        raise InputError(
            "the checkpoint has no classifier to test; models.subnet.load_supernet(...).cut(macs_ratio=0.5) cuts it"
        )
    images = datasets.load_images(args, train=False)
    own = datasets.count_classes(images)
    if own and own != classes:
        raise InputError(f"--data-set {args.data_set} has {own} classes, the checkpoint {classes}")
    return datasets.eval_loader(images, datasets.eval_transform(args, datasets.data_config(loaded.supernet)), args)


def test_all(loaded, test, args, device, saved):
    """The rows of the table: one for every budget and one for its int8 export, each on an extracted network.

    A sub-network has one row. saved: the folder that the sub-networks are written to, if any.
    """
    asked, origin = budgets(args) or DEFAULT_LADDER, {"checkpoint": str(loaded.source)}
    if loaded.one_size:
        asked = [Budget("op_code", 0)]
    else:
        origin |= {"compensated": loaded.compensation is not None, "calibrated": args.calibrate}
    folders = [saved] if len(asked) == 1 else [saved and saved / budget.folder for budget in asked]
    if saved and len(set(folders)) < len(asked):
        raise InputError("--save: two budgets would be written to one folder; ask for each of them once")
    choices = choose(loaded, asked, args, device)
    choices = benchmark(loaded, choices, args, device) if args.benchmark else choices
    if loaded.compensation:
        print_once("compensating by the file beside the weights (--no-compensation for plain slices)")
    rows = []
    for budget, choice, folder in zip(asked, choices, folders, strict=True):
        about = {"asked": str(budget), "step": choice.step, "finer": choice.finer, "latency_ms": choice.latency_ms}
        about |= {"asked": "as it is", "step": None} if loaded.one_size else {}
        rows += test_one(loaded, choice.widths, test, args, device, about | origin, folder)
    return rows


def test_one(loaded, widths, test, args, device, about, folder):
    """Cut one sub-network, evaluate it, and write it to ``folder`` if there is one. Returns its rows.

    about: members of the rows beside costs and accuracy.
    """
    subnet = cut(loaded, widths, args, device)
    costs = {
        "macs": loaded.costs.macs(widths),
        "macs_with_attention_matmuls": loaded.costs.macs(widths, MATMULS),
        "parameters": sum(p.numel() for p in subnet.parameters()),
        "widths": widths.as_dict(),
    }
    figures = evaluate(subnet.to(device), test, device, args.amp)
    if about["latency_ms"]:
        figures["images_per_s"] = 1e3 * args.latency_batch_size / about["latency_ms"]
    rows = [about | costs | figures]
    if folder:
        files = loaded.save(folder, widths, args.export, network=subnet, crop_ratio=args.eval_crop_ratio, origin=about)
        for name, difference in files.items():
            compared = (
                "" if difference is None else f": largest difference from PyTorch {difference:.1e} of the largest logit"
            )
            print_once(f"wrote {folder / name}{compared}")
        if "int8" in args.export:
            figures = evaluate(export.OnnxNetwork(folder / export.INT8_NAME), test, torch.device("cpu"))
            rows.append(about | {"asked": f"{about['asked']}, int8", "latency_ms": None} | costs | figures)
    return rows


if __name__ == "__main__":
    utils.run_stage(main, get_args())
