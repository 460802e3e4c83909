"""Data sets and weight files in the layouts users have, and loaders that do not depend on workers."""

import contextlib
import gzip
import json
import pickle
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from conftest import images_in, random_images, tiny_vit
from families import FAMILIES, PLAIN
from PIL import Image
from safetensors.torch import save_file

import datasets
from models.subnet.store import newest_checkpoint
from models.vit import pretrained
from models.vit.pretrained import ModelSpec, load_pretrained, load_weights, read_checkpoint
from models.vit.weights import as_safetensors
from utils import InputError, ModelError


def named(args, data_set, path):
    return Namespace(**{**vars(args), "data_set": data_set, "data_path": str(path)})


def test_classes_of_torchvision_s_imagenet_are_its_folders():
    """It has tuples of synonyms for names."""
    images = Namespace(classes=[("tench", "Tinca tinca"), ("goldfish",)], wnids=["n01440764", "n01443537"])
    assert datasets.class_names(images) == ["n01440764", "n01443537"]
    assert datasets.class_names(Namespace(classes=["a"])) == ["a"] and datasets.class_names(Namespace()) is None


def test_a_label_beyond_the_network_s_classes_is_named_where_the_data_set_does_not_say_how_many(shared_args):
    images = [(Image.new("RGB", (16, 16)), label) for label in (3, 12)]
    loader = datasets.eval_loader(images, tiny_vit(num_classes=10), shared_args)
    with pytest.raises(InputError, match="image 1: label 12 is none of the 10 classes"):
        list(loader)


def test_a_tag_that_timm_does_not_know_is_answered_with_those_it_has():
    with pytest.raises(ModelError, match=r"^vit_small_patch16_224.mae: timm knows no such weights; it has .*\.dino"):
        ModelSpec("vit_small_patch16_224.mae", 10).build()


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_fashion_mnist_from_gzipped_idx_files(shared_args, tmp_path):
    pixels = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([4, 0, 9]))
    dataset = datasets.load_images(named(shared_args, "FASHION_MNIST", tmp_path), train=False)
    image, label = dataset[2]
    assert len(dataset) == 3 and label == 9 and dataset.num_classes == 10
    assert np.array_equal(np.asarray(datasets.as_rgb(image))[..., 1], pixels[2])


def test_a_damaged_idx_file_is_refused_or_reads_the_same(tmp_path):
    path, pixels = tmp_path / "images.gz", np.random.default_rng(0).integers(0, 256, (4, 9, 9))
    write_idx(path, pixels)
    refused = 0
    for _ in flipped_everywhere(path, 1):
        try:
            assert np.array_equal(datasets._idx(path), pixels)
        except InputError:
            refused += 1
    assert refused > 300


def test_cifar_in_torchvisions_layout(shared_args, tmp_path, monkeypatch):
    # torchvision compares checksums of the published files, which made-up ones cannot have.
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._load_meta", lambda self: None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [3, 7]}
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    dataset = datasets.load_images(named(shared_args, "CIFAR10", tmp_path), train=False)
    assert len(dataset) == 2 and dataset[1][1] == 7 and dataset.num_classes == 10


def test_stanford_cars_in_torchvisions_layout(shared_args, tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    folder = tmp_path / "stanford_cars"
    for place in ("devkit", "cars_train"):
        (folder / place).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "cars_train/00001.jpg")
    kinds = [("class", "i4"), ("fname", "O")]
    savemat(folder / "devkit/cars_train_annos.mat", {"annotations": np.array([(3, "00001.jpg")] * 2, kinds)})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["a", "b", "c"], object)})
    dataset = datasets.load_images(named(shared_args, "CARS", tmp_path), train=True)
    assert len(dataset) == 2 and dataset[0][1] == 2 and dataset.num_classes == 196


