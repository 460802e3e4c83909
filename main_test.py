"""Stage 3: cut sub-networks of any size out of a super-network, evaluate them, and write a table and files of them."""

from pathlib import Path

import torch

import datasets
import options
import report
import utils
from engine import evaluate_all, probe
from models.subnet import export
from models.subnet.budget import Budget
from models.vit.cost import MATMULS
from utils import InputError, print_once

# Without a budget: these shares of the full network's MACs, as in the paper's figures.
DEFAULT_LADDER = tuple(Budget("macs_ratio", share) for share in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6))
# So many sub-networks are in memory at once and share a pass over the test images.
TOGETHER = 8


def get_args(argv=None):
    parser = options.stage_parser(__doc__, classes=False)
    options.add_budget_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", help="folder of results.json and results.csv (default: output/test/<model>)")
    add("--save", metavar="DIR", help="write what is cut: model.safetensors, config.json, README.md")
    words = "also as ONNX, torch.export or int8 ONNX (which needs the first), into --save (default: <output-dir>/saved)"
    add("--export", nargs="+", default=[], choices=export.FORMATS, help=words)
    add("--benchmark", action="store_true", help="measure latency and images/s in turns, of ONNX exports too")
    words = "names of the checkpoint's classes, a line each, if the data set has some of them (default: ImageNet's)"
    add("--class-map", metavar="FILE", help=words)
    words = "without a classifier: fit nearest neighbours or logistic regression to the features of the training images"
    add("--probe", choices=["knn", "linear"], help=words)
    add("--plot", action="store_true", help="draw costs, kept widths and where the knowledge lies")
    words = "write page.html, a slider over all sizes, with these results laid over it (needs plotly)"
    add("--page", nargs="*", metavar="LABEL=FOLDER", help=words)
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    check_export(args)
    loaded = options.load(args)
    if loaded.one_size and (args.plot or args.page is not None):
        flag = "--plot" if args.plot else "--page"
        raise InputError(f"{flag} draws a super-network: {loaded.source} is one sub-network")
    others = [report.read(text) for text in args.page or ()]
    output = utils.output_folder(args.output_dir or Path("output/test") / loaded.spec.name)
    saved = Path(args.save) if args.save else output / "saved" if args.export else None
    test = make_test(args, loaded)
    rows = test_all(loaded, test, args, device, saved and utils.output_folder(saved, "--save"))
    results = {"checkpoint": str(loaded.source), "model": loaded.spec.name, "data_set": args.data_set}
    results |= {"amp": args.amp, "rows": rows}
    if args.benchmark:
        report.write(results, output)  # what was tested is not lost if a network is too large to be timed
        options.benchmark(loaded, rows, args, device)
    report.show(rows)
    report.write(results, output)
    print_once(f"wrote {output / 'results.json'} and results.csv")
    if args.plot and utils.is_main():
        report.draw_all(results, loaded, output)
        print_once(f"drew {output / 'ladder.png'}, widths.png and knowledge.png")
    flags = ["--model", loaded.spec.name, "--checkpoint", loaded.source, *cutting_flags(args)]
    if args.page is not None and utils.is_main():
        write_page(args, loaded, rows, others, flags, output / "page.html")
    if not loaded.one_size:
        print_once("to fine-tune one of them:")
        budget = ("--macs-ratio", 0.5) if least_share(loaded) <= 0.5 else ("--op-code", loaded.table.last)
        options.print_command(args, "main_finetune_peeled.py", *flags, *budget)


def write_page(args, loaded, rows, others, flags, path):
    """flags: words of the command line that say what is cut, for the command beside every step of the table."""
    import page  # plotly is there only if wanted

    given = [name for name in ("class_map", "probe") if name in args.given]
    testing = [*flags, *options.words_of(args, *given)]
    steps = [["--op-code", step, "--save", f"step_{step}"] for step in range(len(loaded.table.steps))]
    commands = [options.command(args, "main_test.py", *testing, *step) for step in steps]
    page.write(rows, loaded, commands, others, path)
    print_once(f"wrote {path}")


def least_share(loaded):
    """The share of the MACs that the smallest sub-network of the table has."""
    return loaded.costs.macs(loaded.table.steps[-1]) / loaded.costs.macs(loaded.costs.full)


def default_ladder(loaded):
    """The budgets of DEFAULT_LADDER that the table reaches, and its last step in the place of those it does not."""
    within = [budget for budget in DEFAULT_LADDER if budget.value >= least_share(loaded)]
    return within if len(within) == len(DEFAULT_LADDER) else [*within, Budget("op_code", loaded.table.last)]


def cutting_flags(args):
    """The words of the command line that say what is cut from a super-network, and how."""
    words = options.words_of(args, "input_size", "eval_crop_ratio", "mask_table", "compensation", "calibrate")
    return words + ["--use-ema"] * args.use_ema + ["--no-compensation"] * (args.compensate is False)


def check_export(args):
    """Raise InputError if packages that --export or --page needs are not installed, if ranks would export alike, or if
    --benchmark is to measure on a file."""
    utils.need(f"--export {' '.join(args.export)}", export.packages(args.export))
    utils.need("--page", ["plotly"] if args.page is not None else [])
    if args.export and utils.world_size() > 1:
        raise InputError("--export runs in one process: start it without torchrun")
    if args.benchmark and options.is_file(args):
        raise InputError(f"--benchmark measures: --latency-device {args.latency_device} must be cpu or cuda")


