"""Stage 1: rewrite a pre-trained ViT so that every prefix of its dimensions keeps as much as possible (WPAC)."""

import copy
import json
from pathlib import Path

import torch

import datasets
import options
import utils
from models.piad.dropout import steps_by_error
from models.piad.width_table import TABLE_NAME, WidthTable
from models.subnet.store import WEIGHTS_NAME
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec, default_num_classes, load_pretrained, save_checkpoint
from models.vit.supernet import as_supernet, branches
from models.vit.weights import digest
from models.wpac.compensation import COMPENSATION_NAME, compensation_of, save_compensation
from models.wpac.density import densities
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES, collect_statistics
from report import DENSITY_NAME, TITLES, density, save_figure
from utils import InputError, print_once

# The options that report.json repeats: they say how the weights were made.
REPORTED = ("model", "input_size", "pretrained", "basis", "mlp_order", "objective", "proxy_samples", "seed")
# Largest difference of a full-width logit, relative to the largest logit, that float32 rounding may cause.
TOLERANCE = 1e-4


def get_args(argv=None):
    parser = options.stage_parser(__doc__)
    options.add_proxy_options(parser)
    options.add_cutting_options(parser)
    add = parser.add_argument_group("reparameterisation").add_argument
    add("--pretrained", help="DeiT checkpoint, state dict or .safetensors (default: timm's hub)")
    add("--basis", default="balanced", choices=["balanced", "pca"], help="pca is the paper's")
    words = "order of hidden units (default: greedy, or taylor with --no-compensation)"
    add("--mlp-order", choices=["greedy", "taylor", "hessian"], help=words)
    words = f"do not write {COMPENSATION_NAME} and {TABLE_NAME}, which are for cutting at once"
    options.switch_off(add, "compensation", words)
    add("--output-dir", help="folder of the files (default: output/reparam/<model>)")
    parser.set_defaults(amp="none")  # autocast would save a second or two on a GPU, and sort less precisely
    parser.checks.append(check_options)
    return parser.parse_args(argv)


def check_options(args):
    """Fill in the order of hidden units. Raises InputError if it contradicts --no-compensation."""
    if args.mlp_order == "greedy" and not args.compensation:
        raise InputError("--mlp-order greedy needs what --no-compensation leaves out; use taylor")
    for name in ("min_width", "multiple_of", "drop_ratio"):
        if name in args.given and not args.compensation:
            flag, why = f"--{name.replace('_', '-')}", "shapes the width table, which --no-compensation leaves out"
            raise InputError(f"{flag} {why}; give it to main_train.py")
    args.mlp_order = args.mlp_order or ("greedy" if args.compensation else "taylor")


def main(args):
    device = utils.start_up(args)
    images, original, spec = build_model(args)
    output = utils.output_folder(args.output_dir or Path("output/reparam") / args.model)
    proxy = datasets.proxy_loader(images, original, args, "proxy_samples")
    supernet = as_supernet(copy.deepcopy(original.to(device)))
    units, costs = options.units_of(args, supernet), Costs.of(supernet)
    drop_ratio = options.reachable_drop_ratio(args, units, costs) if args.compensation else None
    report_left_out(supernet)

    print_once(f"measuring {args.model} on {args.proxy_samples} images ({args.objective} objective)")
    objective = OBJECTIVES[args.objective]
    statistics = collect_statistics(supernet, proxy, objective, hidden=args.compensation, amp=args.amp)
    print_once("rewriting the weights")
    untouched = options.untouched_branches(args, supernet)
    rewrites = reparameterise(supernet, statistics, args.basis, args.mlp_order, untouched)
    difference = full_width_difference(original, supernet, proxy, device)
    print_once(f"full-width logits differ by {difference:.1e} (tolerance {TOLERANCE:.0e})")
    if not difference <= TOLERANCE:
        raise InputError(f"--basis {args.basis} changes this network's output by {difference:.1e}: nothing was written")

    report = {name: value for name, value in vars(args).items() if name in REPORTED}
    state = {name: value.cpu() for name, value in supernet.state_dict().items()}
    weights = digest(state)
    report |= {"num_classes": spec.num_classes, "full_width_difference": difference, "weights": weights}
    if args.compensation:
        compensation = compensation_of(supernet, statistics, rewrites)
        table = WidthTable(steps_by_error(compensation, units, costs, drop_ratio))
        table.describe(spec, costs)
        table.meta["weights"] = weights
        save_compensation(compensation, supernet, output / COMPENSATION_NAME, weights)
        table.save(output / TABLE_NAME)
        report["errors"] = {str(b): c.errors.tolist() for b, c in zip(branches(supernet), compensation, strict=True)}
        print_concentration(branches(supernet), report["errors"])
        picture = density(densities(supernet, statistics, rewrites))
        save_figure(picture, output / DENSITY_NAME, f"{spec.name}, --basis {args.basis}")
    # After what goes with them: alone, they would be taken for weights that are to be cut plainly.
    save_checkpoint(state, output / WEIGHTS_NAME)
    utils.save_text(json.dumps(report, indent=1), output / "report.json")
    print_next(args, output)


