"""What the benchmarks share: networks, cutting and reports. Importing it puts the repository on the path."""

import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import main_train
import utils
from engine import mixup_and_criterion, train_one_epoch
from models.piad.dropout import DropoutList, Growth, grow, steps_by_error
from models.piad.importance import Units
from models.piad.width_table import WidthTable
from models.subnet.budget import Budget
from models.subnet.extract import extract
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec, image_shape
from models.vit.supernet import as_supernet, branches
from models.vit.widths import Widths
from models.wpac.calibration import calibrate
from models.wpac.compensation import compensate, compensation_of
from models.wpac.rewrite import AttentionRewrite, MlpRewrite, hidden_shrinkage, reparameterise
from models.wpac.statistics import OBJECTIVES, collect_statistics
from training import TrainingRun

DROP_RATIO = 0.875
UNROTATED = ("random", "magnitude", "taylor", "hessian")


def arguments(description, **flags):
    """Read the command line. flags: {name: default}, which gives the type; a list of words holds all the choices."""
    parser = utils.StageParser(description=description)
    for name, default in flags.items():
        several, word = isinstance(default, list), f"--{name.replace('_', '-')}"
        one, nargs = (default[0], "*") if several else (default, None)
        choices = default if several and isinstance(one, str) else None
        parser.add_argument(
            word, type=type(one), nargs=nargs, choices=choices, default=default, help=type(one).__name__
        )
    return parser.parse_args()


def random_supernet(name):
    """A super-network of 1,000 classes with random weights."""
    return as_supernet(ModelSpec(name, 1000).build().eval())


def random_table(name):
    """(super-network with random weights, its Costs, WidthTable by random importance)."""
    supernet, generator = random_supernet(name), torch.Generator().manual_seed(0)
    costs = Costs.of(supernet)
    units, steps = Units.of(costs.full), [costs.full]
    draws = [torch.rand(count, generator=generator) for count in units.counts(costs.full)]
    importance = [draw.sort(descending=True).values.tolist() for draw in draws]
    grow(steps, importance, units, costs.macs, (1 - DROP_RATIO) * costs.macs(costs.full))
    return supernet, costs, WidthTable(steps)


def random_batches(model, count, size):
    """``count`` random images for ``model`` as proxy batches (images, labels, positions) of ``size``."""
    positions = torch.arange(count)
    tensors = (torch.randn(count, *image_shape(model)), positions % model.num_classes, positions)
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


class Bench:
    """A trained network as a super-network, and its costs. proxy: batches (images, labels, positions) to measure it on;
    test: (images [N, 3, h, w], labels [N])."""

    images_at_once = 500  # of the test images

    def __init__(self, model, proxy, test, seed):
        self.supernet, self.proxy, (self.images, self.labels), self.seed = as_supernet(model), proxy, test, seed
        self.costs = Costs.of(self.supernet)
        self.full, self.units = self.costs.full, Units.of(self.costs.full)

    def dropout(self, grow_epochs, compensation=None, steps=None, cls=DropoutList, **options):
        """A DropoutList that grows, or the complete one of stage 1's Compensation, or of ``steps``."""
        steps = steps_by_error(compensation, self.units, self.costs, DROP_RATIO) if compensation else steps
        return cls(self.units, self.costs, steps, Growth(grow_epochs, DROP_RATIO), seed=self.seed, **options)

    def statistics(self, objective):
        return collect_statistics(self.supernet, self.proxy, OBJECTIVES[objective], hidden=True)

    def start(self, basis, order="taylor", objective="label"):
        """What is to be cut: (rewritten copy of the super-network, its 2L Compensation).

        basis: of stage 1, with ``order`` for the hidden units; or one of UNROTATED, the score by which dimensions (q
        with k, v with proj) and hidden units are sorted. For those there is no Compensation (None) unless ``order`` is
        'ridge'.
        """
        supernet, statistics = copy.deepcopy(self.supernet), self.statistics(objective)
        if basis not in UNROTATED:
            return supernet, compensation_of(supernet, statistics, reparameterise(supernet, statistics, basis, order))
        generator = torch.Generator().manual_seed(self.seed)
        rows = zip(branches(supernet), statistics, strict=True)
        orders = [_sort(branch, sums, basis, generator) for branch, sums in rows]
        if order != "ridge":
            return supernet, None
        rows = zip(branches(self.supernet), statistics, orders, strict=True)
        return supernet, compensation_of(supernet, statistics, [_as_rewrite(*row) for row in rows])

    @torch.inference_mode()
    def logits(self, network):
        """Of the test images, [N, classes], float64, on the CPU."""
        device = next(network.eval().parameters()).device
        return torch.cat([network(part.to(device)).double().cpu() for part in self.images.split(self.images_at_once)])


def _as_rewrite(branch, sums, order):
    """What ``reparameterise`` would say of sorting ``branch``, as it was before, by ``order`` of ``_sort``."""
    if branch.name == "mlp":
        return MlpRewrite(order.flatten(), hidden_shrinkage(branch, sums))
    mean = torch.zeros_like(sums.grad_z.mean)
    return AttentionRewrite(torch.eye(branch.full).to(mean)[order[-1]], mean, mean[0])


