"""Stage 2: train the super-network with progressive importance-aware dropout (PIAD)."""

import copy
from pathlib import Path

import torch

import datasets
import utils
from checkpoints import Run
from engine import branch_removal, evaluate, fit, make_criterion
from models import piad, store
from models.cost import Shapes, measured_unit_costs
from models.distillation import Distillation, load_teacher
from models.statistics import OBJECTIVES, collect_statistics
from models.supernet import as_supernet, set_widths
from models.vit import ModelSpec, classes_of, load_weights, read_checkpoint
from models.width_table import WidthTable
from options import (
    add_cutting_options,
    add_distillation_options,
    add_piad_options,
    add_proxy_options,
    add_training_options,
    groups_of,
    reachable_drop_ratio,
    stage_parser,
)
from utils import InputError, RanksDisagree, human, say

# The paper's recipe, and what replaced it where that won (docs/stage2.md).
RECIPES = {
    "paper": {"mask_table": "none", "sampling": "uniform"},
    "ours": {"mask_table": "auto", "sampling": "uniform"},
}


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    add_training_options(parser, epochs=300, lr=5e-4, min_lr=1e-5, warmup_epochs=5)
    add_distillation_options(parser)
    add_piad_options(parser, list(RECIPES))
    add_cutting_options(parser)
    group = parser.add_argument_group("files")
    group.add_argument("--pretrained", default=None, help="weights of stage 1; output/reparam/<model>/reparamed.pth")
    group.add_argument("--output_dir", default=None, help="output/peelable/<model>")
    parser.set_defaults(**RECIPES[parser.parse_known_args(argv)[0].recipe])
    return parser.parse_args(argv)


def build(args, device):
    """The super-network with its starting weights, its spec, the training images and the teacher, if any."""
    if not args.model:
        raise InputError("--model is required: vit_tiny, vit_small, vit_base, or a name of timm's (python -m models)")
    args.pretrained = args.pretrained or f"output/reparam/{args.model}/reparamed.pth"
    args.mask_table, path = complete_table(args), Path(args.pretrained)
    if not path.is_file():
        raise InputError(f"--pretrained {path}: no such file; main_reparam.py --model {args.model} writes it")
    images = datasets.load_images(args, train=True)
    state = read_checkpoint(path)["model"]
    classes = args.nb_classes or datasets.count_classes(images) or classes_of(state)
    if not classes:
        raise InputError(f"{path}: has no classifier, and the data set does not say its classes: give --nb_classes")
    datasets.check_classes(images, classes, f"--nb_classes {args.nb_classes}")
    spec = ModelSpec(args.model, classes, args.input_size)
    model = spec.build(drop_path_rate=args.drop_path)
    remarks = load_weights(model, state, path, replace_head=True)
    for remark in remarks:
        say(f"note: {remark}")
    teacher = make_teacher(args, model, remarks)
    if teacher and teacher.network:
        teacher.network.to(device)
    return as_supernet(model).to(device), spec, images, teacher


def make_teacher(args, model, remarks):
    """The Distillation that the flags ask for, or None. Raises InputError if it cannot teach this ``model``."""
    kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
    if kind == "none":
        return None
    if kind == "inplace":
        if "largest" not in args.always:
            raise InputError("--distillation_type inplace: its targets are the full network's; add --always largest")
        return Distillation(kind, alpha, tau)
    if args.teacher_model:
        teacher = load_teacher(args.teacher_model, model.num_classes, args.teacher_path)
        return Distillation(kind, alpha, tau, teacher, datasets.between_models(model, teacher))
    if remarks:
        raise InputError(f"--distillation_type {kind}: the classifier is new, so give --teacher_model")
    return Distillation(kind, alpha, tau, copy.deepcopy(model))


def grow_table(model, table, shapes, loader, epoch, unit_costs, groups, args, device):
    """Append to the dropout list what this epoch's target asks for, by importance at its present last step.

    Raises RanksDisagree if the ranks do not arrive at the same list.
    """
    target = piad.target_cost(shapes.macs(table.steps[0]), args.drop_ratio, epoch, args.grow_epochs)
    if args.mask_table or shapes.macs(table.steps[-1]) <= target:
        return
    set_widths(model, table.steps[-1])
    value, without = branch_removal(model, loader, device, args.sensitivity, args.amp)
    statistics = collect_statistics(model, loader, OBJECTIVES[args.objective], device, moments=False, amp=args.amp)
    sign = -1 if args.sensitivity == "accuracy" else 1
    gammas = piad.sensitivity(sign * value, [sign * v for v in without])
    importance = piad.unit_importance(gammas, statistics, table.steps[-1], groups, unit_costs)
    piad.grow(table.steps, importance, groups, shapes.macs, target)
    if not utils.all_the_same(table.to_json()):
        raise RanksDisagree(f"epoch {epoch}: the ranks grew different width tables; their data or weights must differ")


def make_draw(table, shapes, args):
    """The function of the global step that names the sub-networks it trains: a list of Widths, the largest first."""
    weights = piad.step_weights(args.sampling, [shapes.macs(widths) for widths in table.steps])
    stream = (utils.rank(),) if args.subnet_per_rank else ()
    always = {{"largest": 0, "smallest": table.last}[name] for name in args.always}

    def draw(step):
        drawn = piad.draw_step(weights, args.seed, step, *stream)
        return [table.steps[index] for index in sorted(always | {drawn})]

    return draw