def build_model(args):
    """(training images, the pre-trained network, its ModelSpec)."""
    options.required_model(args)
    images = datasets.load_images(args, train=True)
    classes = args.nb_classes
    if classes is None:
        classes = images.num_classes or default_num_classes(args.model)
    if not classes and args.objective == "label":
        raise InputError("--nb-classes 0: without a classifier there are no logits to measure; use --objective feature")
    if args.objective == "label":
        datasets.fit_classes(images, classes)
    spec = ModelSpec(args.model, classes, args.input_size, args.eval_crop_ratio)
    if not args.pretrained:
        options.say_what_is_fetched(args.model, "--model")
    with utils.name_flag("--model", "--pretrained"):
        model, remarks = load_pretrained(spec, args.pretrained)
    utils.check_alike(f"--pretrained {args.pretrained or spec.name}", digest(model.state_dict()))
    for remark in remarks:
        print_once(f"note: {remark}")
    if remarks and args.objective == "label":
        print_once("note: the logits of a new classifier say nothing yet; --objective feature does without them")
    return images, model, spec


@torch.inference_mode()
def full_width_difference(original, rewritten, batches, device):
    """max |difference| / max |logit| of two networks over this rank's batches, in float32; the largest over ranks."""
    original.eval(), rewritten.eval()
    largest = torch.zeros(2, device=device)
    for images, _, _ in batches:
        before, after = original(images.to(device)), rewritten(images.to(device))
        largest = torch.maximum(largest, torch.stack(((before - after).abs().max(), before.abs().max())))
    difference, logit = utils.all_reduce(largest, "MAX").tolist()
    return difference / max(logit, 1e-12)


def report_left_out(supernet):
    """Print once for each class of attention and MLP what is not done to it, and why."""
    found = {}
    for branch in branches(supernet):
        for transform, reason in branch.part.left_out.items():
            found.setdefault((type(branch.module).stock.__name__, reason), {})[transform.value] = None
    for (name, reason), transforms in found.items():
        print_once(f"note: {name}: left out: {', '.join(transforms)} ({reason})")


def print_concentration(own, errors):
    """Print how much of what each block carries sits in the first quarter of its dimensions."""
    lines = {}
    for branch in own:
        values = errors[str(branch)]
        total = sum(values)
        share = f"{sum(values[: len(values) // 4]) / total:.1%}" if total else "nothing, as do all others"
        lines.setdefault(branch.path, []).extend([] if branch.indivisible else [f"{share} ({TITLES[branch.name]})"])
    for index, held in enumerate(lines.values()):
        print_once(f"block {index:2d}: first quarter of the dimensions holds {', '.join(held)}")


def print_next(args, output):
    """Print what was written, and the command that comes next."""
    weights = output / WEIGHTS_NAME
    if args.compensation:
        names = f"{COMPENSATION_NAME}, {TABLE_NAME}, {DENSITY_NAME} and report.json"
        print_once(f"wrote {weights}, {names}; to cut and test without training:")
        options.print_command(args, "main_test.py", "--checkpoint", output)
        print_once("and to train a super-network from here:")
    else:
        print_once(f"wrote {weights} and report.json; next:")
    options.print_command(args, "main_train.py", *options.model_flags(args), "--pretrained", weights)


if __name__ == "__main__":
    utils.run_stage(main, get_args())
