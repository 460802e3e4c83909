"""Every family that docs/families.md names: the same guarantees as for a plain ViT, on small random networks."""

import copy
import json

import pytest
import timm
import torch
from conftest import ROOT
from families import FAMILIES, PLAIN, SWIN, Family
from fvcore.nn import FlopCountAnalysis
from timm.layers import RmsNorm
from timm.models.vision_transformer import ResPostBlock

import main_finetune_peeled
import main_reparam
import main_test
import main_train
from engine import branch_removal
from models import __main__ as overview
from models import export, peel, store
from models.calibration import calibrate
from models.compensation import compensate
from models.cost import MATMULS, Shapes
from models.kinds import ATTENTION, BLOCKS, MLPS, MODELS, TRANSFORMS
from models.piad import Groups
from models.statistics import OBJECTIVES, collect_statistics
from models.subnetwork import load_subnetwork, narrow
from models.supernet import as_stock, as_supernet, blocks_of, class_name, full_widths, set_widths
from models.vit import ALIASES, ModelSpec, load_weights
from models.width_table import Widths, WidthTable
from models.wpac import reparameterise
from utils import InputError

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def images_of(family, count=4, seed=1):
    return torch.randn(count, 3, family.size, family.size, generator=torch.Generator().manual_seed(seed)).double()


def batches_of(family, count=16, batch=8):
    labels, positions = torch.arange(count) % 7, torch.arange(count)
    images = images_of(family, count, seed=5)
    return list(zip(images.split(batch), labels.split(batch), positions.split(batch), strict=True))


def some_widths(supernet, count=4):
    """Uneven widths, about a third of all branches gone; the last has none."""
    generator = torch.Generator().manual_seed(3)
    parts = [part for block in blocks_of(supernet) for part in block.parts]
    for index in range(count):
        shares = torch.rand(len(parts), generator=generator).tolist()
        flat = [
            0 if s < 0.3 else p.width if p.whole else max(int(s * p.width), 1)
            for s, p in zip(shares, parts, strict=True)
        ]
        yield Widths.from_flat(flat if index + 1 < count else [0] * len(flat))


def output_of(model, images):
    """Logits, or the pooled feature of a network without a classifier."""
    return model.forward_head(model.forward_features(images))


def measured(family, supernet, **kwargs):
    objective = OBJECTIVES["label" if family.classes else "feature"]
    return collect_statistics(supernet, batches_of(family), objective, CPU, **kwargs)