def make_test(args, loaded):
    """The function (networks, device) -> figures of the accuracy of each, on the test set; without any if there is no
    classifier and no probe of the features. Raises InputError if the data set is not that of the classifier."""
    classes, network = loaded.spec.num_classes, loaded.supernet
    if args.probe and classes:
        raise InputError(f"--probe {args.probe}: {loaded.source} has a classifier, which is tested itself")
    if args.class_map and not classes:
        raise InputError(f"--class-map {args.class_map}: {loaded.source} has no classifier")
    if not classes and not args.probe:
        print_once("no classifier: costs alone (--probe knn classifies the features by those of training images)")
        return lambda networks, device: [dict.fromkeys(("loss", "top1", "top5", "images_per_s")) for _ in networks]
    images = datasets.load_images(args, train=False)
    if args.probe:
        both = [datasets.eval_loader(x, network, args) for x in (datasets.load_images(args, train=True), images)]
        return lambda networks, device: [probe(n, *both, device, args.amp, args.probe) for n in networks]
    names = known = network.pretrained_cfg.get("label_names")  # of a sub-network that was saved with them
    own = datasets.class_names(images)
    if args.class_map:
        names = utils.read_text(args.class_map, "expected the name of a class in every line").splitlines()
    if args.class_map or images.num_classes not in (None, classes) or (known and own not in (None, list(known))):
        names = datasets.relabel(images, classes, f"--data-set {args.data_set}", names)
    network.pretrained_cfg["label_names"] = names or own
    loader = datasets.eval_loader(images, network, args)
    return lambda networks, device: evaluate_all([(n, None) for n in networks], loader, device, args.amp)


def test_all(loaded, test, args, device, saved):
    """The rows of the table: one for every budget and one for its int8 export, each on an extracted network.

    A sub-network has one row. test: of ``make_test``. saved: the folder that the sub-networks are written to, if any.
    """
    asked, origin = options.budgets(args) or default_ladder(loaded), {"checkpoint": str(loaded.source)}
    if loaded.one_size:
        asked = [Budget("op_code", 0)]
    else:
        origin |= {"compensated": loaded.compensation is not None, "calibrated": args.calibrate}
    folders = [saved] if len(asked) == 1 else [saved and saved / budget.folder for budget in asked]
    if saved and len(set(folders)) < len(asked):
        raise InputError("--save: two budgets would be written to one folder; ask for each of them once")
    choices = options.choose(loaded, asked, args, device)
    if loaded.compensation:
        print_once("compensating by the file beside the weights (--no-compensation for plain slices)")
    rows = []
    for start in range(0, len(asked), TOGETHER):
        part = slice(start, start + TOGETHER)
        subnets = options.cut(loaded, [choice.widths for choice in choices[part]], args, device)
        tested = zip(asked[part], choices[part], folders[part], subnets, test(subnets, device), strict=True)
        for budget, choice, folder, subnet, figures in tested:
            about = {"asked": str(budget), "step": choice.step, "finer": choice.finer, "latency_ms": choice.latency_ms}
            about |= {"asked": "as it is", "step": None} if loaded.one_size else {}
            rows += rows_of(loaded, choice.widths, subnet, figures, test, args, about | origin, folder)
    return rows


def rows_of(loaded, widths, subnet, figures, test, args, about, folder):
    """The rows of a sub-network, which is written to ``folder`` if there is one.

    figures: of its accuracy. about: members of the rows beside costs and accuracy.
    """
    costs = {
        "macs": loaded.costs.macs(widths),
        "macs_with_attention_matmuls": loaded.costs.macs(widths, MATMULS),
        "parameters": sum(p.numel() for p in subnet.parameters()),
        "widths": widths.as_dict(),
        "file": None,
    }
    if about["latency_ms"]:
        figures["images_per_s"] = 1e3 * args.latency_batch_size / about["latency_ms"]
    rows = [about | costs | figures]
    if folder:
        measured = {name: figures[name] for name in ("top1", "top5", "images", "probe") if figures.get(name)}
        origin = about | {"data_set": args.data_set} | measured
        files = loaded.save(folder, widths, args.export, network=subnet, origin=origin)
        for name, difference in files.items():
            compared = (
                "" if difference is None else f": largest difference from PyTorch {difference:.1e} of the largest logit"
            )
            print_once(f"wrote {folder / name}{compared}")
        rows += [exported_row(rows[0], name, folder, test, args) for name in ("onnx", "int8") if name in args.export]
    return rows


def exported_row(row, name, folder, test, args):
    """The ``row`` of a sub-network for its export to ONNX (as accurate, and so not tested again) or to int8."""
    file = folder / {"onnx": export.ONNX_NAME, "int8": export.INT8_NAME}[name]
    untimed = {"asked": f"{row['asked']}, {name}", "file": str(file), "latency_ms": None}
    figures = test([export.OnnxNetwork(file)], torch.device("cpu"))[0] if name == "int8" else {}
    # On other batches than a latency: only --benchmark times both alike.
    return row | figures | untimed | ({"images_per_s": None} if row["latency_ms"] or name == "onnx" else {})


if __name__ == "__main__":
    utils.run_stage(main, get_args())
