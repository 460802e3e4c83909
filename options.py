"""Command-line options that several stages share, with DeiT's names and defaults."""

import math

import torch
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from torch import nn

from models.piad import Groups, check_reachable
from models.supernet import blocks_of, full_widths
from models.width_table import Widths
from utils import (
    InputError,
    StageParser,
    device_name,
    first_line,
    fraction,
    interval,
    non_negative_int,
    positive_int,
    probability,
    quantity,
    say,
)

# timm's, less those that wait for an accuracy or do nothing.
SCHEDULERS = ["cosine", "tanh", "step", "multistep", "poly"]


def stage_parser(description):
    """A parser with the options of every stage: model, data, device."""
    parser = StageParser(description=description)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=None, help="vit_tiny, vit_small, vit_base, or a name of timm's (python -m models)"
    )
    group.add_argument("--input_size", type=positive_int, default=None, help="image size in pixels; the model's own")
    group.add_argument(
        "--nb_classes", type=non_negative_int, default=None, help="classes, 0 for no classifier; those of the data set"
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="data", help="folder of the data set")
    group.add_argument(
        "--data_set", default="IMNET",
        help="IMNET, CIFAR10, CIFAR (100), FLOWERS, FOOD, CARS, CUB, INAT (2018), INAT19, DIGITS, FASHION_MNIST, or a "
        "name for timm's create_dataset",
    )  # fmt: skip
    group.add_argument("--batch_size", type=positive_int, default=64, help="images per rank and step")
    group.add_argument(
        "--eval_crop_ratio", type=interval("[0.1, 1]"), default=0.875, help="centre crop / resized image"
    )
    group.add_argument(
        "--num_workers", type=interval("[0, 1024]", int), default=10, help="data loading processes per rank"
    )
    group.add_argument("--skip_bad_images", action="store_true", help="go on without images that cannot be read")
    switch(group, "pin_mem", True, "pin memory for faster copies to the GPU")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", type=device_name, default="auto", help="auto, cpu or cuda")
    group.add_argument("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="autocast type")
    group.add_argument("--seed", type=interval("[0, 4294967295]", int), default=0, help="seed of everything random")
    return parser


def switch(group, name, default, help):
    """DeiT's pairs of flags: --name and --no_name."""
    group.add_argument(f"--{name}", action="store_true", default=default, help=help)
    group.add_argument(f"--no_{name}", action="store_false", dest=name, default=default)


def add_cutting_options(parser):
    group = parser.add_argument_group("what may be cut")
    group.add_argument(
        "--skip_blocks", type=non_negative_int, nargs="+", default=[], metavar="B", help="blocks to leave as they are"
    )
    group.add_argument("--only", choices=["attn", "mlp"], help="leave the other branches as they are")
    group.add_argument(
        "--min_width", type=interval("[0, 1]"), default=0.0, help="share of its full width that every branch keeps"
    )


def groups_of(args, model):
    """The droppable units of a super-network, as the options of ``add_cutting_options`` leave them."""
    full, parts = full_widths(model), [part for block in blocks_of(model) for part in block.parts]
    for block in args.skip_blocks:
        if block >= len(full.attn):
            raise InputError(f"--skip_blocks {block}: the model has blocks 0 to {len(full.attn) - 1}")
    least = [math.ceil(args.min_width * width) for width in full.flat]
    for branch in left_alone(args, len(least)):
        least[branch] = full.flat[branch]
    return Groups.of(full, [part.whole for part in parts], Widths.from_flat(least))


def reachable_drop_ratio(args, groups, shapes):
    """``--drop_ratio``, or what the options of ``add_cutting_options`` leave of it, which is then said.

    Raises InputError if they leave nothing to cut, or if the ratio is out of reach without them.
    """
    least = shapes.macs(groups.least) / shapes.macs(groups.full)
    if least == 1:
        raise InputError("--skip_blocks, --only and --min_width leave nothing to cut")
    if not any(groups.least.flat) or args.drop_ratio <= 1 - least:
        check_reachable(groups, shapes.macs, shapes.macs(groups.full) * (1 - args.drop_ratio))
        return args.drop_ratio
    say(f"note: the smallest network that may be cut has {least:.3f} of the MACs: the width table ends there")
    # A little less: at its last step the table has lost no less than the ratio.
    return (1 - least) * (1 - 1e-12)


def left_alone(args, branches):
    """The branches, by their index in Widths.flat, that ``--skip_blocks`` and ``--only`` leave as they are."""
    other = {None: (), "attn": (1,), "mlp": (0,)}[args.only]
    return {b for b in range(branches) if b // 2 in args.skip_blocks or b % 2 in other}


def add_proxy_options(parser):
    group = parser.add_argument_group("proxy set")
    group.add_argument("--proxy_samples", type=positive_int, default=1024, help="training images that are measured on")
    group.add_argument(
        "--objective", default="label", choices=["label", "feature"],
        help="what gradients are taken of: the true class's logit, or (no labels needed) the pooled feature",
    )  # fmt: skip


def add_training_options(parser, epochs, lr, min_lr, warmup_epochs):
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the training set")
    group.add_argument("--opt", default="adamw", help="a timm optimiser")
    group.add_argument("--lr", type=interval("(0, inf)"), default=lr, help="learning rate for a batch of 512 images")
    group.add_argument("--unscale_lr", action="store_true", help="take --lr as it is, whatever the batch")
    group.add_argument("--weight_decay", type=interval("[0, inf)"), default=0.05)
    group.add_argument("--accum_iter", type=positive_int, default=1, help="batches whose gradients make one update")
    group.add_argument(
        "--clip_grad", type=interval("(0, inf)"), default=None, help="largest gradient norm; None for no clipping"
    )
    group.add_argument("--sched", default="cosine", choices=SCHEDULERS, help="a timm scheduler")
    group.add_argument("--warmup_epochs", type=non_negative_int, default=warmup_epochs)
    group.add_argument("--warmup_lr", type=interval("[0, inf)"), default=1e-6)
    group.add_argument("--min_lr", type=interval("[0, inf)"), default=min_lr)
    group.add_argument("--drop_path", type=interval("[0, 1)"), default=0.1, help="largest stochastic depth rate")
    switch(group, "model_ema", True, "keep averaged weights")
    group.add_argument("--model_ema_decay", type=interval("[0, 1)"), default=0.99996, help="decay per step")
    group = parser.add_argument_group("augmentation")
    group.add_argument("--scale", type=fraction, nargs=2, default=[0.08, 1.0], help="area range of the random crop")
    group.add_argument("--hflip", type=probability, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--color_jitter", type=interval("[0, inf)"), default=0.3)
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy; '' for none")
    group.add_argument("--smoothing", type=interval("[0, 1)"), default=0.1, help="label smoothing")
    group.add_argument("--train_interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"])
    switch(group, "repeated_aug", True, "three augmentations of a third of the images per epoch")
    group.add_argument("--reprob", type=probability, default=0.25, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"])
    group.add_argument("--recount", type=positive_int, default=1)
    group.add_argument("--mixup", type=interval("[0, inf)"), default=0.8, help="alpha; 0 for none")
    group.add_argument("--cutmix", type=interval("[0, inf)"), default=1.0, help="alpha; 0 for none")
    group.add_argument("--mixup_prob", type=probability, default=1.0)
    group.add_argument("--mixup_switch_prob", type=probability, default=0.5)
    group.add_argument("--mixup_mode", default="batch", choices=["batch", "pair", "elem"])
    group = parser.add_argument_group("run")
    group.add_argument(
        "--resume",
        default=None,
        help="a checkpoint of this stage to go on from; auto: the newest in --output_dir, if any",
    )
    group.add_argument("--keep_last", type=positive_int, default=2, help="checkpoints to keep, beside the best")
    group.add_argument(
        "--save_every_steps",
        type=non_negative_int,
        default=0,
        help="updates between checkpoints within an epoch; 0: none",
    )
    group.add_argument(
        "--skip_nonfinite", type=non_negative_int, default=0, help="updates to leave out for a loss that is not finite"
    )
    group.add_argument("--eval_period", type=positive_int, default=1, help="epochs between two evaluations")
    parser.checks.append(check_training)


def check_training(args):
    """Raise InputError if the training options contradict each other, or name what timm does not have."""
    if args.nb_classes == 0:
        raise InputError("--nb_classes 0: training needs a classifier; give the number of classes, or leave it out")
    if args.warmup_epochs > args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.min_lr > args.lr:
        raise InputError(f"--min_lr {args.min_lr:g} is more than --lr {args.lr:g}, from which the rate falls to it")
    if args.scale[0] > args.scale[1]:
        raise InputError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: the smaller share of the area comes first")
    if args.batch_size == 1 and (args.mixup > 0 or args.cutmix > 0):
        raise InputError("--batch_size 1: mixup and cutmix pair images; take at least 2, or --mixup 0 --cutmix 0")
    try:
        parameters = [nn.Parameter(torch.zeros(1))]
        optimizer = create_optimizer_v2(parameters, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    except Exception as error:  # an unknown name, a missing package, a rate that the optimiser refuses
        raise InputError(
            f"--opt {args.opt}: {first_line(error)}; timm.optim.list_optimizers() names them all"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--opt {args.opt}: needs second derivatives, which are not computed; adamw does without")
    try:
        create_transform(32, is_training=True, auto_augment=args.aa or None)
    except Exception as error:  # timm's policy parser fails in whatever way the text makes it
        raise InputError(
            f"--aa {args.aa}: not a policy of timm's ({first_line(error)}); rand-m9-mstd0.5-inc1, augmix-m3-w3, "
            "original and v0 are some, '' is none"
        ) from None


def add_distillation_options(parser):
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distillation_type", default="none", choices=["none", "soft", "hard", "inplace"],
        help="targets beside the labels: of a frozen teacher, or of the full network of the same step",
    )  # fmt: skip
    group.add_argument("--distillation_alpha", type=fraction, default=0.5, help="share of the teacher in the loss")
    group.add_argument("--distillation_tau", type=interval("(0, inf)"), default=1.0, help="temperature of soft targets")
    group.add_argument("--teacher_model", default=None, help="any timm model; the starting network itself")
    group.add_argument("--teacher_path", default=None, help="weights of --teacher_model; timm's hub")
    parser.checks.append(check_distillation)


def check_distillation(args):
    """Raise InputError if there is a teacher and no use for it."""
    if args.teacher_model and args.distillation_type not in ("soft", "hard"):
        raise InputError(f"--teacher_model {args.teacher_model}: add --distillation_type soft or hard")
    if args.teacher_path and not args.teacher_model:
        raise InputError(f"--teacher_path {args.teacher_path}: add the --teacher_model that the weights are of")


def add_piad_options(parser, recipes):
    group = parser.add_argument_group("progressive importance-aware dropout")
    group.add_argument(
        "--recipe", default="ours", choices=recipes,
        help="defaults of --mask_table and --sampling; flags given beside it win",
    )  # fmt: skip
    group.add_argument(
        "--mask_table",
        help="train all of this table from the start; auto: the one beside --pretrained, if any; none: grow a list",
    )
    group.add_argument("--grow_epochs", type=positive_int, default=50, help="epochs in which the list grows")
    group.add_argument("--drop_ratio", type=fraction, default=0.875, help="share of MACs gone at the last step")
    group.add_argument(
        "--sensitivity", default="cost", choices=["cost", "accuracy"], help="what the removal of a branch is judged by"
    )
    group.add_argument(
        "--importance_per", default="macs", choices=["macs", "latency"],
        help="what a unit's importance is divided by: its MACs, or its seconds measured on this device at the start",
    )  # fmt: skip
    group.add_argument(
        "--sampling", choices=["uniform", "macs", "ends"], help="which step of the list a training step draws"
    )
    group.add_argument(
        "--always", nargs="*", default=[], choices=["largest", "smallest"],
        help="sub-networks that every step trains beside the drawn one; both make a sandwich",
    )  # fmt: skip
    switch(group, "subnet_per_rank", False, "each rank draws its own sub-network")


def add_budget_options(parser, several):
    nargs = "+" if several else None
    group = parser.add_argument_group("super-network and budget: the largest sub-network within it is taken")
    group.add_argument(
        "--checkpoint", default=None,
        help="super-network folder (checkpoint_N.pth and mask_table.json) or file, or a sub-network; "
        "output/peelable/<model>",
    )  # fmt: skip
    group.add_argument("--mask_table", default=None, help="width table; mask_table.json beside the checkpoint")
    group.add_argument("--use_ema", action="store_true", help="the averaged weights instead of the last ones")
    switch(
        group, "compensate", None, "fold what is cut off into what stays, by the statistics beside the weights; if any"
    )
    group.add_argument("--statistics", default=None, help="statistics of stage 1; statistics.safetensors beside them")
    group.add_argument(
        "--calibrate",
        type=positive_int,
        default=None,
        metavar="N",
        help="refit each sub-network block by block on N training images; their labels are not used",
    )
    group.add_argument("--op_code", type=interval("[-1, inf)", int), nargs=nargs, help="step of the width table")
    group.add_argument("--macs", type=quantity, nargs=nargs, help="e.g. 8.44G, the paper's convention")
    group.add_argument("--macs_ratio", type=fraction, nargs=nargs, help="share of the full network's MACs, e.g. 0.5")
    group.add_argument("--params", type=quantity, nargs=nargs, help="e.g. 40M parameters")
    group.add_argument(
        "--latency_ms", type=quantity, nargs=nargs, help="milliseconds per batch, measured on this device"
    )
    group.add_argument(
        "--latency_device", default=None,
        help="where latency counts: cpu, cuda, or a latency_*.json that --benchmark wrote elsewhere; that of --device",
    )  # fmt: skip
    group.add_argument("--latency_batch_size", type=positive_int, default=1, help="images per batch for latencies")
    group.add_argument(
        "--finer", action="store_true",
        help="use what a budget leaves for widths between two steps of the table, which were not trained as such",
    )  # fmt: skip
