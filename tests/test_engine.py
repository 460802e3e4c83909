"""One training step: accumulation, several sub-networks a step, distillation, bad numbers, and ranks."""

from argparse import Namespace

import pytest
import timm
import torch
from conftest import TINY_WIDTHS, proxy_batches, random_images, tiny_supernet, tiny_vit
from PIL import Image
from runs import torchrun
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

import datasets
from engine import evaluate, evaluate_all, probe, train_one_epoch
from models.piad.distillation import Distillation
from models.vit.supernet import compile_branches, set_widths
from models.vit.widths import Widths
from training import TrainingRun

CPU = torch.device("cpu")


def training_args(**changes):
    args = Namespace(
        lr=1e-2, unscale_lr=True, batch_size=8, accum_iter=1, opt="momentum", weight_decay=0.0, sched="cosine",
        epochs=2, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=0, model_ema=False, model_ema_decay=0.9, amp="none",
        clip_grad=None, seed=0, keep_last=1, save_every_steps=0, skip_nonfinite=0, tensorboard=False,
    )  # fmt: skip
    vars(args).update(changes)
    return args


def trained(batches, draw=None, teacher=None, model=None, **changes):
    """The parameters of the tiny super-network after one epoch over ``batches``."""
    run = TrainingRun(model or tiny_supernet(), training_args(**changes), CPU, len(batches), find_unused=True)
    figures = train_one_epoch(run, batches, nn.CrossEntropyLoss(), 0, draw=draw, teacher=teacher)
    return dict(run.model.named_parameters()), figures