def difference(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


@torch.no_grad()
@every_family
def test_full_width_is_bit_for_bit_timms_and_can_be_undone(family):
    stock, images = family.build().double(), images_of(family)
    supernet = as_supernet(copy.deepcopy(stock))
    assert torch.equal(supernet(images), stock(images))
    assert list(supernet.state_dict()) == list(stock.state_dict())
    assert len({tuple(supernet(images).flatten().tolist()), tuple(stock(2 * images).flatten().tolist())}) == 2
    again = as_stock(supernet)
    assert [type(module) for module in again.modules()] == [type(module) for module in stock.modules()]
    assert torch.equal(again(images), stock(images))


@torch.no_grad()
@every_family
def test_sliced_equals_extracted_of_stock_modules(family):
    supernet, images = as_supernet(family.build().double()), images_of(family)
    whole = supernet(images)
    for widths in some_widths(supernet):
        set_widths(supernet, widths)
        sliced, network = supernet(images), peel.extract(supernet, widths)
        assert difference(sliced, network(images)) < 1e-13
        assert difference(sliced, whole) > 1e-3, "the widths made no difference"
        strange = {type(module) for module in network.modules() if not is_stock(module)}
        assert not strange or {cls.__name__ for cls in strange} == {"Gone"}, strange


def is_stock(module):
    return type(module).__module__.startswith(("timm.", "torch.nn."))


@pytest.mark.parametrize("basis", ["balanced", "pca"])
@every_family
def test_every_rewrite_preserves_the_function(family, basis):
    supernet = as_supernet(family.build().double())
    original, images = copy.deepcopy(supernet), images_of(family)
    reparameterise(supernet, measured(family, supernet), basis)
    with torch.no_grad():
        assert difference(original(images), supernet(images)) < 1e-9
    for before, after in zip(blocks_of(original), blocks_of(supernet), strict=True):
        assert family.heads != torch.equal(before.output("attn").weight, after.output("attn").weight)
        assert not torch.equal(before.output("mlp").weight, after.output("mlp").weight)


@torch.no_grad()
@every_family
def test_macs_equal_fvcores_and_parameters_those_that_are_there(family):
    timm.layers.set_fused_attn(False)
    try:
        supernet = as_supernet(family.build())
    finally:
        timm.layers.set_fused_attn(True)
    shapes, image = Shapes.of(supernet), images_of(family, 1).float()
    for widths in [full_widths(supernet), *some_widths(supernet)]:
        network = peel.extract(supernet, widths)
        analysis = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert shapes.macs(widths, MATMULS) == analysis.total()
        assert shapes.parameters(widths) == sum(parameter.numel() for parameter in network.parameters())


@every_family
def test_replayed_sensitivity_equals_a_direct_computation(family):
    if not family.classes:
        pytest.skip("sensitivity is measured on a classifier")
    supernet, batches = as_supernet(family.build().double()), batches_of(family, 8)
    _, without = branch_removal(supernet, batches, CPU)
    full = full_widths(supernet).flat
    for branch in (0, len(full) // 2 + 1, len(full) - 1):
        set_widths(supernet, Widths.from_flat([0 if b == branch else width for b, width in enumerate(full)]))
        value, _ = branch_removal(supernet, batches, CPU)
        assert without[branch] == pytest.approx(value, rel=1e-12)


@every_family
def test_compensation_and_calibration_come_closer_to_the_full_network(family):
    supernet = as_supernet(family.build().double())
    memory = reparameterise(supernet, measured(family, supernet, hidden=True), mlp_order="greedy")
    batches, images = batches_of(family), torch.cat([batch[0] for batch in batches_of(family)])
    full = full_widths(supernet)
    narrow = Widths(full.attn, tuple(width // 2 for width in full.mlp))
    parts = [block.parts[1] for block in blocks_of(supernet)]
    with torch.no_grad():
        whole = output_of(supernet, images)
        plain = peel.extract(supernet, narrow)
        compensated = compensate(peel.extract(supernet, narrow), supernet, narrow, memory)
        errors = [(output_of(net, images) - whole).square().sum().item() for net in (plain, compensated)]
    if all(part.can("compensation") for part in parts):
        assert errors[1] < 0.8 * errors[0]
    calibrated = calibrate(copy.deepcopy(compensated), supernet, batches, OBJECTIVES["feature"], CPU)
    error = (output_of(calibrated, images) - whole).square().sum().item()
    if all(part.can("calibration") for part in parts):
        assert error < errors[1]
    else:
        assert error == pytest.approx(errors[1], rel=1e-6)
    unchanged = calibrate(peel.extract(supernet, full), supernet, batches, OBJECTIVES["feature"], CPU)
    assert difference(whole, output_of(unchanged, images)) < 1e-6


@torch.no_grad()
@every_family
def test_the_mean_of_a_removed_branch_goes_where_it_is_exact(family):
    """A branch that gives a constant is replaced by its mean without any loss, unless patches are merged before it."""
    supernet, images = as_supernet(family.build().double()), images_of(family)
    blocks = blocks_of(supernet)
    for branch in range(2 * len(blocks)):
        constant = copy.deepcopy(supernet)
        block = blocks_of(constant)[branch // 2]
        block.output(("attn", "mlp")[branch % 2]).weight.zero_()
        with torch.enable_grad():
            memory = reparameterise(constant, measured(family, constant, hidden=True))
        widths = Widths.from_flat([0 if b == branch else w for b, w in enumerate(full_widths(constant).flat)])
        set_widths(constant, full_widths(constant))
        whole = constant(images)
        network = compensate(peel.extract(constant, widths), constant, widths, memory)
        merged = family.name.startswith("swin") and branch == 4
        assert (difference(whole, network(images)) < 1e-9) != merged


@torch.no_grad()
@every_family
def test_saved_and_exported_networks_need_none_of_our_code(family, tmp_path, monkeypatch):
    """Save, ONNX and torch.export, each checked against PyTorch when it is written; and loaded again."""
    kwargs = {name: value for name, value in family.kwargs.items() if name != "num_classes"}
    monkeypatch.setitem(ALIASES, "small", (family.name, kwargs))
    spec = ModelSpec("small", family.classes, family.size)
    stock = spec.build()
    stock.load_state_dict(family.build().state_dict())
    supernet = as_supernet(stock)
    widths = next(some_widths(supernet))
    network = peel.extract(supernet, widths)
    export.save(network, spec, widths, Shapes.of(supernet), tmp_path / "net", {}, 0.875, ["onnx", "pt2"])
    again, images = load_subnetwork(tmp_path / "net"), images_of(family).float()
    assert torch.equal(network(images), again(images))
    assert list(timm.data.resolve_data_config(model=again)["input_size"]) == [3, family.size, family.size]


@torch.no_grad()
@every_family
def test_another_input_size_is_resampled_as_timm_does(family, tmp_path, monkeypatch):
    """timm itself, given the same weights as a pre-trained file, is the reference."""
    kwargs = {name: value for name, value in family.kwargs.items() if name != "num_classes"}
    monkeypatch.setitem(ALIASES, "small", (family.name, kwargs))
    size, state = family.size * 3 // 2, family.build().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    ours = ModelSpec("small", family.classes, size).build()
    assert load_weights(ours, state, "a test") == []
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": family.classes, "custom_load": False}
    arguments = kwargs | {"img_size": size, "num_classes": family.classes, "pretrained_cfg_overlay": overlay}
    reference = timm.create_model(family.name, pretrained=True, **arguments)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.eval()(images), reference.eval()(images))


# ------------------------------------------------------------------------------------------ the stages' commands

DIGITS = ["--data_set", "DIGITS", "--device", "cpu", "--num_workers", "0", "--batch_size", "128"]
TRAINING = ["--epochs", "1", "--warmup_epochs", "0", "--no_model_ema", "--drop_path", "0"]
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

    one, two = tmp_path / "one", tmp_path / "two"
    printed = stage(
        main_reparam,
        "--model",
        "small",
        "--pretrained",
        tmp_path / "start.pth",
        "--proxy_samples",
        128,
        "--output_dir",
        one,
    )
    for part in (part for block in blocks_of(store.load_supernet(one).model) for part in block.parts):
        assert all(transform in printed and reason in printed for transform, reason in part.left_out.items())
    stage(
        main_train, "--model", "small", "--pretrained", one / "reparamed.pth", "--mask_table", "none",
        "--proxy_samples", 64, "--grow_epochs", 1, "--drop_ratio", 0.6, "--output_dir", two, *TRAINING,
    )  # fmt: skip
    for folder in (one, two):
        printed = stage(
            main_test, "--checkpoint", folder, "--macs_ratio", 0.5, "--finer", "--plot", "--output_dir", folder
        )
        (row,) = json.loads((folder / "results.json").read_text())["rows"]
        net = store.load_supernet(folder)
        assert row["macs"] <= 0.5 * net.shapes.macs(net.shapes.full) and row["top1"] > 0 and "knowledge.png" in printed
    tuned = tmp_path / "tuned"
    stage(main_finetune_peeled, "--checkpoint", two, "--macs_ratio", 0.5, "--output_dir", tuned, *TRAINING)
    stage(main_test, "--checkpoint", tuned, "--output_dir", tuned)
    assert json.loads((tuned / "results.json").read_text())["rows"][0]["widths"] is not None


def test_chosen_parts_are_left_alone(tmp_path, monkeypatch):
    """--skip_blocks, --only and --min_width: neither rewritten nor cut, and nothing below the least width."""
    options = [*DIGITS, "--model", "vit_digits", "--pretrained", str(tmp_path / "start.pth"), "--proxy_samples", "64"]
    torch.manual_seed(0)
    torch.save(ModelSpec("vit_digits", 10).build().state_dict(), tmp_path / "start.pth")
    start = torch.load(tmp_path / "start.pth")
    for flags, alone in ((["--skip_blocks", "1", "3"], {2, 3, 6, 7}), (["--only", "mlp"], {0, 2, 4, 6})):
        folder = tmp_path / flags[0]
        main_reparam.main(main_reparam.get_args([*options, *flags, "--min_width", "0.3", "--output_dir", str(folder)]))
        after, steps = torch.load(folder / "reparamed.pth"), WidthTable.load(folder / "mask_table.json").steps
        for branch, (full, last) in enumerate(zip(steps[0].flat, steps[-1].flat, strict=True)):
            name = f"blocks.{branch // 2}.{('attn.proj', 'mlp.fc2')[branch % 2]}.weight"
            assert torch.equal(start[name], after[name]) == (branch in alone)
            assert last == full if branch in alone else last >= 0.3 * full
        least = Widths.from_flat([w if b in alone else -(-3 * w // 10) for b, w in enumerate(steps[0].flat)])
        assert steps[-1] == Groups.of(steps[0], None, least).least, "the table ends at the least widths"


def test_python_m_models_tells_what_a_model_offers_and_why_another_has_nothing(capsys, monkeypatch):
    names = ["swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3", "resnet18"]
    monkeypatch.setattr("sys.argv", ["models", *names])
    overview.main()
    swin, dinov3, resnet = capsys.readouterr().out.splitlines()
    assert "12 blocks" in swin and "384/768/1536/3072" in swin and "without" not in swin
    assert "EvaAttention 64, without head width" in dinov3 and "Mlp 1536" in dinov3
    assert resnet == "resnet18: no: a ResNet of BasicBlock cannot be cut"


def test_every_kind_has_its_row_in_the_documentation():
    text = (ROOT / "docs" / "families.md").read_text()
    for table in (MODELS, BLOCKS, ATTENTION, MLPS):
        for cls in table:
            assert f"`{class_name(cls)}`" in text, cls
    assert all(transform in text for transform in TRANSFORMS)
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
    supernet, images = as_supernet(family.build().double()), images_of(family)
    with torch.enable_grad():
        memory = reparameterise(supernet, measured(family, supernet, hidden=True))
    widths = Widths.from_flat([0 if b == branch else w for b, w in enumerate(full_widths(supernet).flat)])
    network = compensate(peel.extract(supernet, widths), supernet, widths, memory)
    set_widths(supernet, widths)
    assert difference(supernet(images), network(images)) < 1e-12


def test_a_table_that_cuts_into_what_goes_as_a_whole_is_refused(tmp_path):
    family = FAMILIES["BEiT"]
    shapes = Shapes.of(as_supernet(family.build()))
    table = WidthTable([shapes.full, Widths((8, 16, 16), shapes.full.mlp)])
    with pytest.raises(InputError, match=r"'0\.attn' step 1 keeps 8 of 16; in this model it can"):
        table.check_fits(shapes.full, shapes.whole, "a test")
    with pytest.raises(ValueError, match="can only be kept whole"):
        narrow(family.build(), (8, 16, 16), shapes.full.mlp)
