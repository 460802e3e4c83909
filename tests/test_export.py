"""Saved and exported sub-networks: they compute the same anywhere, and nothing is left behind when they do not."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import random_images
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config

import datasets
import main_test
from models import export, kinds, peel, store, subnetwork
from models.compensation import BlockMemory, compensate
from models.cost import Shapes
from models.supernet import as_supernet, full_widths
from models.vit import ModelSpec
from models.width_table import Widths
from utils import InputError

SPEC = ModelSpec("vit_digits", 10, 24)
WIDTHS = Widths((16, 8, 0, 0), (256, 0, 8, 0))


def supernet(seed=0):
    torch.manual_seed(seed)
    model = as_supernet(SPEC.build())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved(folder, formats=(), widths=WIDTHS):
    """A sub-network saved in ``folder``, and the super-network it is cut from."""
    model = supernet()
    network = peel.extract(model, widths)
    export.save(network, SPEC, widths, Shapes.of(model), folder, {"checkpoint": "a test"}, 0.875, formats)
    return network, model


@torch.no_grad()
def test_a_saved_sub_network_loads_with_the_same_logits_and_its_own_size(tmp_path):
    network, model = saved(tmp_path / "net")
    again = subnetwork.load_subnetwork(tmp_path / "net")
    assert not again.training
    assert torch.equal(again(random_images(3, size=24)), network(random_images(3, size=24)))
    for module in again.modules():
        assert type(module).__module__.startswith(("timm.", "torch.nn.")), type(module)
    config = json.loads((tmp_path / "net/config.json").read_text())
    count = sum(parameter.numel() for parameter in again.parameters())
    assert config["parameters"] == count == Shapes.of(model).parameters(WIDTHS)
    assert config["macs"] == Shapes.of(model).macs(WIDTHS) < Shapes.of(model).macs(full_widths(model))
    assert config["origin"] == {"checkpoint": "a test"} and config["widths"] == WIDTHS.as_dict()
    with safe_open(tmp_path / "net/model.safetensors", "pt") as file:
        header = len(file.keys()) * 120
    assert 4 * count < (tmp_path / "net/model.safetensors").stat().st_size < 4 * count + header


@torch.no_grad()
def test_compensation_survives_saving(tmp_path):
    model = supernet()
    memory = [
        BlockMemory(
            torch.tril(torch.rand(256, 256, dtype=torch.float64)) + 16 * torch.eye(256), *map(torch.rand, sizes)
        )
        for sizes in [(256, 64, 64, 16, 256)] * 4
    ]
    network = compensate(peel.extract(model, WIDTHS), model, WIDTHS, memory)
    assert not torch.equal(network(random_images(2, size=24)), peel.extract(model, WIDTHS)(random_images(2, size=24)))
    export.save(network, SPEC, WIDTHS, Shapes.of(model), tmp_path, {}, 0.875)
    again = subnetwork.load_subnetwork(tmp_path)
    assert torch.equal(again(random_images(2, size=24)), network(random_images(2, size=24)))


@pytest.mark.parametrize("size", [24, 48])
def test_timm_resolves_the_transform_that_it_was_tested_with(size, tmp_path, shared_args):
    spec = ModelSpec("vit_digits", 10, size)
    model = as_supernet(spec.build())
    network = peel.extract(model, WIDTHS)
    export.save(network, spec, WIDTHS, Shapes.of(model), tmp_path, {}, 0.9)
    config = resolve_data_config(model=subnetwork.load_subnetwork(tmp_path))
    assert tuple(config["input_size"]) == (3, size, size) and config["crop_pct"] == (0.9 if size > 32 else 1)
    shared_args.eval_crop_ratio = 0.9
    ours = datasets.eval_transform(shared_args, datasets.data_config(network))
    image, _ = datasets.load_images(shared_args, train=False)[0]
    image = image.resize((40, 32))
    assert torch.equal(create_transform(**config)(image), ours(image))


def test_the_loader_works_without_this_repository(tmp_path):
    network, _ = saved(tmp_path / "net")
    shutil.copy(subnetwork.__file__, tmp_path / "loader.py")
    shutil.copy(kinds.__file__, tmp_path)
    torch.save(random_images(2, size=24), tmp_path / "images.pt")
    code = "import loader, torch; torch.save(loader.load_subnetwork('net')(torch.load('images.pt')), 'logits.pt')"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), network(random_images(2, size=24)))


@torch.no_grad()
def test_a_fine_tuned_network_has_averaged_weights_too(tmp_path):
    network, _ = saved(tmp_path)
    averaged = {name: value + 0.1 for name, value in network.state_dict().items()}
    content = {"peeled": peel.describe(SPEC, WIDTHS), "model": network.state_dict(), "model_ema": averaged}
    args = main_test.get_args(["--use_ema"])
    loaded, _, _ = main_test.load_alone("a test", content, args)
    assert torch.equal(loaded.head.weight, averaged["head.weight"])
    with pytest.raises(InputError, match="--use_ema: a test has no averaged weights"):
        main_test.load_alone("a test", content | {"model_ema": None}, args)


def test_the_stages_read_a_saved_folder_at_any_input_size(tmp_path):
    network, _ = saved(tmp_path)
    path = store.newest_checkpoint(tmp_path)
    content = store.read(path)
    again, spec, widths = peel.load_peeled(content, path)
    assert (spec, widths) == (SPEC, WIDTHS)
    images = random_images(2, size=24)
    assert torch.equal(again.eval()(images), network(images))
    larger, spec, _ = peel.load_peeled(content, path, input_size=32)
    assert (
        spec.img_size == 32 and larger.pos_embed.shape[1] == 65 and larger(random_images(1, size=32)).shape == (1, 10)
    )


def damage(folder, change):
    path = folder / "config.json"
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "cannot be read"),
        (lambda text: text.replace('"widths"', '"depths"'), "it has no widths"),
        (lambda text: text.replace("[256, 0, 8, 0]", "[512, 0, 8, 0]"), "describes no network"),
        (lambda text: text.replace('"num_classes": 10', '"num_classes": 11'), "does not fit"),
        (lambda text: text.replace('"vit_digits"', '"os.system"'), "neither one of"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(change, message, tmp_path):
    saved(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        peel.load_peeled(store.read(tmp_path / "model.safetensors"), tmp_path)


# ------------------------------------------------------------------------------------------ exports


def test_pt2_runs_without_our_code_on_any_batch(tmp_path):
    network, _ = saved(tmp_path, ["pt2"])
    module = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 7):
        images = random_images(batch, size=24)
        assert torch.allclose(module(images), network(images), atol=1e-5)


def test_onnx_and_int8_run_in_onnx_runtime_on_any_batch(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, _ = saved(tmp_path, ["int8"])
    printed = capsys.readouterr().out
    assert "model.onnx: largest difference" in printed and "model.int8.onnx: largest difference" in printed
    sizes = {}
    for name, tolerance in (("model.onnx", 1e-5), ("model.int8.onnx", 0.2)):
        session = onnxruntime.InferenceSession(tmp_path / name)
        for batch in (1, 7):
            images = random_images(batch, size=24)
            (logits,) = session.run(None, {"images": images.numpy()})
            assert torch.allclose(torch.from_numpy(logits), network(images), rtol=0, atol=tolerance)
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["model.onnx"] < 4 * sum(p.numel() for p in network.parameters()) + 30_000
    assert sizes["model.int8.onnx"] < 0.6 * sizes["model.onnx"]


def test_an_export_that_differs_leaves_no_file_and_what_was_there_stays(tmp_path, monkeypatch):
    saved(tmp_path / "net")
    before = (tmp_path / "net/model.safetensors").read_bytes()

    class Wrong:
        def __init__(self, path):
            self.path = path

        def module(self):
            return lambda images: torch.full((len(images), 10), 3.0)

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(InputError, match=r"model\.pt2: its logits differ by .* nothing is written"):
        saved(tmp_path / "net", ["pt2"], Widths((8,) * 4, (8,) * 4))
    assert (tmp_path / "net/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnxr") else object())
    with pytest.raises(InputError, match="pip install onnxruntime"):
        export.require(["onnx"])
    export.require(["pt2"])
    export.require([])


def test_an_extracted_network_compiles_whole(tmp_path):
    """The whole graph is captured and differentiated; code generation is the benchmark's business."""
    network, _ = saved(tmp_path)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    images = random_images(2, size=24)
    assert torch.allclose(compiled(images), network(images), atol=1e-5)