def complete_table(args):
    """The file of the complete table that ``--mask_table`` means, or None where the list is to grow."""
    beside = Path(args.pretrained).parent / store.TABLE_NAME
    if args.mask_table == "none" or (args.mask_table == "auto" and not beside.is_file()):
        return None
    # A string: checkpoints hold the arguments, and nothing but plain values.
    return str(beside) if args.mask_table == "auto" else args.mask_table


def first_table(args, shapes):
    """The width table that training starts with: the full network alone, or all of ``--mask_table``."""
    if not args.mask_table:
        say(f"the list of sub-networks grows in {args.grow_epochs} epochs")
        return WidthTable([shapes.full])
    table = WidthTable.load(args.mask_table)
    table.check_fits(shapes.full, shapes.whole, args.mask_table)
    say(f"training the {len(table.steps)} sub-networks of {args.mask_table} from the start")
    return WidthTable(table.steps)


def measure_unit_costs(args, model, shapes, device):
    """What a dimension of all heads or a hidden unit of each branch costs, the same on all ranks: MACs or seconds."""
    if args.importance_per == "macs":
        return shapes.unit_costs()
    seconds = torch.tensor(measured_unit_costs(model, args.batch_size, device), dtype=torch.float64, device=device)
    return utils.all_reduce_max(seconds).tolist()


def is_complete(table, shapes, args):
    """Whether the dropout list will grow no further."""
    smallest = piad.target_cost(shapes.macs(table.steps[0]), args.drop_ratio, args.grow_epochs, args.grow_epochs)
    return bool(args.mask_table) or shapes.macs(table.steps[-1]) <= smallest


def resumed_table(content, path, shapes):
    """The table of the checkpoint ``content``, or beside it if it holds none, as published ones. Raises InputError."""
    beside = path.parent / store.TABLE_NAME
    table = WidthTable.from_json(content["mask_table"], path) if "mask_table" in content else WidthTable.load(beside)
    table.check_fits(shapes.full, shapes.whole, path)
    return table


def evaluate_ends(run, table, loader):
    """Top-1 of the largest, the middle and the smallest sub-network, of the weights and of their average.

    Returns ({'test_largest': ..., 'test_ema_largest': ...}, the better of both means over the three sizes).
    """
    accuracies, means = {}, []
    for prefix, network in (("test_", run.model), ("test_ema_", run.ema and run.ema.module)):
        if network is None:
            continue
        for name, step in (("largest", 0), ("middle", table.last // 2), ("smallest", table.last)):
            set_widths(network, table.steps[step])
            accuracies[prefix + name] = evaluate(network, loader, run.device, run.args.amp)["top1"]
        means.append(sum(accuracies[prefix + name] for name in ("largest", "middle", "smallest")) / 3)
    return accuracies, max(means)


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    model, spec, images, teacher = build(args, device)
    output = utils.output_folder(args.output_dir or Path("output/peelable") / args.model)
    config = datasets.data_config(model)
    evaluation = datasets.eval_transform(args, config)
    proxy = datasets.proxy_loader(images, evaluation, args, args.proxy_samples)
    train = datasets.train_loader(images, datasets.train_transform(args, config), args)
    test = datasets.eval_loader(datasets.load_images(args, train=False), evaluation, args)
    mixup, criterion = datasets.make_mixup(args, spec.num_classes), make_criterion(args)
    run, shapes = Run(model, args, device, len(train)), Shapes.of(model)
    table, groups = first_table(args, shapes), groups_of(args, model)
    if not args.mask_table:
        args.drop_ratio = reachable_drop_ratio(args, groups, shapes)
    unit_costs = measure_unit_costs(args, model, shapes, device)
    checkpoint, content = run.resume(output)
    if checkpoint:
        table = resumed_table(content, checkpoint, shapes)
        # Checkpoints of a time when only plain ViTs could be cut have one pair for all blocks.
        saved = list(content.get("unit_costs", unit_costs))
        unit_costs = saved if len(saved) == len(unit_costs) else saved * shapes.depth
    say(
        f"{len(train)} batches of {args.batch_size} an epoch, {run.batch} images an update over {utils.world_size()} "
        f"rank(s), learning rate {run.lr:.2e}, full network {human(shapes.macs(table.steps[0]))} MACs"
    )

    def draw_of(epoch):
        grow_table(model, table, shapes, proxy, epoch, unit_costs, groups, args, device)
        return make_draw(table, shapes, args)

    def score():
        accuracies, mean = evaluate_ends(run, table, test)
        # While the list grows, its smallest network is not yet small: only what comes after can be compared.
        return accuracies | {"steps": table.last}, mean if is_complete(table, shapes, args) else None

    def extra():
        """What the checkpoint of a super-network holds besides; the table goes beside it as well."""
        table.meta = store.table_meta(spec, shapes, table)
        text = table.to_json()
        utils.save_text(text, output / store.TABLE_NAME)
        return {"mask_table": text, "unit_costs": unit_costs}

    fit(run, train, criterion, output, score, mixup, teacher, draw_of, extra)
    say(f"wrote {output}/checkpoint_{args.epochs - 1}.pth and {store.TABLE_NAME}; next:")
    say(f"  python main_test.py --checkpoint {output} --data_set {args.data_set} --data_path {args.data_path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
