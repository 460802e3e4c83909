"""Stage 2: train the super-network with progressive importance-aware dropout (PIAD)."""

import copy
import math
from pathlib import Path

import torch

import datasets
import options
import utils
from engine import evaluate_all, mixup_and_criterion, train_one_epoch
from models.piad.distillation import Distillation, load_teacher
from models.piad.dropout import DropoutList, Growth
from models.piad.width_table import TABLE_NAME, WidthTable
from models.subnet.store import WEIGHTS_NAME, began_from, newest_checkpoint
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec, classes_of, load_weights, read_checkpoint
from models.vit.supernet import as_supernet, compile_branches
from models.vit.weights import digest
from models.wpac.compensation import COMPENSATION_NAME, attach, load_compensation, save_compensation
from training import OF_GROWTH, TrainingRun
from utils import InputError, print_once, with_unit

ENDS = ("largest", "middle", "smallest")  # sub-networks of the table that are tested while training goes on


def get_args(argv=None):
    parser = options.stage_parser(__doc__)
    options.add_proxy_options(parser)
    options.add_training_options(parser, epochs=300, lr=5e-4, min_lr=1e-5, warmup_epochs=5)
    options.add_distillation_options(parser)
    options.add_piad_options(parser)
    options.add_cutting_options(parser)
    add = parser.add_argument_group("files").add_argument
    add("--pretrained", help="weights of stage 1 (default: output/reparam/<model>/reparamed.pth)")
    add("--output-dir", help="folder of checkpoints and log (default: output/peelable/<model>)")
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    supernet, spec, images, teacher, weights = build(args, device)
    output = utils.output_folder(args.output_dir or Path("output/peelable") / args.model)
    dropout = make_dropout(args, supernet)
    proxy = datasets.proxy_loader(images, supernet, args, "proxy_samples") if dropout.growth else None
    train = datasets.train_loader(images, supernet, args)
    test = datasets.test_loader(supernet, args)
    mixup, criterion = mixup_and_criterion(args, spec.num_classes)
    # A sub-network without a branch leaves that branch's parameters out of the backward pass.
    run = TrainingRun(supernet, args, device, len(train), find_unused=dropout.loses_branches)
    taught = teacher.weights if teacher else None
    if args.compile:
        compile_branches(supernet)
    checkpoint, content = run.resume(output)
    if checkpoint:
        restore_table(dropout, content, checkpoint, args)
        weights = began_from(content)
        check_teacher(taught, content, checkpoint)
    elif output.resolve() == Path(args.pretrained).parent.resolve():
        raise InputError(f"--output-dir {output}: holds the weights that training starts from; take another folder")
    weights = use_compensation(run, dropout, checkpoint, weights, output)
    print_once(
        f"{len(train)} batches of {args.batch_size} an epoch, {run.batch} images an update over {utils.world_size()} "
        f"rank(s), learning rate {run.lr:.2e}, full network {with_unit(dropout.costs.macs(dropout.units.full))} MACs"
    )

    # Each checkpoint also holds the list of sub-networks, which is written beside it at the same time, and names the
    # weights that the compensation beside it was measured on, the teacher's, and the mean top-1 before training.
    more = {"compensation": weights, "teacher": taught, "before": content.get("before")}
    with run.files(output, lambda: {"mask_table": dropout.save(output / TABLE_NAME, spec)} | more):
        if dropout.complete and not run.epoch and not run.updates:
            more["before"] = evaluate_start(run, dropout.table, test)
        figures = {}
        for epoch in run.epochs():
            with torch.compiler.set_stance("force_eager"):
                dropout.grow(supernet, proxy, epoch)
            train.sampler.set_epoch(epoch, run.images_done())
            figures, score = train_one_epoch(run, train, criterion, epoch, mixup, teacher, dropout.draw), None
            if run.evaluates(epoch):
                accuracies, mean = evaluate_ends(run, dropout.table, test)
                figures |= accuracies | {"steps": dropout.table.last}
                # While the list grows, its smallest network is not yet small: only what comes after can be compared.
                score = mean if dropout.complete else None
            if run.board:
                run.board.add_histogram("drawn_macs", drawn_macs(run, dropout, epoch), epoch)
            run.finish_epoch(figures, score)
    if more["before"] and figures:
        note_if_worse(more["before"], figures, len(test.loader.dataset))
    print_once(f"the last checkpoint is {run.last}; next:")
    options.print_command(args, "main_test.py", "--checkpoint", output)


