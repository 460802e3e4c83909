"""Stage 1: rewrite a pre-trained ViT so that every prefix of its dimensions keeps as much as possible (WPAC)."""

import copy
import json
from pathlib import Path

import torch

import datasets
import utils
from models import piad, store
from models.compensation import MEMORY_NAME, save_memory
from models.cost import Shapes
from models.statistics import OBJECTIVES, collect_statistics
from models.supernet import as_supernet, blocks_of
from models.vit import ModelSpec, default_num_classes, load_pretrained
from models.width_table import WidthTable
from models.wpac import reparameterise
from options import (
    add_cutting_options,
    add_proxy_options,
    groups_of,
    left_alone,
    reachable_drop_ratio,
    stage_parser,
    switch,
)
from utils import InputError, fraction, say

# The options that say how the weights came about.
REPORTED = ("model", "input_size", "pretrained", "basis", "mlp_order", "objective", "proxy_samples", "seed")
NAMES = ("attention", "MLP")
# Largest difference of a full-width logit, relative to the largest logit, that float32 rounding may cause.
TOLERANCE = 1e-4


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    add_cutting_options(parser)
    group = parser.add_argument_group("reparameterisation")
    group.add_argument("--pretrained", default=None, help="DeiT checkpoint, state dict or .safetensors; timm's hub")
    group.add_argument("--basis", default="balanced", choices=["balanced", "pca"], help="pca is the paper's")
    group.add_argument(
        "--mlp_order",
        choices=["greedy", "taylor", "hessian"],
        help="order of hidden units; greedy, or taylor with --no_compensation",
    )
    switch(group, "compensation", True, "also write statistics.safetensors and mask_table.json, for cutting at once")
    group.add_argument("--drop_ratio", type=fraction, default=0.875, help="share of MACs gone at the table's last step")
    group.add_argument("--output_dir", default=None, help="output/reparam/<model>")
    return parser.parse_args(argv)


@torch.inference_mode()
def full_width_difference(original, rewritten, batches, device):
    """max |difference| / max |logit| of two networks over this rank's batches, in float32; the largest over ranks."""
    original.eval(), rewritten.eval()
    largest = torch.zeros(2, device=device)
    for images, _, _ in batches:
        before, after = original(images.to(device)), rewritten(images.to(device))
        largest = torch.maximum(largest, torch.stack(((before - after).abs().max(), before.abs().max())))
    difference, logit = utils.all_reduce_max(largest).tolist()
    return difference / max(logit, 1e-12)


def build_model(args):
    """The pre-trained network and its spec."""
    if not args.model:
        raise InputError("--model is required: vit_tiny, vit_small, vit_base, or a name of timm's (python -m models)")
    images = datasets.load_images(args, train=True)
    classes = args.nb_classes
    if classes is None:
        classes = datasets.count_classes(images) or default_num_classes(args.model)
    if not classes and args.objective == "label":
        raise InputError("--nb_classes 0: without a classifier there are no logits to measure; use --objective feature")
    if args.objective == "label":
        datasets.check_classes(images, classes, f"--nb_classes {args.nb_classes}")
    spec = ModelSpec(args.model, classes, args.input_size)
    model, remarks = load_pretrained(spec, args.pretrained)
    for remark in remarks:
        say(f"note: {remark}")
    if remarks and args.objective == "label":
        say("note: the logits of a new classifier say nothing yet; --objective feature does without them")
    return images, model, spec


def report_left_out(model):
    """Say once for each kind of attention and MLP what is not done to it, and why."""
    found = {}
    for block in blocks_of(model):
        for part, module in zip(block.parts, (block.attn, block.mlp), strict=True):
            for transform, reason in part.left_out.items():
                found.setdefault((type(module).__name__, reason), {})[transform] = None
    for (name, reason), transforms in found.items():
        say(f"note: {name}: left out: {', '.join(transforms)} ({reason})")


