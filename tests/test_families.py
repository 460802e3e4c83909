"""Every family that docs/families.md names: the same guarantees as for a plain ViT, on small random networks."""

import copy
import json

import pytest
import timm
import torch
from conftest import (
    ROOT,
    difference,
    fused_attention,
    macs_by_fvcore,
    measured,
    proxy_batches,
    random_images,
    rewritten,
)
from families import FAMILIES, PLAIN, SWIN, Family
from timm.layers import RmsNorm
from timm.models.vision_transformer import ResPostBlock

import main_finetune_peeled
import main_reparam
import main_test
import main_train
from models import __main__ as overview
from models.piad.importance import Units, branch_removal
from models.piad.width_table import WidthTable
from models.subnet import export
from models.subnet.extract import extract
from models.subnet.load import load_subnetwork
from models.subnet.store import load_supernet, subnet_config
from models.vit.cost import MATMULS, Costs
from models.vit.families import ATTENTION, BLOCKS, MLPS, MODELS, OWN_MODULES, Transform, narrow
from models.vit.pretrained import ALIASES, ModelSpec, load_weights
from models.vit.supernet import as_stock, as_supernet, at_widths, branches, full_widths
from models.vit.widths import Widths
from models.wpac.calibration import calibrate
from models.wpac.compensation import attach, compensate
from models.wpac.density import densities
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES
from utils import InputError

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def built(family):
    """(the family's super-network in float64, four images)."""
    return as_supernet(family.build().double()), random_images(4, size=family.size, dtype=torch.float64)


def batches_of(family, count=16):
    return proxy_batches(count, size=family.size, dtype=torch.float64)


def statistics_of(family, supernet, **kwargs):
    return measured(supernet, "label" if family.classes else "feature", batches_of(family), **kwargs)


def without(branch, supernet):
    """The full Widths, but for one branch that is gone."""
    return Widths.from_flat([0 if b == branch else width for b, width in enumerate(full_widths(supernet).flat)])


def some_widths(supernet, count=4):
    """Uneven widths, about a third of all branches gone; the last has none."""
    own, generator = branches(supernet), torch.Generator().manual_seed(3)
    for _ in range(count - 1):
        shares = zip(own, torch.rand(len(own), generator=generator).tolist(), strict=True)
        yield Widths.from_flat(
            [0 if s < 0.3 else b.full if b.indivisible else max(int(s * b.full), 1) for b, s in shares]
        )
    yield Widths.from_flat([0] * len(own))


def is_stock(module):
    return isinstance(module, OWN_MODULES) or type(module).__module__.startswith(("timm.", "torch.nn."))


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@every_family
def test_full_width_is_bit_for_bit_timms_and_can_be_undone(family, fused):
    with fused_attention(fused):
        stock, images = family.build(), random_images(4, size=family.size)
    supernet, expected = as_supernet(copy.deepcopy(stock)), stock(images)
    assert torch.equal(supernet(images), expected) and not torch.equal(stock(2 * images), expected)
    assert list(supernet.state_dict()) == list(stock.state_dict())
    supernet.load_state_dict(stock.state_dict(), strict=True)
    again = as_stock(supernet)
    assert [type(module) for module in again.modules()] == [type(module) for module in stock.modules()]
    assert torch.equal(again(images), expected)


@torch.no_grad()
@every_family
def test_sliced_equals_extracted_of_stock_modules(family):
    supernet, images = built(family)
    whole = supernet(images)
    for widths in some_widths(supernet):
        with at_widths(supernet, widths):
            sliced = supernet(images)
        subnet = extract(supernet, widths)
        assert difference(sliced, subnet(images)) < 1e-13
        assert difference(sliced, whole) > 1e-3, "the widths made no difference"
        assert not {type(module) for module in subnet.modules() if not is_stock(module)}


@pytest.mark.parametrize("basis", ["balanced", "pca"])
@every_family
def test_every_rewrite_preserves_the_function(family, basis):
    supernet, images = built(family)
    original = copy.deepcopy(supernet)
    reparameterise(supernet, statistics_of(family, supernet), basis)
    with torch.no_grad():
        assert difference(original(images), supernet(images)) < 1e-9
    for before, after in zip(branches(original), branches(supernet), strict=True):
        changes = family.heads or before.name == "mlp"
        assert torch.equal(before.output.weight, after.output.weight) != changes