def drawn_macs(run, dropout, epoch):
    """MACs of every sub-network that this rank has trained in ``epoch``, a tensor."""
    steps = range(epoch * run.updates_per_epoch, (epoch + 1) * run.updates_per_epoch)
    draws = [dropout.draw(step, batch) for step in steps for batch in range(run.args.accum_iter)]
    return torch.tensor([dropout.costs.macs(widths) for subnets in draws for widths in subnets])


def top1_at_ends(networks, run, table, loader):
    """Top-1 of the sub-networks ENDS of ``networks``, {prefix: super-network}: {prefix + name: ...}, in this order."""
    ends = dict(zip(ENDS, (table.steps[0], table.steps[table.last // 2], table.steps[-1]), strict=True))
    sizes = {prefix + name: (networks[prefix], ends[name]) for prefix in networks for name in ends}
    found = evaluate_all(list(sizes.values()), loader, run.device, run.args.amp)
    return {name: figures["top1"] for name, figures in zip(sizes, found, strict=True)}


def evaluate_start(run, table, loader):
    """Print what training starts from. Returns the mean top-1 of its ``top1_at_ends``."""
    top1 = top1_at_ends({"": run.model}, run, table, loader)
    print_once(f"before training: top-1 {', '.join(f'{name} {value:.2f}' for name, value in top1.items())}")
    return sum(top1.values()) / len(top1)


def evaluate_ends(run, table, loader):
    """(``top1_at_ends`` of the weights and of their average, score). The score is the mean top-1 over the three sizes,
    of the weights or of their average, whichever is higher."""
    networks = {"test_": run.model} | ({"test_ema_": run.ema.module} if run.ema else {})
    top1 = top1_at_ends(networks, run, table, loader)
    values = list(top1.values())
    return top1, max(sum(values[:3]) / 3, sum(values[-3:]) / 3)


def note_if_worse(before, figures, images):
    """Print a note if the mean top-1 of the three sizes is lower in the ``figures`` of the last epoch than ``before``
    training, by more than the standard error of such a difference on so many ``images``."""
    after, share = sum(figures[f"test_{end}"] for end in ENDS) / 3, before / 100
    if before - after > 100 * math.sqrt(2 * share * (1 - share) / images):
        words = f"the mean top-1 of the three sizes was {before:.2f} before training and is {after:.2f} after it"
        print_once(f"note: {words}; try a lower --lr, or more --epochs")


def build(args, device):
    """(super-network with its starting weights, its ModelSpec, training images, teacher or None, digest of the weights
    that the compensation beside it is of)."""
    options.required_model(args)
    path = Path(args.pretrained or f"output/reparam/{args.model}/{WEIGHTS_NAME}")
    path = newest_checkpoint(path) if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--pretrained {path}: no such file; main_reparam.py --model {args.model} writes it")
    images = datasets.load_images(args, train=True)
    content = read_checkpoint(path)
    state = content["model"]
    weights = digest(state)
    # Strings: checkpoints hold the arguments, and nothing but plain values.
    args.pretrained, args.mask_table = str(path), complete_table(args.mask_table, path, weights)
    classes = args.nb_classes or images.num_classes or classes_of(state)
    datasets.fit_classes(images, classes)
    spec = ModelSpec(args.model, classes, args.input_size, args.eval_crop_ratio)
    with utils.name_flag("--model"):
        model = spec.build(drop_path_rate=args.drop_path)
    remarks = load_weights(model, state, path, replace_head=True)
    for remark in remarks:
        print_once(f"note: {remark}")
    teacher = make_teacher(args, model, remarks)
    if teacher and teacher.network:
        teacher.network.to(device)
    check_files_alike(args, path, weights, teacher)
    return as_supernet(model).to(device), spec, images, teacher, began_from(content) or weights


def make_teacher(args, model, remarks):
    """The Distillation that the flags ask for, or None. Raises InputError if it cannot teach this ``model``."""
    kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
    if kind == "none":
        return None
    if kind == "inplace":
        if "largest" not in args.always:
            raise InputError("--distillation-type inplace: its targets are the full network's; add --always largest")
        return Distillation(kind, alpha, tau)
    if args.teacher_model:
        if not args.teacher_path:
            options.say_what_is_fetched(args.teacher_model, "--teacher-model")
        with utils.name_flag("--teacher-model", "--teacher-path"):
            teacher = load_teacher(args.teacher_model, model.num_classes, args.teacher_path)
        return Distillation(kind, alpha, tau, teacher, datasets.between_models(model, teacher))
    if remarks:
        raise InputError(f"--distillation-type {kind}: the classifier is new, so give --teacher-model")
    return Distillation(kind, alpha, tau, copy.deepcopy(model))


def check_files_alike(args, pretrained, weights, teacher):
    """Raise RanksDisagree unless all ranks start from the same weights, table, compensation and teacher."""
    table = WidthTable.load(args.mask_table).to_json() if args.mask_table else None
    taught = teacher.weights if teacher else None
    there = pretrained.with_name(COMPENSATION_NAME).is_file()
    utils.check_alike(f"--pretrained {pretrained} and what lies beside it", f"{weights} {table} {taught} {there}")


def complete_table(mask_table, pretrained, weights):
    """The file of the complete table that ``--mask-table`` means, or None if the list is to grow. Raises InputError if
    the table beside the file ``pretrained`` is of other weights than those of the digest ``weights``."""
    if mask_table != "auto":
        return None if mask_table == "none" else mask_table
    beside = pretrained.parent / TABLE_NAME
    if not beside.is_file():
        return None
    with utils.name_flag("--mask-table"):
        WidthTable.load(beside).check_made_for(weights, beside)
    return str(beside)


def make_dropout(args, supernet):
    """The DropoutList that the flags ask for: complete, or the full network alone, from which it grows."""
    units, costs = options.units_of(args, supernet), Costs.of(supernet)
    drawing = {"sampling": args.sampling, "always": args.always, "seed": args.seed}
    drawing |= {"stream": (utils.rank(),) if args.subnet_per_rank else (), "per_batch": args.subnet_per_batch}
    if args.mask_table:
        table = WidthTable.load(args.mask_table)
        table.check_fits(costs, args.mask_table)
        print_once(f"training the {len(table.steps)} sub-networks of {args.mask_table} from the start")
        if unused := [f"--{name.replace('_', '-')}" for name in args.given if name in OF_GROWTH]:
            print_once(f"note: {', '.join(unused)}: without effect, for that table does not grow")
        return DropoutList(units, costs, table.steps, **drawing)
    utils.at_most(args, "grow_epochs", args.epochs, f"--epochs is {args.epochs}")
    print_once(f"the width table grows in {args.grow_epochs} epochs")
    drop_ratio = options.reachable_drop_ratio(args, units, costs)
    growth = Growth(args.grow_epochs, drop_ratio, args.sensitivity, args.objective)
    return DropoutList(units, costs, growth=growth, **drawing)


def restore_table(dropout, content, checkpoint, args):
    """Go on with the WidthTable of the checkpoint ``content``, or beside it if it holds none, as published ones. Raises
    InputError if it is of another network, or if ``--mask-table`` asks for another one."""
    text = content.get("mask_table")
    table = WidthTable.from_json(text, checkpoint) if text else WidthTable.load(checkpoint.parent / TABLE_NAME)
    table.check_fits(dropout.costs, checkpoint)
    if dropout.growth is None and dropout.table.steps != table.steps:
        raise InputError(f"--mask-table {args.mask_table}: --resume {checkpoint} trains another table; give that one")
    dropout.restore(table)


def check_teacher(taught, content, checkpoint):
    """Raise InputError if the teacher's weights, of the digest ``taught``, are not those of the checkpoint's run."""
    if content.get("teacher", taught) != taught:
        words = "its teacher had other weights; give the --pretrained or --teacher-path of that run"
        raise InputError(f"--resume {checkpoint}: {words}")


def use_compensation(run, dropout, checkpoint, weights, output):
    """Let ``run`` train compensated slices, if stage 1's compensation lies beside the weights that it starts from and
    the table is complete, or if ``checkpoint``, which it goes on from, was trained so.

    weights: the digest of those that the compensation is of. Returns it, or None if plain slices are trained. Writes
    the compensation into the folder ``output``, for what is cut from the trained weights.
    """
    args = run.args
    path = Path(checkpoint or args.pretrained).with_name(COMPENSATION_NAME)
    wanted = weights is not None if checkpoint else args.compensate and dropout.growth is None and path.is_file()
    if checkpoint and wanted and not args.compensate:
        raise InputError(f"--no-compensation: --resume {checkpoint} trains compensated slices; leave it out")
    if not wanted:
        return None
    compensation = load_compensation(path, run.model, weights)
    for known in compensation:
        known.output_mean.zero_()  # a removed branch adds nothing, in training and in what is cut afterwards
    for network in (run.model, *([run.ema.module] if run.ema else ())):
        attach(network, compensation)
    save_compensation(compensation, run.model, output / COMPENSATION_NAME, weights)
    print_once(f"training compensated slices, by {path}")
    return weights


if __name__ == "__main__":
    utils.run_stage(main, get_args())