def test_cub_by_its_own_split(shared_args, tmp_path):
    folder, lines, split = tmp_path / "CUB_200_2011", [], []
    for index in range(6):
        name = f"00{index % 2 + 1}.Bird/{index}.jpg"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (index, 0, 0)).save(folder / "images" / name)
        lines.append(f"{index} {name}")
        split.append(f"{index} {int(index < 4)}")
    (folder / "images.txt").write_text("\n".join(lines))
    (folder / "train_test_split.txt").write_text("\n".join(split))
    sizes = {}
    for train in (True, False):
        dataset = datasets.load_images(named(shared_args, "CUB", tmp_path), train)
        assert dataset.num_classes == 2 and sorted({label for _, label in dataset}) == [0, 1]
        sizes[train] = len(dataset)
    assert sizes == {True: 4, False: 2}


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_by_its_annotations(name, year, shared_args, tmp_path):
    (tmp_path / "train_val").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "train_val/7.jpg")
    content = {
        "images": [{"id": 7, "file_name": "train_val/7.jpg"}], "annotations": [{"image_id": 7, "category_id": 4}],
        "categories": [{"id": i} for i in range(5)],
    }  # fmt: skip
    (tmp_path / f"val{year}.json").write_text(json.dumps(content))
    dataset = datasets.load_images(named(shared_args, name, tmp_path), train=False)
    image, label = dataset[0]
    assert len(dataset) == 1 and label == 4 and image.mode == "RGB" and dataset.num_classes == 5
    with pytest.raises(InputError, match=f"train{year}.json"):
        datasets.load_images(named(shared_args, name, tmp_path), train=True)


def test_a_missing_data_set_is_named_with_its_path_under_the_names_of_the_papers_code_too(shared_args, tmp_path):
    own = {name: name for name in datasets.DATA_SETS if not name.startswith(("DIGITS", "INAT"))}
    for name, ours in (own | datasets.OTHER_NAMES).items():
        with pytest.raises(InputError) as error:
            datasets.load_images(named(shared_args, name.lower(), tmp_path), train=True)
        assert str(error.value).startswith(f"{tmp_path}") and datasets.DATA_SETS[ours][2] in str(error.value)


def test_the_number_of_classes_must_be_said_by_somebody():
    for classes in (None, 0):
        with pytest.raises(InputError, match="--nb-classes is required"):
            datasets.fit_classes(Namespace(num_classes=None), classes)


def test_any_data_set_that_timm_can_open(shared_args, tmp_path):
    images_in(tmp_path, "cat", "dog", "eel")
    (tmp_path / "val").rename(tmp_path / "validation")
    args = named(shared_args, "ImageFolder", tmp_path)
    dataset = datasets.load_images(args, train=True)
    assert len(dataset) == 3 and dataset.num_classes == 3 and len(datasets.load_images(args, train=False)) == 3
    loader = datasets.eval_loader(dataset, tiny_vit(), shared_args)
    images, labels, _ = next(iter(loader))
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path / "validation/cat")
    with pytest.raises(InputError, match="has no class folder 'cat'"):
        datasets.load_images(args, train=False)
    (tmp_path / "validation").rename(tmp_path / "test")
    with pytest.raises(InputError, match="no ImageFolder; expected train/<class>/"):
        datasets.load_images(args, train=False)


def test_the_order_of_the_images_depends_on_the_seed(shared_args):
    images = datasets.load_images(shared_args, train=True)

    def order(seed, repeated, epoch=2):
        args = training_args(shared_args, repeated_aug=repeated, seed=seed)
        sampler = datasets.train_loader(images, tiny_vit(), args).sampler
        sampler.set_epoch(epoch)
        return [index for index, _ in sampler]

    for repeated in (True, False):
        assert order(0, repeated) == order(0, repeated) != order(1, repeated)
        assert order(1, repeated) != order(0, repeated, epoch=3), "an order of the neighbour, an epoch later"
        assert order(2**32 - 1, repeated), "the largest seed"


def test_some_of_imagenet_s_classes_get_its_labels_by_their_names_or_by_a_map(shared_args, tmp_path):
    args = named(shared_args, "IMNET", images_in(tmp_path / "some", "n01443537", "n15075141"))
    images = datasets.load_images(args, train=False)
    datasets.relabel(images, 1000, "here")
    assert [label for _, label in images] == [1, 999] and images.num_classes == 1000
    args = named(shared_args, "IMNET", images_in(tmp_path / "own", "cat", "dog"))
    images = datasets.load_images(args, train=False)
    datasets.relabel(images, 3, "here", ["dog", "eel", "cat"])
    assert [label for _, label in images] == [2, 0]
    with pytest.raises(InputError, match=r"^here has 2 classes, the checkpoint 3; .*--class-map"):
        datasets.relabel(datasets.load_images(args, train=False), 3, "here", ["cat", "dog"])


