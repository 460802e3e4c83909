"""Command-line options that several stages share, with DeiT's names and defaults, and what they mean."""

import math
import shlex
from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from torch import nn

import datasets
import utils
from models.piad.dropout import check_reachable
from models.piad.importance import Units
from models.piad.width_table import TABLE_NAME
from models.subnet import export, store
from models.subnet.budget import BUDGET_KINDS, Budget
from models.subnet.latency import REPEATS, WARM_UP, LatencyTable
from models.vit.cost import Costs
from models.vit.pretrained import ALIASES, OWN_SHAPES, check_known, image_shape
from models.vit.supernet import as_supernet, branches, full_widths
from models.vit.widths import Widths
from models.wpac.calibration import calibrate
from models.wpac.statistics import OBJECTIVES
from utils import InputError, fraction, interval, non_negative_int, positive_int, print_once, probability, quantity

# timm's, less those that wait for an accuracy or do nothing.
SCHEDULERS = ["cosine", "tanh", "step", "multistep", "poly"]
MODEL_HELP = "vit_tiny, vit_small, vit_base, or a name of timm's (python -m models)"

# ------------------------------------------------------------------------------------------ every stage


def stage_parser(description, classes=True):
    """A parser with the options of every stage: model, data, machine. classes: with --nb-classes."""
    parser = utils.StageParser(description=description)
    add = parser.add_argument_group("model").add_argument
    add("--model", help=MODEL_HELP)
    add("--input-size", type=interval("[1, 4096]", int), help="image size in pixels (default: the model's own)")
    if classes:
        words = "classes, 0 for no classifier (default: those of the data set)"
        add("--nb-classes", type=interval("[0, 1e6]", int), help=words)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="data", help="folder of the data set")
    add("--data-set", default="IMNET", help=f"{', '.join(datasets.DATA_SETS)}, or timm's ImageFolder or torch/<name>")
    add("--batch-size", type=interval("[1, 65536]", int), default=64, help="images per rank and step")
    add("--eval-crop-ratio", type=interval("[0.1, 1]"), help="centre crop / resized image (default: the model's own)")
    add("--num-workers", type=interval("[0, 1024]", int), default=10, help="data loading processes per rank")
    add("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    switch_off(add, "pin-mem", "do not pin memory for faster copies to the GPU")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=utils.device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="autocast type")
    add("--seed", type=interval("[0, 4294967295]", int), default=0, help="seed of everything random")
    return parser


def switch_off(add, name, help):
    """The flag --no-<name>, which sets the option <name>, True without it, to False."""
    add(f"--no-{name}", dest=name.replace("-", "_"), action="store_false", help=help)


def say_what_is_fetched(name, flag):
    """Print which published weights of a model are fetched, and from where. Raises InputError, which names ``flag``, if
    there is no such model."""
    with utils.name_flag(flag):
        check_known(name)
    cfg = timm.get_pretrained_cfg(ALIASES.get(name, (name, {}))[0])
    source = cfg and (f"the hub's {cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url)
    if source and name not in OWN_SHAPES:
        print_once(f"{flag}: fetching the published weights of {name}, {source}, unless they are here already")


def required_model(args):
    """Raise InputError without --model."""
    if not args.model:
        raise InputError(f"--model is required: {MODEL_HELP}")


def command(args, script, *flags):
    """The command that starts another stage with ``flags`` on the same data, quoted as a shell reads it."""
    words = ["python", script, *flags, "--data-set", args.data_set, "--data-path", args.data_path]
    return shlex.join(map(str, words))


def words_of(args, *names):
    """The words of the command line for those of the options ``names`` that have a value, or several in a list."""
    named = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return [word for flag, value in named.items() if value for word in (flag, *_listed(value))]


def _listed(value):
    return value if isinstance(value, list) else [value]


def model_flags(args):
    """The words of the command line that name the same network to another stage."""
    return words_of(args, "model", "input_size", "nb_classes", "eval_crop_ratio")


def print_command(args, script, *flags):
    print_once(f"  {command(args, script, *flags)}")


# ------------------------------------------------------------------------------------------ what may be cut


def add_cutting_options(parser):
    add = parser.add_argument_group("what may be cut").add_argument
    add("--skip-blocks", type=non_negative_int, nargs="+", default=[], metavar="B", help="blocks to leave as they are")
    add("--only", choices=["attn", "mlp"], help="leave the other branches as they are")
    add("--min-width", type=interval("[0, 1]"), default=0.0, help="share of its full width that every branch keeps")
    words = "hidden units that go and stay together, and 8 dimensions of every head, as hardware likes (64 suits most)"
    add("--multiple-of", type=positive_int, metavar="N", help=words)
    add("--drop-ratio", type=fraction, default=0.875, help="share of the MACs gone at the last step of the width table")


def untouched_branches(args, supernet):
    """The branches, by their index in Widths.flat, that ``--skip-blocks`` and ``--only`` leave as they are.

    Raises InputError for a block that is not there.
    """
    own = branches(supernet)
    paths = list(dict.fromkeys(branch.path for branch in own))
    for block in args.skip_blocks:
        if block >= len(paths):
            raise InputError(f"--skip-blocks {block}: the model has blocks 0 to {len(paths) - 1}")
    skipped = {paths[block] for block in args.skip_blocks}
    return {b for b, x in enumerate(own) if x.path in skipped or args.only not in (None, x.name)}


def units_of(args, supernet):
    """The droppable Units of a super-network, as the options of ``add_cutting_options`` leave them."""
    full, untouched = full_widths(supernet), untouched_branches(args, supernet)
    least = [w if b in untouched else math.ceil(args.min_width * w) for b, w in enumerate(full.flat)]
    indivisible = [branch.indivisible for branch in branches(supernet)]
    return Units.of(full, indivisible, Widths.from_flat(least), args.multiple_of)


def reachable_drop_ratio(args, units, costs):
    """``--drop-ratio``, or what the other options of ``add_cutting_options`` leave of it, which is then printed.

    Raises InputError if they leave nothing to cut, or if the ratio is out of reach without them.
    """
    least = costs.macs(units.least) / costs.macs(units.full)
    if least == 1:
        raise InputError("--skip-blocks, --only and --min-width leave nothing to cut")
    if not any(units.least.flat) or args.drop_ratio <= 1 - least:
        try:
            check_reachable(units, costs.macs, costs.macs(units.full) * (1 - args.drop_ratio))
        except InputError as error:
            raise InputError(f"--drop-ratio {args.drop_ratio:g}: {error}") from None
        return args.drop_ratio
    print_once(f"note: the smallest network that may be cut has {least:.3f} of the MACs: the width table ends there")
    # A little less: at its last step the table has lost no less than the ratio.
    return (1 - least) * (1 - 1e-12)


# ------------------------------------------------------------------------------------------ stages 1 and 2


def add_proxy_options(parser):
    add = parser.add_argument_group("proxy set").add_argument
    add("--proxy-samples", type=positive_int, default=1024, help="training images that are measured on")
    wanted = "gradients are of the true class's logit, or (no labels needed) of the pooled feature"
    add("--objective", default="label", choices=list(OBJECTIVES), help=wanted)


def add_training_options(parser, epochs, lr, min_lr, warmup_epochs):
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive_int, default=epochs, help="passes over the training set")
    add("--opt", default="adamw", help="a timm optimiser")
    add("--lr", type=interval("(0, inf)"), default=lr, help="learning rate for a batch of 512 images")
    add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch")
    add("--weight-decay", type=interval("[0, inf)"), default=0.05, help="of the optimiser")
    add("--accum-iter", type=positive_int, default=1, help="batches whose gradients make one update")
    add("--clip-grad", type=interval("(0, inf)"), help="largest gradient norm (default: gradients are not clipped)")
    words = "step: a tenth after every 30 epochs, multistep: after 30 and 60"
    add("--sched", default="cosine", choices=SCHEDULERS, help="a timm scheduler; " + words)
    add("--warmup-epochs", type=non_negative_int, default=warmup_epochs, help="epochs in which the rate rises to --lr")
    add("--warmup-lr", type=interval("[0, inf)"), default=1e-6, help="learning rate of the first epoch")
    add("--min-lr", type=interval("[0, inf)"), default=min_lr, help="learning rate at the end")
    add("--drop-path", type=interval("[0, 1)"), default=0.1, help="largest stochastic depth rate")
    switch_off(add, "model-ema", "do not keep averaged weights")
    add("--model-ema-decay", type=interval("[0, 1)"), default=0.99996, help="decay per step")
    add = parser.add_argument_group("augmentation").add_argument
    add("--scale", type=fraction, nargs=2, default=[0.08, 1.0], help="area range of the random crop")
    add("--hflip", type=probability, default=0.5, help="probability of a horizontal flip")
    add("--color-jitter", type=interval("[0, inf)"), default=0.3, help="strength; 0 for none")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy; '' for none")
    add("--smoothing", type=interval("[0, 1)"), default=0.1, help="label smoothing")
    switch_off(add, "repeated-aug", "one augmentation of every image per epoch, not three of a third of them")
    add("--reprob", type=probability, default=0.25, help="probability of random erasing")
    add("--mixup", type=interval("[0, inf)"), default=0.8, help="alpha; 0 for none")
    add("--cutmix", type=interval("[0, inf)"), default=1.0, help="alpha; 0 for none")
    add = parser.add_argument_group("run").add_argument
    add("--resume", help="a checkpoint of this stage to go on from; auto: the newest in --output-dir, if any")
    add("--keep-last", type=positive_int, default=2, help="checkpoints to keep, beside the best")
    add("--save-every-steps", type=non_negative_int, default=0, help="updates between checkpoints in an epoch; 0: none")
    add("--skip-nonfinite", type=non_negative_int, default=0, help="updates to leave out for a loss that is not finite")
    add("--eval-period", type=positive_int, default=1, help="epochs between two evaluations")
    add("--tensorboard", action="store_true", help="write what the log has for TensorBoard too, into --output-dir")
    parser.checks.append(check_training)


def check_training(args):
    """Raise InputError if the training options contradict each other, or name what timm does not have."""
    if args.nb_classes == 0:
        raise InputError("--nb-classes 0: training needs a classifier; give the number of classes, or leave it out")
    utils.need("--tensorboard", ["tensorboard"] if args.tensorboard else [])
    if args.warmup_epochs > args.epochs and "warmup_epochs" in args.given:
        raise InputError(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.min_lr > args.lr and "min_lr" in args.given:
        raise InputError(f"--min-lr {args.min_lr:g} is more than --lr {args.lr:g}, from which the rate falls to it")
    if args.scale[0] > args.scale[1]:
        raise InputError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: the smaller share of the area comes first")
    if args.batch_size == 1 and (args.mixup > 0 or args.cutmix > 0):
        raise InputError("--batch-size 1: mixup and cutmix pair images; take at least 2, or --mixup 0 --cutmix 0")
    try:
        parameters = [nn.Parameter(torch.zeros(1))]
        optimizer = create_optimizer_v2(parameters, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    except Exception as error:  # an unknown name, a missing package, a rate that the optimiser refuses
        raise InputError(
            f"--opt {args.opt}: {utils.first_line(error)}; timm.optim.list_optimizers() names them all"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--opt {args.opt}: needs second derivatives, which are not computed; adamw does without")
    try:
        create_transform(32, is_training=True, auto_augment=args.aa or None)
    except Exception as error:  # timm's policy parser fails in whatever way the text makes it
        raise InputError(
            f"--aa {args.aa}: not a policy of timm's ({utils.first_line(error)}); rand-m9-mstd0.5-inc1, augmix-m3-w3, "
            "original and v0 are some, '' is none"
        ) from None


def add_distillation_options(parser):
    add = parser.add_argument_group("distillation").add_argument
    kinds = ["none", "soft", "hard", "inplace"]
    add("--distillation-type", default="none", choices=kinds, help="inplace: the full network of the same step teaches")
    add("--distillation-alpha", type=fraction, default=0.5, help="share of the teacher in the loss")
    add("--distillation-tau", type=interval("(0, inf)"), default=1.0, help="temperature of soft targets")
    add("--teacher-model", help="any timm model (default: the starting network itself)")
    add("--teacher-path", help="weights of --teacher-model (default: timm's hub)")
    parser.checks.append(check_distillation)


def check_distillation(args):
    """Raise InputError if a teacher is named that would not be used."""
    if args.teacher_model and args.distillation_type not in ("soft", "hard"):
        raise InputError(f"--teacher-model {args.teacher_model}: add --distillation-type soft or hard")
    if args.teacher_path and not args.teacher_model:
        raise InputError(f"--teacher-path {args.teacher_path}: add the --teacher-model that the weights are of")


def add_piad_options(parser):
    add = parser.add_argument_group("progressive importance-aware dropout").add_argument
    words = "width table to train; auto: the one beside --pretrained, if any; none: one that grows, as in the paper"
    add("--mask-table", default="auto", help=words)
    words = "train plain slices, also where stage 1's compensation lies beside --pretrained and the table is complete"
    add("--no-compensation", dest="compensate", action="store_false", help=words)
    add("--grow-epochs", type=positive_int, default=50, help="epochs in which the width table grows")
    add("--sensitivity", default="cost", choices=["cost", "accuracy"], help="what the removal of a branch is judged by")
    words = "how steps of the table are drawn"
    add("--sampling", default="uniform", choices=["uniform", "macs", "ends", "compute"], help=words)
    words = "sub-networks that every training step trains beside the drawn one"
    add("--always", nargs="*", default=[], choices=["largest", "smallest"], help=words)
    add("--subnet-per-rank", action="store_true", help="each rank draws its own sub-network")
    add("--subnet-per-batch", action="store_true", help="each batch of --accum-iter draws its own sub-network")
    add("--compile", action="store_true", help="compile attention and MLPs for the training steps")
    parser.checks.append(check_piad)


def check_piad(args):
    """Raise InputError if batches are to draw for themselves and an update has one."""
    if args.subnet_per_batch and args.accum_iter == 1:
        raise InputError("--subnet-per-batch: an update has one batch; add --accum-iter 2, with half the --batch-size")


# ------------------------------------------------------------------------------------------ stages 3 and 4


def add_budget_options(parser):
    group = parser.add_argument_group("super-network and budget: the largest sub-network within it is taken")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    words = "folder or file of a super-network or sub-network (default: output/peelable/<model>)"
    add("--checkpoint", help=words)
    add("--mask-table", help="width table (default: mask_table.json beside the checkpoint)")
    add("--use-ema", action="store_true", help="the averaged weights instead of the last ones")
    words = "what folding needs (default: compensation.safetensors beside the checkpoint, if it is there)"
    either("--compensation", metavar="FILE", help=words)
    either("--no-compensation", dest="compensate", action="store_false", default=None, help="cut plain slices")
    words = "refit each sub-network block by block on N training images; labels are not used"
    add("--calibrate", type=positive_int, metavar="N", help=words)
    add("--op-code", type=interval("[-1, 1e9]", int), nargs="+", help="step of the width table")
    add("--macs", type=quantity, nargs="+", help="e.g. 8.44G or '46.53 M', in the paper's convention")
    add("--macs-ratio", type=fraction, nargs="+", help="share of the full network's MACs, e.g. 0.5 or 50%%")
    add("--params", type=quantity, nargs="+", help="e.g. 40M parameters")
    add("--latency-ms", type=quantity, nargs="+", help="milliseconds per batch, measured on this device")
    add("--latency-device", help="cpu, cuda, or a latency_*.json that --benchmark wrote elsewhere (default: --device)")
    add("--latency-batch-size", type=interval("[1, 65536]", int), default=1, help="images per batch for latencies")
    add("--finer", action="store_true", help="use what a budget of MACs or parameters leaves for widths between steps")


def checkpoint_path(args):
    """The checkpoint file that ``--checkpoint`` (folder or file) or ``--model`` point to. Raises InputError."""
    if not args.checkpoint and not args.model:
        raise InputError("give --checkpoint FOLDER, or --model for output/peelable/<model>/")
    path = Path(args.checkpoint or f"output/peelable/{args.model}")
    if not path.exists():
        raise InputError(f"{path}: no such folder or file; expected checkpoint_N.pth and {TABLE_NAME} in it")
    return store.newest_checkpoint(path) if path.is_dir() else path


def load(args, **kwargs):
    """The SuperNetwork that the options of ``add_budget_options`` name. kwargs go to timm. Raises InputError."""
    names = ("model", "input_size", "mask_table", "use_ema", "compensation", "compensate")
    path = checkpoint_path(args)
    with utils.name_flag("--model"):
        given = {name: getattr(args, name) for name in names}
        loaded = store.load_supernet(path, **given, crop_ratio=args.eval_crop_ratio, **kwargs)
        for budget in budgets(args) if loaded.one_size else ():
            raise utils.BudgetError(f"{budget}: {path} is one sub-network of one size; budgets need the super-network")
    utils.check_alike(path, f"{loaded.weights} {loaded.table.to_json()} {loaded.compensation is None}")
    for name in ("calibrate", "mask_table", "compensation", "compensate", "finer") if loaded.one_size else ():
        if name in args.given:
            flag = "no-compensation" if name == "compensate" else name.replace("_", "-")
            raise InputError(f"--{flag}: {path} is one sub-network; this needs the super-network")
    if loaded.one_size and args.model and replace(loaded.spec, name=args.model).timm_call() != loaded.spec.timm_call():
        raise InputError(f"--model {args.model}: {path} is a sub-network of {loaded.spec.name}")
    return loaded


def budgets(args):
    """The Budgets on the command line, in the order of the flags."""
    kinds = (*BUDGET_KINDS, "latency_ms")
    return [Budget(kind, value) for kind in kinds for value in getattr(args, kind) or ()]


def choose(loaded, asked, args, device):
    """The Choice of every Budget: computed, or for a 'latency_ms' one measured on ``--latency-device``."""
    latencies = None
    if any(budget.kind == "latency_ms" for budget in asked):
        latencies = latencies_of_file(loaded, args) if is_file(args) else latency_table(loaded, args, device)
    with utils.name_flag("--model"):
        choices = [
            latencies.choose(budget, loaded.table)
            if budget.kind == "latency_ms"
            else budget.choose(loaded.table, loaded.costs, args.finer)
            for budget in asked
        ]
    if not loaded.one_size:
        note_smaller_model(loaded, choices)
    return choices


def note_smaller_model(loaded, choices):
    """Print a note if a sub-network costs less than the whole of the next smaller model."""
    smaller, least = loaded.spec.next_smaller(), min(loaded.costs.macs(choice.widths) for choice in choices)
    if smaller:
        with torch.device("meta"):
            costs = Costs.of(as_supernet(smaller.build()))
        whole = costs.macs(costs.full)
        if least < whole:
            words = f"below {utils.with_unit(whole)} MACs, those of the whole {smaller.name}, cut that model"
            print_once(f"note: {words} in place of {loaded.spec.name} (docs/results.md)")


def benchmark(loaded, rows, args, device):
    """Put milliseconds per batch, measured in turns, and images/s into all rows of results: of PyTorch, and of ONNX
    Runtime for those with a ``file``, if it is on the CPU that is measured."""
    latencies = latency_table(loaded, args, device)
    plain = [row for row in rows if not row["file"]]
    onnx = [row for row in rows if row["file"]] if latencies.device.type == "cpu" else []
    widths = [Widths.from_dict(row["widths"]) for row in plain]
    milliseconds = latencies.measure(widths, [export.OnnxNetwork(row["file"]) for row in onnx])
    for row, ms in zip([*plain, *onnx], milliseconds, strict=True):
        row |= {"latency_ms": ms, "images_per_s": 1e3 * args.latency_batch_size / ms}


def latency_table(loaded, args, device):
    """The LatencyTable for the command line's device, batch size and autocast; prints what it measures on."""
    place = utils.choose_device(args.latency_device or str(device), "--latency-device")
    amp = args.amp if place.type == device.type else utils.resolve_amp("auto", place)
    latencies = LatencyTable.beside(loaded, place, args.latency_batch_size, amp)
    print_once(f"latencies: {latencies.conditions}; median of {REPEATS} after {WARM_UP}; kept in {latencies.path}")
    return latencies


def latencies_of_file(loaded, args):
    """The LatencyTable of the file ``--latency-device``, whose batch size holds from here on. Raises InputError if it
    is of images or batches of another size than are asked for."""
    latencies, size = LatencyTable.load(args.latency_device), image_shape(loaded.supernet)[1]
    of = latencies.conditions
    if not of.same_model(loaded.supernet):
        raise InputError(f"--latency-device {args.latency_device}: measured of {of.model}, which is another model")
    if of.img_size != size or ("latency_batch_size" in args.given and args.latency_batch_size != of.batch_size):
        wanted = f"batch {args.latency_batch_size}, {size} px"
        raise InputError(f"--latency-device {args.latency_device}: measured at {of}, and not at {wanted}")
    args.latency_batch_size = of.batch_size
    print_once(f"latencies: {of}, of {args.latency_device}")
    return latencies


def is_file(args):
    """Whether ``--latency-device`` is a file of measurements."""
    return (args.latency_device or "").endswith(".json")


def cut(loaded, sizes, args, device):
    """Sub-networks of several Widths on ``device``, calibrated on training images if ``--calibrate`` asks for it."""
    subnets = [loaded.cut(widths).to(device) for widths in sizes]
    if args.calibrate:
        batches = datasets.proxy_loader(datasets.load_images(args, train=True), loaded.supernet, args, "calibrate")
        calibrate(subnets, loaded.supernet.to(device), list(batches), OBJECTIVES["feature"])
    return subnets