@torch.no_grad()
def _sort(branch, sums, score, generator):
    """Sort the dimensions of a branch by ``score``, in place. The order: [3, H, d] of q, k, v, or [1, 1, M]."""
    first, last = (getattr(branch.module, layer.name) for layer in branch.part.layers)
    attention, shape = branch.name == "attn", (last.layer.groups, branch.full)  # of all heads, or (1, M)
    if score == "random":
        values = torch.rand(1 + attention, *shape, generator=generator)[[0, 0, 1] if attention else [0]]
    elif score == "magnitude":
        values = first.weight.norm(dim=1).view(-1, *shape)
        values[-1] *= last.weight.norm(dim=0).view(shape)
    else:
        values = getattr(sums, score).clone().view(-1, *shape)
    if attention:
        values[:2] = values[0] * values[1] if score == "magnitude" else values[0] + values[1]
    order = values.argsort(-1, descending=True).to(first.weight.device)
    for rows in (parameter.view(*order.shape, -1) for parameter in first.parameters()):
        rows.copy_(rows.take_along_dim(order[..., None], 2))
    last.weight.copy_(last.weight.unflatten(1, shape).take_along_dim(order[-1:], 2).flatten(1))
    return order


def load_tensors(args, model, train, count=None):
    """The first ``count`` images (default: all) as ``model`` is evaluated on them, [N, 3, h, w], and labels [N]."""
    images = datasets.load_images(args, train)
    transform = datasets.eval_transform(datasets.data_config(model))
    pairs = [images[index] for index in range(min(count or len(images), len(images)))]
    return torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def agreement(logits, labels):
    """How often the largest logit is the label's, in per cent."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def in_turns(works, rounds):
    """The median of what each function returns over ``rounds`` rounds, in which they take turns, after one to warm
    up: whatever else the machine does slows all of them alike."""
    figures = [[work() for work in works] for _ in range(rounds + 1)]
    return [statistics.median(column) for column in zip(*figures[1:], strict=True)]


def training(supernet, device, batch_size, updates, amp="none", **kwargs):
    """(TrainingRun of stage 2 by its defaults, function of Widths -> images/s of ``updates`` steps). The steps are the
    product's own, mixup and averaged weights included, on one ready batch. kwargs: of TrainingRun."""
    args = main_train.get_args(["--batch-size", str(batch_size), "--amp", amp])
    run = TrainingRun(supernet.to(device), args, device, updates, **kwargs)
    mixup, criterion = mixup_and_criterion(args, supernet.num_classes)
    tensors = torch.randn(batch_size, *image_shape(supernet)), torch.arange(batch_size) % supernet.num_classes
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]  # as the loader does
    batches = [(*tensors, None)] * updates

    def rate(widths):
        run.begin_epoch(0)
        return train_one_epoch(run, batches, criterion, 0, mixup, draw=lambda *_: [widths])["images_per_s"]

    return run, rate


def scaled(full, attn, mlp):
    """Widths of shares of the full Widths: ``attn`` of every head, ``mlp`` of the hidden units."""
    return Widths(tuple(max(int(w * attn), 1) for w in full.attn), tuple(max(int(w * mlp), 1) for w in full.mlp))


def at_shares(table, costs, shares):
    """The largest Widths of a WidthTable within each share of the MACs. Raises InputError if one is out of reach."""
    return [Budget("macs_ratio", share).choose(table, costs).widths for share in shares]


def cut(supernet, sizes, compensation=None, proxy=None):
    """Extracted networks of several Widths: compensated, if ``compensation`` is given; then calibrated, if ``proxy``
    batches are."""
    subnets = [extract(supernet, widths) for widths in sizes]
    for subnet in subnets if compensation else ():
        compensate(subnet, supernet, compensation)
    return calibrate(subnets, supernet, proxy, OBJECTIVES["feature"]) if proxy else subnets


def spread(values):
    """Mean and sample standard deviation of a number for each seed, or of a single number."""
    values = torch.tensor(values, dtype=torch.float64).view(-1)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def cell(values, mean=".2f", deviation=".2f"):
    """Mean and spread, in the given formats."""
    return "±".join(map(format, spread(values), (mean, deviation)))


def claim(text, holds):
    return f"- {text}: {'yes' if holds else 'no'}"


def table_row(words):
    """A line of a Markdown table."""
    return "".join(f"| {word} ".replace("  ", " ") for word in words) + "|"


def markdown(head, rows):
    """The lines of a Markdown table."""
    return [table_row(head), "|---" * len(head) + "|", *map(table_row, rows)]


def write(output, results, lines, title, charts):
    """Write <output>.json, .md and .png, and print the second. charts: several (x, curves, labels), of curves {name:
    values for each x, as in ``spread``} and labels for ``axes.set``."""
    text, charts = "\n".join(lines) + "\n", list(charts)
    figure = Figure(figsize=(max(4.5 * len(charts), 7), 4.5), layout="constrained")
    figure.suptitle(title)
    for axes, (x, curves, labels) in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for name, points in curves.items():
            means, deviations = zip(*map(spread, points), strict=True)
            style = {"marker": "o", "markersize": 4, "capsize": 2, "linestyle": "--" if name.startswith("no ") else "-"}
            axes.errorbar(x, means, yerr=deviations, label=name, **style)
        axes.set(**labels)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    utils.save_text(json.dumps(results, indent=1), output.with_suffix(".json"))
    utils.save_text(text, output.with_suffix(".md"))
    with utils.atomic_file(output.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    print(text)
