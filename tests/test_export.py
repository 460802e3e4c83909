"""Saved and exported sub-networks: they compute the same anywhere, and nothing is left behind when they do not."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import timm
import torch
from conftest import images_in, random_images
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config

import datasets
import main_test
import options
from models.piad.width_table import WidthTable
from models.subnet import export, load
from models.subnet.extract import extract
from models.subnet.store import load_supernet, subnet_config
from models.vit import families, weights
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec
from models.vit.supernet import as_supernet, full_widths
from models.vit.widths import Widths
from models.wpac.compensation import Compensation, compensate
from utils import InputError

SPEC = ModelSpec("vit_digits", 10, 24)
WIDTHS = Widths((16, 8, 0, 0), (256, 0, 8, 0))
FILES = ["README.md", "config.json", "model.safetensors"]


def random_supernet(spec=SPEC):
    torch.manual_seed(0)
    supernet = as_supernet(spec.build())
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return supernet.eval()


def save(subnet, supernet, folder, formats=(), widths=WIDTHS, spec=SPEC):
    config = subnet_config(subnet, spec, widths, Costs.of(supernet))
    return export.save(subnet, config | {"origin": {"checkpoint": "a test"}}, folder, formats)


def saved(folder, **options):
    """A sub-network saved in ``folder``, and the super-network it is cut from."""
    supernet = random_supernet()
    subnet = extract(supernet, options.get("widths", WIDTHS))
    save(subnet, supernet, folder, **options)
    return subnet, supernet


@torch.no_grad()
def test_a_saved_sub_network_loads_with_the_same_logits_and_its_own_size(tmp_path):
    subnet, supernet = saved(tmp_path / "net")
    again = load.load_subnetwork(tmp_path / "net")
    assert not again.training
    assert torch.equal(again(random_images(3, size=24)), subnet(random_images(3, size=24)))
    for module in again.modules():
        assert type(module).__module__.startswith(("timm.", "torch.nn.")), type(module)
    config, costs = json.loads((tmp_path / "net/config.json").read_text()), Costs.of(supernet)
    count = sum(parameter.numel() for parameter in again.parameters())
    assert config["parameters"] == count == costs.parameters(WIDTHS)
    assert config["macs"] == costs.macs(WIDTHS) < costs.macs(full_widths(supernet))
    assert config["origin"] == {"checkpoint": "a test"} and config["widths"] == WIDTHS.as_dict()
    with safe_open(tmp_path / "net/model.safetensors", "pt") as file:
        header = len(file.keys()) * 120
    assert 4 * count < (tmp_path / "net/model.safetensors").stat().st_size < 4 * count + header


@torch.no_grad()
def test_compensation_survives_saving(tmp_path):
    supernet, images = random_supernet(), random_images(2, size=24)
    attention, mlp = (Compensation(*map(torch.rand, (width, 64, 0, size))) for width, size in ((16, 64), (256, 256)))
    for known in (attention, mlp):
        size = len(known.input_mean)
        known.factor = torch.tril(torch.rand(size, size, dtype=torch.float64)) + 16 * torch.eye(size)
    subnet = compensate(extract(supernet, WIDTHS), supernet, [attention, mlp] * 4)
    assert not torch.equal(subnet(images), extract(supernet, WIDTHS)(images))
    save(subnet, supernet, tmp_path)
    assert torch.equal(load.load_subnetwork(tmp_path)(images), subnet(images))


@pytest.mark.parametrize("size", [24, 48])
def test_timm_resolves_the_transform_that_it_was_tested_with(size, tmp_path, shared_args):
    spec = ModelSpec("vit_digits", 10, size, 0.9)
    supernet = random_supernet(spec)
    subnet = extract(supernet, WIDTHS)
    save(subnet, supernet, tmp_path, spec=spec)
    config = resolve_data_config(model=load.load_subnetwork(tmp_path))
    assert tuple(config["input_size"]) == (3, size, size) and config["crop_pct"] == (0.9 if size > 32 else 1)
    ours = datasets.eval_transform(datasets.data_config(subnet))
    image, _ = datasets.load_images(shared_args, train=False)[0]
    image = datasets.as_rgb(image).resize((40, 32))
    assert torch.equal(create_transform(**config)(image), ours(image))


@pytest.mark.parametrize(("place", "module"), [(".", "loader"), ("theirs", "theirs.loader")])
def test_the_loader_works_without_this_repository(place, module, tmp_path):
    """Three files, beside a script or inside a package of another project."""
    subnet, _ = saved(tmp_path / "net")
    (tmp_path / place).mkdir(exist_ok=True)
    for file, name in ((load, "loader.py"), (families, "families.py"), (weights, "weights.py")):
        shutil.copy(file.__file__, tmp_path / place / name)
    torch.save(random_images(2, size=24), tmp_path / "images.pt")
    code = f"import torch; from {module} import load_subnetwork; network = load_subnetwork('net')"
    code += "; torch.save(network(torch.load('images.pt')), 'logits.pt')"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), subnet(random_images(2, size=24)))


@torch.no_grad()
def test_timm_loads_the_folder_of_an_uncut_network_and_the_card_says_so(tmp_path):
    supernet = random_supernet()
    for name, widths in (("full", full_widths(supernet)), ("cut", WIDTHS)):
        save(extract(supernet, widths), supernet, tmp_path / name, widths=widths)
    images, call = random_images(2, size=24), 'timm.create_model("local-dir:this folder", pretrained=True)'
    network = timm.create_model(f"local-dir:{tmp_path / 'full'}", pretrained=True).eval()
    assert torch.equal(network(images), extract(supernet, full_widths(supernet))(images))
    assert call in (tmp_path / "full/README.md").read_text()
    with pytest.raises(RuntimeError, match="in loading state_dict"):
        timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True)
    assert "timm alone does not" in (tmp_path / "cut/README.md").read_text()


def test_a_folder_says_classes_and_licence_and_not_where_timm_s_weights_are(tmp_path):
    spec = ModelSpec("vit_tiny", 2)
    supernet = as_supernet(spec.build())
    supernet.pretrained_cfg["label_names"] = ["cat", "dog"]
    widths = Widths((8,) * 12, (8,) * 12)
    save(extract(supernet, widths), supernet, tmp_path, widths=widths, spec=spec)
    cfg = load.load_subnetwork(tmp_path).pretrained_cfg
    assert cfg["num_classes"] == 2 and cfg["label_names"] == ["cat", "dog"] and cfg["license"] == "apache-2.0"
    assert not cfg.get("url") and not cfg.get("hf_hub_id")
    config = load.read_config(tmp_path)
    assert config["label_names"] == ["cat", "dog"] and config["pretrained_cfg"]["num_classes"] == 2
    assert load_supernet(tmp_path).cut(widths).pretrained_cfg["label_names"] == ["cat", "dog"]
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\nlicense: apache-2.0\n---\n")
    for words in ("| checkpoint | a test |", "[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8] of [64", "load_subnetwork"):
        assert words in card


SHARES = [f"macs_ratio {share}" for share in ("1", "0.8333", "0.6667", "0.5", "0.3333")]


@pytest.mark.parametrize(("least", "asked"), [(96, [*SHARES[:2], "op_code 1"]), (8, SHARES)])
def test_without_budgets_the_ladder_ends_where_the_table_does(least, asked):
    """Of a table whose MLPs stay, or of one that was not grown to its end."""
    costs = Costs.of(random_supernet())
    table = WidthTable([costs.full, Widths((0,) * 4 if least < 96 else (8,) * 4, (least * 2,) * 4)])
    assert [str(budget) for budget in main_test.default_ladder(Namespace(costs=costs, table=table))] == asked


def test_commands_that_are_printed_cut_for_the_same_input_size():
    args = main_test.get_args(["--checkpoint", "x", "--input-size", "48", "--calibrate", "9", "--no-compensation"])
    assert main_test.cutting_flags(args) == ["--input-size", 48, "--calibrate", 9, "--no-compensation"]


def test_a_sub_network_is_tested_with_the_crop_that_it_was_saved_with(tmp_path):
    spec, widths = ModelSpec("vit_digits", 10, 48, 1.0), Widths((16, 8, 0, 0), (256, 0, 8, 0))
    supernet = random_supernet(spec)
    save(extract(supernet, widths), supernet, tmp_path, widths=widths, spec=spec)

    def tested(folder, *flags):
        """How images are made for what the flags load."""
        args = main_test.get_args(["--checkpoint", str(folder), "--data-set", "DIGITS", *flags])
        return datasets.data_config(options.load(args).supernet)

    assert tested(tmp_path)["crop_pct"] == 1.0
    load_supernet(tmp_path).save(tmp_path / "again", widths)
    assert load.read_config(tmp_path / "again")["pretrained_cfg"]["crop_pct"] == 1.0
    assert tested(tmp_path, "--eval-crop-ratio", "0.9")["crop_pct"] == 0.9
    saved(tmp_path / "small")  # of images that are never cropped: that says nothing of larger ones
    assert tested(tmp_path / "small")["crop_mode"] == "squash"
    larger = tested(tmp_path / "small", "--input-size", "48")
    assert (larger["crop_pct"], larger["crop_mode"]) == (0.875, "center")


def test_images_are_made_as_the_weights_were_published(tmp_path):
    """Of a model of timm's as timm says, of the paper's as in DeiT; a saved network keeps what it was saved with."""

    def config_of(name, **changes):
        with torch.device("meta"):
            return datasets.data_config(ModelSpec(name, 0, **changes).build())

    for name in ("vit_base_patch16_clip_224", "vit_base_patch16_224_miil", "eva02_tiny_patch14_336"):
        theirs = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        assert config_of(name) == theirs, name
    assert config_of("vit_base_patch16_clip_224")["crop_pct"] == 0.95
    assert config_of("vit_base_patch16_224_miil")["interpolation"] == "bilinear"
    assert config_of("vit_small")["crop_pct"] == 0.875 != config_of("deit_small_patch16_224")["crop_pct"]
    squashed, own = (config_of("eva_giant_patch14_336", crop_ratio=ratio) for ratio in (None, 0.9))
    assert squashed["crop_mode"] == "squash" and (own["crop_pct"], own["crop_mode"]) == (0.9, "center")

    spec = ModelSpec("vit_digits", 10, 48)
    supernet = random_supernet(spec)
    changed = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_mode": "squash"}
    supernet.pretrained_cfg |= changed
    save(extract(supernet, WIDTHS), supernet, tmp_path, spec=spec)
    for again in (load_supernet(tmp_path).supernet, load.load_subnetwork(tmp_path)):
        found = datasets.data_config(again)
        assert {
            name: tuple(v) if name in ("mean", "std") else v for name, v in found.items() if name in changed
        } == changed


@torch.no_grad()
def test_the_stages_read_a_saved_folder_at_any_input_size_and_a_fine_tuned_checkpoint(tmp_path):
    subnet, images = saved(tmp_path)[0], random_images(2, size=24)
    loaded = load_supernet(tmp_path)
    assert loaded.one_size and loaded.spec == SPEC and loaded.table.steps == [WIDTHS]
    assert not loaded.cut(WIDTHS).training
    assert torch.equal(loaded.cut(WIDTHS)(images), subnet(images))
    with pytest.raises(InputError, match="is one sub-network of one size"):
        loaded.cut(Widths((8, 8, 0, 0), (256, 0, 8, 0)))
    larger = load_supernet(tmp_path, input_size=32)
    assert larger.spec.img_size == 32 and larger.supernet.pos_embed.shape[1] == 65
    assert larger.supernet(random_images(1, size=32)).shape == (1, 10)
    averaged = {name: value + 0.1 for name, value in subnet.state_dict().items()}
    content = {"config": load.read_config(tmp_path), "model": subnet.state_dict(), "model_ema": averaged}
    torch.save(content, tmp_path / "tuned.pth")
    tuned = load_supernet(tmp_path / "tuned.pth", use_ema=True)
    assert tuned.one_size and tuned.table.steps == [WIDTHS]
    assert torch.equal(tuned.supernet.head.weight, averaged["head.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--finer", "^--finer: .* is one sub-network"),
        ("--no-compensation", "^--no-compensation: .* is one sub-network"),
        ("--model vit_tiny", "^--model vit_tiny: .* is a sub-network of vit_digits"),
    ],
)
def test_what_a_sub_network_has_no_use_for_is_refused(flags, message, tmp_path):
    saved(tmp_path)
    with pytest.raises(InputError, match=message):
        options.load(main_test.get_args(["--checkpoint", str(tmp_path), *flags.split()]))


def test_a_sub_network_is_tested_by_the_names_of_its_classes_and_keeps_them(tmp_path, monkeypatch):
    saved(tmp_path / "net")
    names, images = ["cat", "dog", "eel", *"abcdefg"], []
    monkeypatch.setattr(datasets, "eval_loader", lambda found, network, args: images.append(found))

    def tested(data_set):
        args = main_test.get_args(f"--checkpoint {tmp_path / 'net'} --data-set {data_set} --device cpu".split())
        args.data_path, loaded = images_in(tmp_path / data_set, "dog", "eel"), options.load(args)
        loaded.supernet.pretrained_cfg["label_names"] = names
        main_test.make_test(args, loaded)
        assert loaded.supernet.pretrained_cfg["label_names"] == names
        return images[-1]

    assert [label for _, label in tested("IMNET")] == [1, 2] and tested("DIGITS")[0][1] < 10
    names[1] = "owl"
    with pytest.raises(InputError, match="and none of these is 'dog'"):
        tested("ImageFolder")


DAMAGES = [  # a text in config.json, what stands in its place, what is said
    ("{", "", "cannot be read"),
    ('"widths"', '"depths"', "it has no widths"),
    ("[256, 0, 8, 0]", "[512, 0, 8, 0]", "its description is that of no network"),
    ("[256, 0, 8, 0]", f"[{10**400}, 0, 8, 0]", "is no size"),
    ("[256, 0, 8, 0]", "[" * 10**5, "cannot be read"),
    ('"model_args": {', '"model_args": {"checkpoint_path": "x", ', "it names checkpoint_path"),
    ('"model_args": {', '"model_args": {"pretrained": true, ', "it names pretrained"),
    ('"pretrained_cfg": {', '"pretrained_cfg": {"hf_hub_id": "x", ', "it names hf_hub_id"),
    ('"bicubic"', '"sinc"', "describes no transform"),
    ('"crop_pct": 1.0', '"crop_pct": 1e-9', "describes no transform"),
    ('"vit_tiny_patch16_224"', '"hf-hub:someone/x"', "it names hf-hub:someone/x"),
    ('"num_classes": 10', '"num_classes": 11', "does not fit"),
    ('"vit_digits"', '"os.system"', "neither one of"),
]


@pytest.mark.parametrize(("old", "new", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_folder_is_refused_in_one_line(old, new, message, tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message) as error:
        load_supernet(tmp_path)
    assert "\n" not in str(error.value)
    if message not in ("does not fit", "neither one of"):
        with pytest.raises(ValueError):
            load.load_subnetwork(tmp_path)


# ------------------------------------------------------------------------------------------ exports


def test_pt2_runs_without_our_code_on_any_batch(tmp_path):
    subnet, _ = saved(tmp_path, formats=["pt2"])
    module = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 7):
        images = random_images(batch, size=24)
        assert torch.allclose(module(images), subnet(images), atol=1e-5)


def test_onnx_and_int8_run_in_onnx_runtime_on_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    supernet, sizes = random_supernet(), {}
    subnet = extract(supernet, WIDTHS)
    differences = save(subnet, supernet, tmp_path, ["int8"])
    openvino = importlib.util.find_spec("openvino") and importlib.import_module("openvino")
    if openvino:  # where it is installed: as docs/deploy.md has it
        images = random_images(3, size=24)
        network = openvino.compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert torch.allclose(torch.from_numpy(network(images.numpy())[0]), subnet(images), atol=1e-5)
    for name, tolerance in (("model.onnx", 1e-5), ("model.int8.onnx", 0.2)):
        assert differences.pop(name) > 0
        session = onnxruntime.InferenceSession(tmp_path / name)
        for batch in (1, 7):
            images = random_images(batch, size=24)
            (logits,) = session.run(None, {"images": images.numpy()})
            assert torch.allclose(torch.from_numpy(logits), subnet(images), rtol=0, atol=tolerance)
        sizes[name] = (tmp_path / name).stat().st_size
    assert differences == {"README.md": None, "config.json": None, "model.safetensors": None}
    assert sizes["model.onnx"] < 4 * sum(p.numel() for p in subnet.parameters()) + 30_000
    assert sizes["model.int8.onnx"] < 0.6 * sizes["model.onnx"]


@pytest.mark.parametrize("logit", [3.0, float("nan")])
def test_an_export_that_differs_leaves_no_file_and_what_was_there_stays(logit, tmp_path, monkeypatch):
    saved(tmp_path / "net")
    before = (tmp_path / "net/model.safetensors").read_bytes()
    wrong = Namespace(module=lambda: lambda images: torch.full((len(images), 10), logit))
    monkeypatch.setattr(torch.export, "load", lambda path: wrong)
    with pytest.raises(InputError, match=r"model\.pt2: its logits differ by .* nothing is written"):
        saved(tmp_path / "net", formats=["pt2"], widths=Widths((8,) * 4, (8,) * 4))
    assert (tmp_path / "net/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == FILES


def test_what_was_exported_of_another_network_goes_when_its_folder_is_written_again(tmp_path):
    saved(tmp_path, formats=["pt2"])
    (tmp_path / ".files.1.skd-part").mkdir()  # of a run that was killed
    (tmp_path / "notes.txt").touch()
    saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "notes.txt"])


def test_missing_packages_are_named(monkeypatch):
    missing = ("onnxruntime", "plotly")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else object())
    with pytest.raises(InputError, match="--export onnx needs onnxruntime: pip install onnxruntime"):
        main_test.check_export(Namespace(export=["onnx"], page=None))
    with pytest.raises(InputError, match="--page needs plotly: pip install plotly"):
        main_test.check_export(Namespace(export=[], page=[]))
    main_test.check_export(Namespace(export=["pt2"], page=None, benchmark=False))


def test_an_extracted_network_compiles_whole(tmp_path):
    """The whole graph is captured and differentiated; code generation is the benchmark's business."""
    subnet, _ = saved(tmp_path)
    compiled = torch.compile(subnet, fullgraph=True, backend="aot_eager")
    images = random_images(2, size=24)
    assert torch.allclose(compiled(images), subnet(images), atol=1e-5)