def width_table(spec, memory, groups, shapes, drop_ratio):
    """The table of a training-free super-network, grown in one go from the errors that dropping each unit leaves."""
    table = WidthTable(piad.steps_by_error(memory, groups, shapes, drop_ratio))
    table.meta = store.table_meta(spec, shapes, table)
    return table


def check_options(args):
    """Fill in the order of hidden units. Raises InputError if it contradicts --no_compensation."""
    if args.mlp_order == "greedy" and not args.compensation:
        raise InputError("--mlp_order greedy needs the statistics that --no_compensation leaves out; use taylor")
    if args.min_width and not args.compensation:
        raise InputError(
            "--min_width bounds the width table, which --no_compensation leaves out; give it to main_train.py"
        )
    args.mlp_order = args.mlp_order or ("greedy" if args.compensation else "taylor")


def main(args):
    check_options(args)
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    images, model, spec = build_model(args)
    output = utils.output_folder(args.output_dir or Path("output/reparam") / args.model)
    transform = datasets.eval_transform(args, datasets.data_config(model))
    loader = datasets.proxy_loader(images, transform, args, args.proxy_samples)
    original = model.to(device)
    model = as_supernet(copy.deepcopy(original))
    groups, shapes = groups_of(args, model), Shapes.of(model)
    if args.compensation:
        args.drop_ratio = reachable_drop_ratio(args, groups, shapes)
    report_left_out(model)

    say(f"measuring {args.model} on {args.proxy_samples} images ({args.objective} objective)")
    objective = OBJECTIVES[args.objective]
    statistics = collect_statistics(model, loader, objective, device, hidden=args.compensation, amp=args.amp)
    datasets.report_bad_images(loader, "proxy set")
    alone = left_alone(args, 2 * len(statistics))
    results = reparameterise(model, statistics, args.basis, args.mlp_order, alone)
    difference = full_width_difference(original, model, loader, device)
    say(f"full-width logits differ by {difference:.1e} (tolerance {TOLERANCE:.0e})")
    if not difference <= TOLERANCE:
        raise InputError(f"--basis {args.basis} changes this network's output by {difference:.1e}: nothing was written")

    table = width_table(spec, results, groups, shapes, args.drop_ratio) if args.compensation else None
    weights = output / store.WEIGHTS_NAME
    utils.save_torch({name: value.cpu() for name, value in model.state_dict().items()}, weights)
    report = {name: value for name, value in vars(args).items() if name in REPORTED}
    report |= {"num_classes": spec.num_classes, "full_width_difference": difference}
    if table:
        save_memory(results, model, output / MEMORY_NAME)
        utils.save_text(table.to_json(), output / store.TABLE_NAME)
        report["errors"] = [{"attn": r.attn_error.tolist(), "mlp": r.mlp_error.tolist()} for r in results]
        for index, (errors, block) in enumerate(zip(report["errors"], blocks_of(model), strict=True)):
            say(f"block {index:2d}: {concentration(errors, block.parts)}")
    utils.save_text(json.dumps(report, indent=1), output / "report.json")
    tail = f"--data_set {args.data_set} --data_path {args.data_path}"
    if args.compensation:
        say(f"wrote {weights}, {MEMORY_NAME}, {store.TABLE_NAME} and report.json; to cut and test without training:")
        say(f"  python main_test.py --checkpoint {output} {tail}")
        if args.mlp_order == "greedy":
            say("to train a super-network from here, use --mlp_order taylor: that order trains better")
    else:
        say(f"wrote {weights} and report.json; next:")
        say(f"  python main_train.py --model {args.model} --pretrained {weights} {tail}")


def concentration(errors, parts):
    """How much of what a block carries sits in the first quarter of its dimensions, in words."""
    shares = [sum(e[: len(e) // 4]) / max(sum(e), 1e-30) for e in (errors["attn"], errors["mlp"])]
    held = [f"{share:.0%} ({name})" for share, name, part in zip(shares, NAMES, parts, strict=True) if not part.whole]
    return f"first quarter of the dimensions holds {', '.join(held)}"


if __name__ == "__main__":
    utils.run_stage(main, get_args())