def assert_equal(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < tolerance


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_accumulated_batches_equal_one_large_batch(clip_grad):
    def draw(step, _):
        return [TINY_WIDTHS[0], TINY_WIDTHS[2 + step]]

    small, figures = trained(proxy_batches(32, 8), draw, accum_iter=2, clip_grad=clip_grad)
    large, expected = trained(proxy_batches(32, 16), draw, batch_size=16, clip_grad=clip_grad)
    assert_equal(small, large)
    assert figures["train_loss"] == pytest.approx(expected["train_loss"])
    moved = max((small[n] - p).abs().max().item() for n, p in tiny_supernet().named_parameters())
    assert moved > 1e-4


def test_several_subnetworks_of_a_step_add_the_mean_of_their_gradients():
    images, labels, positions = proxy_batches(8, 8)[0]
    chosen, expected = [TINY_WIDTHS[0], TINY_WIDTHS[3], TINY_WIDTHS[4]], tiny_supernet()
    for widths in chosen:
        set_widths(expected, widths)
        (F.cross_entropy(expected(images), labels) / 3).backward()
    got, _ = trained([(images, labels, positions)], lambda *_: chosen)
    for name, parameter in expected.named_parameters():
        moved = parameter.detach() - (0 if parameter.grad is None else 1e-2 * parameter.grad)
        assert torch.allclose(got[name], moved, atol=1e-7), name


def test_batches_of_an_update_that_go_through_their_own_subnetworks_add_the_mean_of_their_gradients():
    batches, draws, expected = proxy_batches(16, 8), [[TINY_WIDTHS[1]], [TINY_WIDTHS[3]]], tiny_supernet()
    for (images, labels, _), (widths,) in zip(batches, draws, strict=True):
        set_widths(expected, widths)
        (F.cross_entropy(expected(images), labels) / 2).backward()
    got, _ = trained(batches, lambda _, batch: draws[batch], accum_iter=2)
    for name, parameter in expected.named_parameters():
        moved = parameter.detach() - (0 if parameter.grad is None else 1e-2 * parameter.grad)
        assert torch.allclose(got[name], moved, atol=1e-7), name


def reference_loss(kind, student, teacher, labels, alpha, tau):
    """Written out: cross-entropy against the label, and KL(teacher || student) at a temperature or its hard label."""
    label = -student.log_softmax(1)[range(len(labels)), labels].mean()
    if kind == "hard":
        taught = -student.log_softmax(1)[range(len(labels)), teacher.argmax(1)].mean()
    else:
        p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
        taught = tau**2 * (p * (p / q).log()).sum(1).mean()
    return (1 - alpha) * label + alpha * taught


@pytest.mark.parametrize("kind", ["soft", "hard", "inplace"])
def test_distillation_loss_against_its_definition(kind):
    student, teacher = random_images(6, seed=2, size=2).flatten(1), random_images(6, seed=3, size=2).flatten(1)
    labels = torch.arange(6)
    got = Distillation(kind, 0.3, 2.0).loss(nn.CrossEntropyLoss(), student, labels, teacher)
    assert got.item() == pytest.approx(reference_loss(kind, student, teacher, labels, 0.3, 2.0).item(), rel=1e-5)


def test_in_place_targets_are_the_full_networks_and_do_not_train_it():
    images, labels, positions = proxy_batches(8, 8)[0]
    chosen, expected = [TINY_WIDTHS[0], TINY_WIDTHS[1]], tiny_supernet()
    full = expected(images)
    (F.cross_entropy(full, labels) / 2).backward()
    set_widths(expected, chosen[1])
    (reference_loss("soft", expected(images), full.detach(), labels, 0.7, 1.0) / 2).backward()
    got, _ = trained([(images, labels, positions)], lambda *_: chosen, Distillation("inplace", 0.7, 1.0))
    assert_equal(got, {name: p.detach() - 1e-2 * p.grad for name, p in expected.named_parameters()})


def test_a_frozen_teacher_stays_and_sees_its_own_kind_of_images():
    """The batch that was made for the student equals, for the teacher, one made for the teacher itself."""
    student, teacher = tiny_vit(), timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=7)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distillation = Distillation("soft", 0.5, 1.0, teacher, datasets.between_models(student, teacher))
    trained(proxy_batches(16, 8), lambda *_: [TINY_WIDTHS[1]], distillation)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    plain = Image.new("RGB", (20, 20), (40, 90, 200))
    ours, theirs = (datasets.eval_transform(datasets.data_config(model))(plain) for model in (student, teacher))
    assert torch.allclose(datasets.between_models(student, teacher)(ours[None])[0], theirs, atol=1e-5)
    assert datasets.between_models(student, student)(ours[None]) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_gone_bad_stops_before_the_optimiser(bad):
    batches = proxy_batches(16, 8)
    batches[1][0][0] = bad
    model = tiny_supernet()
    with pytest.raises(FloatingPointError, match="epoch 0, step 1"):
        trained(batches, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


SCRIPT = """
import sys
import torch, utils
from argparse import Namespace
from conftest import TINY_WIDTHS, proxy_batches, tiny_supernet
from test_engine import training_args, trained
from models.piad.distillation import Distillation
from models.vit.pretrained import save_checkpoint

args = Namespace(device="cpu", seed=0)
utils.start_up(args)
rank, ranks = utils.rank(), utils.world_size()
assert utils.gather({rank: "any"}) == [{r: "any"} for r in range(ranks)]
assert utils.all_the_same("equal") and utils.all_the_same(f"rank {rank}") == (ranks == 1)
batches = [(x[rank::ranks], y[rank::ranks], p[rank::ranks]) for x, y, p in proxy_batches(32, 8)]

def together(step, _):
    return [TINY_WIDTHS[0], TINY_WIDTHS[2], TINY_WIDTHS[3 + step]]

def apart(step, _):
    return [TINY_WIDTHS[(3, 4)[rank]]]

for name, draw, teacher in (("together", together, Distillation("inplace", 0.5, 1.0)), ("apart", apart, None)):
    if name == "apart" and ranks == 1:
        continue
    accum = 2 if name == "together" else 1
    state, _ = trained(batches, draw, teacher, accum_iter=accum, clip_grad=1.0 if accum == 2 else None)
    assert utils.all_the_same(str([p.sum().item() for p in state.values()]))
    save_checkpoint(state, f"{sys.argv[1]}/{name}{ranks}.pth")

poisoned = [(x.clone(), y, p) for x, y, p in batches]
if rank == 0:
    poisoned[1][0][0] = float("nan")
try:
    trained(poisoned, together)
    sys.exit("the bad loss went unnoticed")
except FloatingPointError as error:
    assert "step 1" in str(error)
utils.barrier()
"""


def test_ranks_agree_with_one_process_and_with_each_other(tmp_path):
    """Sandwich steps with in-place distillation and accumulation: two ranks equal one. With a sub-network for each
    rank: the mean of the gradients of both. A bad loss on one rank stops both."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for ranks in (1, 2):
        output, code = torchrun(script, tmp_path, ranks=ranks)
        assert code == 0, output
    one, two, apart = (torch.load(tmp_path / f"{name}.pth") for name in ("together1", "together2", "apart2"))
    assert_equal(one, two, 1e-5)
    expected = tiny_supernet()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-2, momentum=0.9)
    for images, labels, _ in proxy_batches(32, 8):
        optimizer.zero_grad()
        for rank, widths in enumerate(TINY_WIDTHS[3:5]):
            set_widths(expected, widths)
            (F.cross_entropy(expected(images[rank::2]), labels[rank::2]) / 2).backward()
        optimizer.step()
    assert_equal(apart, dict(expected.named_parameters()), 1e-5)


def test_compiled_branches_train_alike_at_any_width_from_six_graphs():
    """Of attention and of MLPs: full, narrower, and off. Evaluation is not compiled."""
    graphs, supernet, batches = [], tiny_supernet(), proxy_batches(72, 8)
    compile_branches(supernet, lambda graph, _: graphs.append(graph) or graph)

    def draw(step, _):
        return [TINY_WIDTHS[step] if step < 6 else Widths((step, 15 - step, 2), (step, 190 - step, 20 * step))]

    one, figures = trained(batches, draw, model=supernet, clip_grad=1.0)
    other, expected = trained(batches, draw, clip_grad=1.0)
    assert_equal(one, other, 1e-5)
    assert figures["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    evaluate(supernet, batches, CPU)
    assert 0 < len(graphs) <= 6


def test_several_sizes_are_evaluated_on_images_that_are_read_once(shared_args):
    """Equal to the bit to one pass for each: of a super-network at several widths, and of another network."""
    supernet, other = tiny_supernet(num_classes=10), tiny_vit(seed=1, num_classes=10)
    read, images = [], Subset(datasets.load_images(shared_args, train=False), range(20))
    loader = datasets.eval_loader(images, other, shared_args)
    dataset, transform = loader.loader.dataset, loader.loader.dataset.transform
    dataset.transform = lambda image: read.append(image) or transform(image)
    sizes = [*((supernet, widths) for widths in TINY_WIDTHS), (other, None)]
    together = evaluate_all(sizes, loader, CPU)
    assert len(read) == 20
    for (network, widths), figures in zip(sizes, together, strict=True):
        if widths:
            set_widths(network, widths)
        alone = evaluate(network, loader, CPU)
        assert figures.pop("images_per_s") > 0 and alone.pop("images_per_s") > 0
        assert figures == alone
    assert len({figures["loss"] for figures in together}) == len(sizes)


def test_accuracies_are_whole_numbers_of_images():
    labels = torch.zeros(23, dtype=torch.long)
    logits = torch.zeros(23, 10)
    logits[:17, 0], logits[17:, 1:7] = 1.0, 1.0  # 17 of 23 are right, and the others not among the first five
    figures = evaluate(nn.Identity(), [(logits, labels)], CPU)
    assert figures["top1"] == figures["top5"] == 1700 / 23


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_probe_finds_what_the_features_tell(kind):
    """Three classes apart in direction; one of ten test images has another's features."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    features = 5 * torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
    tested = features[:30].clone()
    tested[:3] = features[[1, 2, 0]]
    train, test = ([(x, labels[: len(x)], None)] for x in (features, tested))
    figures = probe(torch.nn.Identity(), train, test, CPU, "none", kind)
    assert figures["top1"] == pytest.approx(90) and figures["top5"] == 100
    assert figures["images"] == 30 and figures["probe"] == kind