def test_a_network_of_all_of_imagenet_s_classes_sees_its_labels_in_some_of_them(shared_args, tmp_path):
    for names, labels in ((("n01443537", "n15075141"), [1, 999]), (("cat", "dog"), [0, 1])):
        args = named(shared_args, "IMNET", images_in(tmp_path / names[0], *names))
        images = datasets.load_images(args, train=True)
        datasets.fit_classes(images, 1000)
        assert [label for _, label in images] == labels
        (batch,) = datasets.test_loader(tiny_vit(num_classes=1000), args)
        assert batch[1].tolist() == labels
        images = datasets.load_images(args, train=True)
        datasets.fit_classes(images, 2)
        assert [label for _, label in images] == [0, 1], "a classifier of their own"


def test_a_folder_of_the_paper_s_code_is_understood(tmp_path):
    for name in ("model.safetensors", "reparamed_proxySize=1024.pth", "checkpoint.pth", "checkpoint_9.pth"):
        (tmp_path / name).touch()
        assert newest_checkpoint(tmp_path) == tmp_path / name


def training_args(args, **changes):
    defaults = {
        "scale": (0.3, 1.0), "hflip": 0.5, "color_jitter": 0.3, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25,
        "repeated_aug": True,
    }  # fmt: skip
    return Namespace(**{**vars(args), **defaults, **changes})


def test_augmentation_depends_on_seed_epoch_and_position_alone(shared_args):
    args, model = training_args(shared_args), tiny_vit(img_size=48)
    images = datasets.load_images(args, train=True)

    def epoch(number, **changes):
        changed = Namespace(**{**vars(args), **changes})
        loader = datasets.train_loader(images, model, changed)
        loader.sampler.set_epoch(number)
        return next(iter(loader))[0]

    first = epoch(0)
    assert torch.equal(first, epoch(0))
    assert torch.equal(first, epoch(0, num_workers=2))
    assert not torch.equal(first, epoch(1)) and not torch.equal(first, epoch(0, seed=1))


@pytest.mark.parametrize("policy", ["v0", "original", "rand-m10-inc1", "augmix-m10-w3", "3a"])
def test_every_policy_that_is_accepted_runs(policy, shared_args):
    """Posterise to 0 bits, which recent versions of Pillow refuse, comes up in most of them."""
    transform = datasets.train_transform(
        training_args(shared_args, aa=policy), datasets.data_config(ModelSpec("vit_digits", 10, 48).build())
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    for _ in range(60):
        assert transform(image).shape == (3, 48, 48)


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("kind", ["deit", "bare", "safetensors", "ddp", "compiled", "half"])
def test_weight_files_of_every_kind_load(kind, tmp_path):
    spec = ModelSpec("vit_digits", 10)
    source = spec.build().eval()
    state, path = source.state_dict(), tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "ddp":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    elif kind == "compiled":
        torch.save({"model": {f"module._orig_mod.{name}": value for name, value in state.items()}}, path)
    elif kind == "half":
        source.half().float()
        torch.save({name: value.half() for name, value in state.items()}, path)
    else:
        torch.save({"model": state} if kind == "deit" else state, path)
    model, remarks = load_pretrained(spec, path)
    images = random_images(2)
    assert torch.equal(model.eval()(images), source(images)) and not remarks


def test_older_names_and_other_sizes_are_read_as_timm_reads_them():
    """DeiT III as it was published; FlexiViT, which timm resamples otherwise than other ViTs."""
    state, other = FAMILIES["DeiT-III"].build().state_dict(), FAMILIES["DeiT-III"].build()
    torch.nn.init.zeros_(other.blocks[0].ls1.gamma)
    load_weights(other, {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in state.items()}, "file")
    assert torch.equal(other.blocks[0].ls1.gamma, state["blocks.0.ls1.gamma"])
    published, larger = (timm.create_model("flexivit_small", img_size=size, **PLAIN) for size in (240, 288))
    how = {"interpolation": "bilinear", "antialias": False}
    expected = timm.models.vision_transformer.checkpoint_filter_fn(published.state_dict(), larger, **how)
    load_weights(larger, published.state_dict(), "file")
    assert torch.equal(larger.pos_embed, expected["pos_embed"])


ODD = [
    {}, {"model": {}}, {"model": {1: torch.zeros(1)}}, {"model": {"a": 5}}, {"state_dict": "x"},
    {"model": {"a": torch.zeros(1)}, "model_ema": [1]}, {"model": {"a": torch.zeros(1)}, "model_ema": {"a": None}},
]  # fmt: skip


@pytest.mark.parametrize("content", ODD, ids=str)
def test_what_is_no_state_dict_is_refused_wherever_it_stands(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no state dict found"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("state", [
    {"pos_embed": torch.zeros(3)}, {"patch_embed.proj.weight": torch.zeros(5)}, {"head.weight": torch.tensor(1.0)},
    {"visual.class_embedding": torch.zeros(2)}, {"encoder": torch.zeros(2)}, {"mask_token": torch.zeros(1)},
], ids=lambda state: next(iter(state)))  # fmt: skip
def test_tensors_of_another_kind_of_network_are_refused(state):
    """Names that timm takes for those of CLIP, DINOv2 or others, and shapes that it cannot resample."""
    with pytest.raises(InputError, match=r"w\.pth: does not fit the model"):
        load_weights(tiny_vit(), state, "w.pth", replace_head=True)