@every_family
def test_density_rises_from_nothing_to_all(family):
    supernet, _ = built(family)
    statistics = statistics_of(family, supernet, hidden=True)
    found = densities(supernet, statistics, reparameterise(supernet, statistics))
    assert list(found) == [str(branch) for branch in branches(supernet) if not branch.indivisible]
    for held in (held for pair in found.values() for held in pair):
        assert held[:, 0].abs().max() < 1e-9 and (held[:, -1] == 1).all() and held.max() < 1 + 1e-9


@torch.no_grad()
@every_family
def test_macs_equal_fvcores_and_parameters_those_that_are_there(family):
    with fused_attention(False):
        supernet = as_supernet(family.build())
    costs, image = Costs.of(supernet), random_images(1, size=family.size)
    for widths in [full_widths(supernet), *some_widths(supernet)]:
        subnet = extract(supernet, widths)
        assert costs.macs(widths, MATMULS) == macs_by_fvcore(subnet, image)
        assert costs.parameters(widths) == sum(parameter.numel() for parameter in subnet.parameters())


@every_family
def test_replayed_sensitivity_equals_a_direct_computation(family):
    if not family.classes:
        pytest.skip("sensitivity is measured on a classifier")
    (supernet, _), batches = built(family), batches_of(family, 8)
    _, replayed = branch_removal(supernet, batches)
    for branch in (0, len(replayed) // 2 + 1, len(replayed) - 1):
        with at_widths(supernet, without(branch, supernet)):
            value, _ = branch_removal(supernet, batches)
        assert replayed[branch] == pytest.approx(value, rel=1e-12)


@torch.no_grad()
@every_family
def test_compensation_and_calibration_come_closer_to_the_full_network(family):
    (supernet, _), batches = built(family), batches_of(family)
    compensation = rewritten(supernet, statistics_of(family, supernet, hidden=True), "balanced", "greedy")
    images, full = torch.cat([batch[0] for batch in batches]), full_widths(supernet)
    widths, whole = Widths(full.attn, tuple(width // 2 for width in full.mlp)), supernet(images)

    def error(network):
        return (network(images) - whole).square().sum().item()

    def all_can(transform):
        return all(branch.part.can(transform) for branch in branches(supernet)[1::2])

    subnet = compensate(extract(supernet, widths), supernet, compensation)
    compensated = error(subnet)
    if all_can(Transform.COMPENSATION):
        assert compensated < 0.8 * error(extract(supernet, widths))
    unchanged, calibrated = calibrate([extract(supernet, full), subnet], supernet, batches, OBJECTIVES["feature"])
    calibrated, unchanged = error(calibrated), unchanged.state_dict()
    if all_can(Transform.CALIBRATION):
        assert calibrated < compensated
    else:
        assert calibrated == pytest.approx(compensated, rel=1e-6)
    for name, value in supernet.state_dict().items():
        assert torch.allclose(value, unchanged[name], atol=1e-9), f"{name} of the full network was refitted"


@every_family
def test_what_is_trained_compensated_is_what_is_cut(family):
    supernet, images = built(family)
    compensation = rewritten(supernet, statistics_of(family, supernet, hidden=True), "balanced", "greedy")
    for known in compensation:
        known.output_mean.zero_()
    attach(supernet, compensation)
    with torch.no_grad():
        for number, parameter in enumerate(supernet.parameters()):  # as training does
            generator = torch.Generator().manual_seed(number)
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    averaged = copy.deepcopy(supernet)
    for widths in some_widths(supernet):
        with at_widths(supernet, widths), at_widths(averaged, widths):
            sliced = supernet(images)
            assert torch.equal(averaged(images), sliced)
        subnet = compensate(extract(supernet, widths), supernet, compensation)
        assert difference(sliced, subnet(images)) < 1e-10
    widths = next(some_widths(supernet))
    with at_widths(supernet, widths):
        supernet(images).square().sum().backward()
    for branch, width in zip(branches(supernet), widths.flat, strict=True):
        if branch.output.folding and 0 < width < branch.full:
            learnt = branch.output.weight.grad.unflatten(1, (-1, branch.full))
            assert learnt[..., -1].abs().max() > 0, "columns that are dropped learn too, where they are folded in"


@torch.no_grad()
@every_family
def test_the_mean_of_a_removed_branch_goes_where_it_is_exact(family):
    """A branch that gives a constant is replaced by its mean without any loss, unless patches are merged before it."""
    supernet, images = built(family)
    for branch in range(len(branches(supernet))):
        constant = copy.deepcopy(supernet)
        branches(constant)[branch].output.weight.zero_()
        compensation = rewritten(constant, statistics_of(family, constant, hidden=True))
        subnet = compensate(extract(constant, without(branch, constant)), constant, compensation)
        merged = family.name.startswith("swin") and branch == 4
        assert (difference(constant(images), subnet(images)) < 1e-9) != merged


@torch.no_grad()
@every_family
def test_saved_and_exported_networks_need_none_of_our_code(family, tmp_path, monkeypatch):
    """Save, ONNX and torch.export, each checked against PyTorch when it is written; and loaded again."""
    monkeypatch.setitem(ALIASES, "small", (family.name, family.kwargs))
    spec, supernet = ModelSpec("small", family.classes, family.size), as_supernet(family.build())
    widths = next(some_widths(supernet))
    subnet = extract(supernet, widths)
    export.save(subnet, subnet_config(subnet, spec, widths, Costs.of(supernet)), tmp_path, ["onnx", "pt2"])
    again, images = load_subnetwork(tmp_path), random_images(4, size=family.size)
    assert torch.equal(subnet(images), again(images))
    assert list(timm.data.resolve_data_config(model=again)["input_size"]) == [3, family.size, family.size]


@torch.no_grad()
@every_family
def test_another_input_size_is_resampled_as_timm_does(family, tmp_path, monkeypatch):
    """timm itself, given the same weights as a pre-trained file, is the reference."""
    monkeypatch.setitem(ALIASES, "small", (family.name, family.kwargs))
    size, state = family.size * 3 // 2, family.build().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    ours = ModelSpec("small", family.classes, size).build()
    assert load_weights(ours, state, "a test") == []
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": family.classes, "custom_load": False}
    arguments = family.kwargs | {"img_size": size, "num_classes": family.classes, "pretrained_cfg_overlay": overlay}
    reference, images = timm.create_model(family.name, pretrained=True, **arguments), random_images(2, size=size)
    assert torch.equal(ours.eval()(images), reference.eval()(images))


# ------------------------------------------------------------------------------------------ the stages' commands

DIGITS = ["--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0", "--batch-size", "128"]
TRAINING = ["--epochs", "1", "--warmup-epochs", "0", "--no-model-ema", "--drop-path", "0"]
STAGED = {
    "Swin": SWIN | {"img_size": 16},
    "EVA-02 B": PLAIN | {"img_size": 14, "patch_size": 7},
    "q/k norm": PLAIN | {"img_size": 16, "patch_size": 4, "qk_norm": True},
}


@pytest.mark.parametrize("key", STAGED)
def test_all_four_stages_with_the_same_commands(key, tmp_path, monkeypatch, capsys):
    """Stage 1, cutting without training, stage 2 with a list that grows, cutting to a budget, and fine-tuning."""
    monkeypatch.setitem(ALIASES, "small", (FAMILIES[key].name, STAGED[key]))
    torch.manual_seed(0)
    torch.save(ModelSpec("small", 10).build().state_dict(), tmp_path / "start.pth")

    def stage(script, *options):
        script.main(script.get_args([str(option) for option in (*DIGITS, *options)]))
        return capsys.readouterr().out

    one, two, tuned = (tmp_path / name for name in ("one", "two", "tuned"))
    printed = stage(
        main_reparam, "--model", "small", "--pretrained", tmp_path / "start.pth", "--proxy-samples", 128,
        "--output-dir", one,
    )  # fmt: skip
    for branch in branches(load_supernet(one).supernet):
        assert all(what.value in printed and reason in printed for what, reason in branch.part.left_out.items())
    stage(
        main_train, "--model", "small", "--pretrained", one / "reparamed.pth", "--mask-table", "none",
        "--proxy-samples", 64, "--grow-epochs", 1, "--drop-ratio", 0.6, "--output-dir", two, *TRAINING,
    )  # fmt: skip
    for folder in (one, two):
        printed = stage(
            main_test, "--checkpoint", folder, "--macs-ratio", 0.5, "--finer", "--plot", "--output-dir", folder
        )
        (row,), costs = json.loads((folder / "results.json").read_text())["rows"], load_supernet(folder).costs
        assert row["macs"] <= 0.5 * costs.macs(costs.full) and row["top1"] > 0 and "knowledge.png" in printed
    tuning = "--checkpoint", two, "--macs-ratio", 0.5, "--output-dir", tuned, *TRAINING
    assert "before fine-tuning: top-1 " in stage(main_finetune_peeled, *tuning)
    assert "so far: top-1 " in stage(main_finetune_peeled, *tuning, "--resume", "auto")
    stage(main_test, "--checkpoint", tuned, "--output-dir", tuned)
    assert json.loads((tuned / "results.json").read_text())["rows"][0]["widths"] is not None


def test_chosen_parts_are_left_alone(tmp_path, start):
    """--skip-blocks, --only and --min-width: neither rewritten nor cut, and nothing below the least width."""
    options = [*DIGITS, "--model", "vit_digits", "--pretrained", str(start), "--proxy-samples", "64"]
    before = torch.load(start)
    for flags, alone in ((["--skip-blocks", "1", "3"], {2, 3, 6, 7}), (["--only", "mlp"], {0, 2, 4, 6})):
        folder = tmp_path / flags[0]
        main_reparam.main(main_reparam.get_args([*options, *flags, "--min-width", "0.3", "--output-dir", str(folder)]))
        after, steps = torch.load(folder / "reparamed.pth"), WidthTable.load(folder / "mask_table.json").steps
        for branch, (full, last) in enumerate(zip(steps[0].flat, steps[-1].flat, strict=True)):
            name = f"blocks.{branch // 2}.{('attn.proj', 'mlp.fc2')[branch % 2]}.weight"
            assert torch.equal(before[name], after[name]) == (branch in alone)
            assert last == full if branch in alone else last >= 0.3 * full
        least = Widths.from_flat([w if b in alone else -(-3 * w // 10) for b, w in enumerate(steps[0].flat)])
        assert steps[-1] == Units.of(steps[0], None, least).least, "the table ends at the least widths"


def test_a_table_for_hardware_has_multiples(tmp_path, start):
    options = [*DIGITS, "--model", "vit_digits", "--pretrained", str(start), "--proxy-samples", "64"]
    main_reparam.main(main_reparam.get_args([*options, "--multiple-of", "64", "--output-dir", str(tmp_path)]))
    steps = WidthTable.load(tmp_path / "mask_table.json").steps
    assert {width for widths in steps for width in widths.mlp} == {0, 64, 128, 192, 256}
    assert {width for widths in steps for width in widths.attn} <= {0, 8, 16}
    assert (tmp_path / "density.png").stat().st_size > 10_000


def test_python_m_models_tells_what_a_model_offers_and_why_another_has_nothing(capsys, monkeypatch):
    names = ["swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3", "resnet18"]
    monkeypatch.setattr("sys.argv", ["models", *names])
    overview.main()
    swin, dinov3, resnet = capsys.readouterr().out.splitlines()
    assert "12 blocks" in swin and "384/768/1536/3072" in swin and "without" not in swin
    assert "EvaAttention 64, without Q/K basis, mean folding; Mlp 1536" in dinov3
    assert resnet == "resnet18: no: a ResNet of BasicBlock cannot be cut"


def test_every_kind_has_its_row_in_the_documentation():
    text = (ROOT / "docs" / "families.md").read_text()
    for table in (MODELS, BLOCKS, ATTENTION, MLPS):
        for cls in table:
            assert f"`{overview.class_name(cls)}`" in text, cls
    assert all(transform.value in text for transform in Transform)
    for family in FAMILIES:
        assert family in text, f"no row names {family}"


@torch.no_grad()
@pytest.mark.parametrize(
    ("branch", "kwargs"),
    [(0, {"pre_norm": True, "norm_layer": RmsNorm}), (0, {"pos_embed": "none", "embed_norm_layer": RmsNorm}),
     (1, {"block_fn": ResPostBlock, "norm_layer": RmsNorm})],
)  # fmt: skip
def test_a_mean_that_finds_no_bias_is_lost_and_nothing_else(branch, kwargs):
    """Norms without a bias: what is cut computes what the super-network does without the branch."""
    family = Family("vit_small_patch16_224", PLAIN | kwargs)
    supernet, images = built(family)
    compensation = rewritten(supernet, statistics_of(family, supernet, hidden=True))
    widths = without(branch, supernet)
    subnet = compensate(extract(supernet, widths), supernet, compensation)
    with at_widths(supernet, widths):
        assert difference(supernet(images), subnet(images)) < 1e-12


def test_a_table_that_cuts_into_what_goes_as_a_whole_is_refused():
    model = FAMILIES["inner norms"].build()
    costs = Costs.of(as_supernet(copy.deepcopy(model)))
    table = WidthTable([costs.full, Widths((8, 16, 16), costs.full.mlp)])
    with pytest.raises(InputError, match=r"'0\.attn' step 1 keeps 8 of 16; in this model it can"):
        table.check_fits(costs, "a test")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: width 8 .* can only be kept at 16"):
        narrow(model, (8, 16, 16), costs.full.mlp)
