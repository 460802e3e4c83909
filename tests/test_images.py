"""Image files as they come: unusual ones load, broken ones are named, or skipped and counted."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from PIL import Image
from test_data_and_weights import named, training_args

import datasets
from engine import evaluate
from models.subnet import latency
from utils import InputError

CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
NOISE = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return datasets.open_image(path)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = NOISE[..., 0].astype(np.uint16) * 257
    for name in ("x.png", "x.tif"):
        image = saved(tmp_path / name, Image.fromarray(grey))
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.stack([NOISE[..., 0]] * 3, -1))
    wide = datasets.as_rgb(Image.fromarray(grey.astype(np.int32)))
    assert np.array_equal(np.asarray(wide)[..., 0], NOISE[..., 0])


def test_cmyk_palette_transparent_and_one_pixel_images_load(tmp_path):
    image = Image.fromarray(NOISE)
    cmyk = saved(tmp_path / "cmyk.tif", image.convert("CMYK"))
    assert np.array_equal(np.asarray(cmyk), NOISE), "without compression CMYK of an RGB image is exact"
    assert saved(tmp_path / "cmyk.jpg", image.convert("CMYK"), quality=95).mode == "RGB"
    few = Image.fromarray(NOISE // 128 * 255)
    assert np.array_equal(np.asarray(saved(tmp_path / "p.png", few.convert("P"))), np.asarray(few))
    palette = saved(tmp_path / "pt.png", few.convert("P"), transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(palette), np.asarray(few))
    for mode in ("1", "L", "LA", "RGBA"):
        assert saved(tmp_path / f"{mode}.png", image.convert(mode)).mode == "RGB"
    single = saved(tmp_path / "one.png", Image.new("RGB", (1, 1), (9, 8, 7)))
    assert single.getpixel((0, 0)) == (9, 8, 7)
    for size in (16, 48):
        config = CONFIG | {"input_size": (3, size, size)}
        for transform in (
            datasets.train_transform(training_args(Namespace()), config),
            datasets.eval_transform(config),
        ):
            assert transform(single).shape == (3, size, size)


def test_images_need_not_be_square():
    model = tiny_vit(img_size=(48, 32))
    config, image, cpu = datasets.data_config(model), Image.fromarray(NOISE), torch.device("cpu")
    assert config["input_size"] == (3, 48, 32) and config["crop_mode"] == "center"
    for transform in (datasets.train_transform(training_args(Namespace()), config), datasets.eval_transform(config)):
        assert transform(image).shape == (3, 48, 32)
    (seconds,) = latency.measure([model], cpu, latency.Conditions.of(model, cpu, 2, "none"))
    assert seconds > 0


@pytest.fixture
def folder(tmp_path):
    """Twelve images of three classes in ImageNet's layout, all different; two of each half are broken."""
    for split in ("train", "val", "validation"):
        for label, name in enumerate(("cat", "dog", "eel")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                colour = (60 * label + 10 * number, 200 - 50 * label, 20 * number)
                Image.new("RGB", (20, 20), colour).save(tmp_path / split / name / f"{number}.JPEG")
        whole = (tmp_path / split / "cat/2.JPEG").read_bytes()
        (tmp_path / split / "cat/1.JPEG").write_bytes(whole[: len(whole) - 60])
        (tmp_path / split / "eel/3.JPEG").write_text("no picture")
    return tmp_path


def data_args(shared_args, folder, data_set="IMNET", **changes):
    changes = {"skip_bad_images": True, "batch_size": 4, "proxy_samples": 12, "repeated_aug": False} | changes
    return named(training_args(shared_args, **changes), data_set, folder)


def loader_of(args, kind):
    images = datasets.load_images(args, train=kind != "eval")
    if kind == "train":
        return datasets.train_loader(images, tiny_vit(), args)
    if kind == "eval":
        return datasets.eval_loader(images, tiny_vit(), args)
    return datasets.proxy_loader(images, tiny_vit(), args, "proxy_samples")


@pytest.mark.parametrize("data_set", ["IMNET", "ImageFolder"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["train", "eval", "proxy"])
def test_without_the_flag_the_file_is_named_in_one_line(kind, workers, data_set, shared_args, folder):
    """Of torchvision's and timm's data sets alike, and out of loader processes too."""
    loader = loader_of(data_args(shared_args, folder, data_set, skip_bad_images=False, num_workers=workers), kind)
    with pytest.raises(InputError) as error:
        list(loader)
    message = str(error.value)
    assert "\n" not in message and "--skip-bad-images" in message
    assert any(name in message for name in ("cat/1.JPEG: not a", "eel/3.JPEG: not a"))


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_bad_images_are_left_out_and_counted(workers, shared_args, folder, capsys):
    args = data_args(shared_args, folder, num_workers=workers)
    loader = loader_of(args, "eval")
    batches = list(loader)
    assert [len(labels) for _, labels, _ in batches] == [3, 4, 3]
    assert torch.cat([positions for *_, positions in batches]).tolist() == [0, *range(2, 11)]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [0] * 3 + [1] * 4 + [2] * 3
    names = f"{folder}/val/cat/1.JPEG, {folder}/val/eel/3.JPEG"
    assert capsys.readouterr().out == f"evaluate: 2 image(s) could not be read and were skipped: {names}\n"
    assert evaluate(tiny_vit(), loader, torch.device("cpu"))["images"] == 10
    assert not capsys.readouterr().out, "told once"
    (folder / "val" / "cat" / "2.JPEG").write_bytes(b"")
    evaluate(tiny_vit(), loader, torch.device("cpu"))
    assert capsys.readouterr().out.startswith("evaluate: 3 image(s)"), "until there are others"


def test_in_training_the_next_good_image_stands_in_whatever_the_workers(shared_args, folder, capsys):
    def epoch(workers):
        loader = loader_of(data_args(shared_args, folder, num_workers=workers), "train")
        loader.sampler.set_epoch(3)
        batches = [torch.cat(parts) for parts in zip(*loader, strict=True)]
        asked = [index for index, _ in loader.sampler]
        datasets.report_bad_images(loader, "epoch 3")
        return *batches, asked

    images, labels, positions, asked = epoch(0)
    assert sorted(asked) == list(range(12))
    # cat/1 is number 1; eel/3 is number 11, after which the first one comes.
    assert positions.tolist() == [{1: 2, 11: 0}.get(index, index) for index in asked]
    assert labels.tolist() == [index // 4 for index in positions.tolist()]
    again = epoch(2)
    assert torch.equal(images, again[0]) and again[3] == asked
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("epoch 3: 2 image(s) could not be read")
    # The stand-in is augmented by the key of the place that it fills, not by its own.
    at, itself = asked.index(1), asked.index(2)
    assert not torch.equal(images[at], images[itself])


def test_too_many_bad_images_in_a_row_end_the_pass(shared_args, folder, monkeypatch):
    for file in folder.rglob("*.JPEG"):
        file.write_bytes(b"")
    monkeypatch.setattr(datasets, "BAD_IN_A_ROW", 7)
    with pytest.raises(InputError, match="7 in a row"):
        list(loader_of(data_args(shared_args, folder), "train"))


def test_labels_without_images_and_too_large_ones_are_refused():
    images = np.zeros((3, 8, 8), np.uint8)
    for labels in (np.zeros(2, np.uint8), np.array([0, 1, 10])):
        with pytest.raises(InputError, match="as many labels"):
            datasets.ArrayDataset(images, labels, "x")