def flipped_everywhere(path, step):
    """The file at ``path`` with one bit changed, again and again, at every ``step``-th byte."""
    content = path.read_bytes()
    for position in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        yield position


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bit_that_changed_is_noticed_or_changes_nothing(suffix, tmp_path):
    """Of torch.save's archives; safetensors has no checksums, so that there only the description is safe."""
    state, path = {"a": torch.arange(300.0), "b": torch.ones(2, 3)}, tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state, "epoch": 7}, path)
    refused = changed = 0
    for _ in flipped_everywhere(path, 7):
        try:
            found = read_checkpoint(path)["model"]
        except InputError:
            refused += 1
            continue
        same = found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
        changed += not same
    assert refused > 10 and (not changed if suffix == ".pth" else changed > 20)


def test_a_checksum_in_safetensors_finds_a_bit_anywhere_in_the_tensors(tmp_path):
    state, path = {"a": torch.arange(300.0), "b": torch.ones(2, 3, dtype=torch.float16)}, tmp_path / "w.safetensors"
    path.write_bytes(as_safetensors(state))
    for _ in flipped_everywhere(path, 3):
        with contextlib.suppress(InputError):
            found = read_checkpoint(path)["model"]
            assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_hub_that_does_not_answer_is_asked_once_and_its_cache_is_used(tmp_path, monkeypatch):
    hub, asked, spec = pretrained.hub, [], ModelSpec("vit_tiny", 1000)

    def answer(url, timeout):
        asked.append((url, timeout))
        if len(asked) < 3:
            raise OSError("Name or service not known")

    monkeypatch.setattr(pretrained, "get_session", lambda: Namespace(head=answer))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("the hub's client retries"))
    with pytest.raises(ModelError, match=r"could not be downloaded .*; fetch 'timm/deit_tiny_patch16_224.fb_in1k'"):
        load_pretrained(spec)
    folder, state = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k", spec.build().state_dict()
    for place in ("refs", "snapshots/0123"):
        (folder / place).mkdir(parents=True)
    (folder / "refs/main").write_text("0123")
    save_file(state, folder / "snapshots/0123/model.safetensors")
    model, remarks = load_pretrained(spec)
    assert torch.equal(model.pos_embed, state["pos_embed"]) and not remarks
    with pretrained.downloading("vit_tiny"):
        assert not hub.HF_HUB_OFFLINE, "a hub that answers is not offline"
    assert asked == [(hub.ENDPOINT, 5)] * 3 and not hub.HF_HUB_OFFLINE


def test_an_archive_without_checksums_is_read(tmp_path):
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(computes)
    assert torch.equal(read_checkpoint(tmp_path / "w.pth")["model"]["a"], torch.ones(3))
