"""Data sets by DeiT's names, transforms, and loaders whose randomness does not depend on ranks or workers."""

import gzip
import itertools
import math
import os
import random
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision import datasets as tv
from torchvision import transforms as T

import utils
from models.vit.pretrained import uncropped
from utils import InputError, first_line, nearest

# So many images in a row that cannot be read are no accident.
BAD_IN_A_ROW = 100
# No gzipped IDX file holds more bytes: a few kilobytes of gzip can become gigabytes.
MOST_BYTES = 2**30


# ------------------------------------------------------------------------------------------ data sets


class ArrayDataset(Dataset):
    """Grey images [N, h, w] uint8 and labels [N], returned as (RGB PIL image, int). Raises InputError, which names
    ``source``, if they do not belong together."""

    def __init__(self, images, labels, source, classes=10):
        if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) >= classes:
            raise InputError(
                f"{source}: images {images.shape} and labels {labels.shape} up to {labels.max(initial=0)}; expected as "
                f"many labels, below {classes}, as there are grey images"
            )
        self.images, self.labels, self.num_classes = images, labels, classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


class ListedDataset(Dataset):
    """(RGB PIL image, class) for each (path, class) of ``samples``."""

    def __init__(self, samples, classes):
        self.samples, self.num_classes = samples, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return open_image(path), label


def _digits(_root, train):
    """scikit-learn's 1,797 digits of 8 x 8 pixels; two thirds train, one third test, split once and for all."""
    from sklearn.datasets import load_digits  # a second to import, needed for this data set only

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = order[:1198] if train else order[1198:]
    return ArrayDataset((digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen], "DIGITS")


def _fashion_mnist(root, train):
    """Gzipped IDX files in ``root``, as of Debian's dataset-fashion-mnist, or torchvision's layout."""
    files = [root / f"{'train' if train else 't10k'}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
    if all(file.is_file() for file in files):
        return ArrayDataset(*map(_idx, files), files[0])
    return tv.FashionMNIST(root, train=train)


def _idx(path):
    """One gzipped IDX file of unsigned bytes as an array. Raises InputError if it is damaged."""
    try:
        with gzip.open(path) as file:
            dimensions = file.read(4)[3]
            sizes = np.frombuffer(file.read(4 * dimensions), ">i4", count=dimensions).tolist()
            if not 0 <= math.prod(sizes) <= MOST_BYTES:
                raise ValueError(f"{sizes} values")
            return np.frombuffer(file.read(math.prod(sizes) + 1), np.uint8).reshape(sizes)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a gzipped IDX file ({error})") from None


def _image_folder(root, train):
    """Folders of classes. Both splits must have the same ones: labels are their positions in alphabetical order."""
    names = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")  # all that timm's knows
    training, evaluation = (next((root / n for n in some if (root / n).is_dir()), root / some[0]) for some in names)
    folder = training if train else evaluation
    above = root.resolve().parent
    if root.resolve().name in ("train", "val") and not training.is_dir() and (above / "train").is_dir():
        raise InputError(f"{root}: one half of a data set; give the folder above, {above}")
    _refuse_loops(folder)
    dataset = tv.ImageFolder(folder, loader=open_image)
    expected = {e.name for e in os.scandir(training) if e.is_dir()} if training.is_dir() else {*dataset.classes}
    for name in sorted(expected ^ {*dataset.classes}) if not train else ():
        there, missing = (training, folder) if name in expected else (folder, training)
        raise InputError(
            f"{missing}: has no class folder '{name}', {there} has one; expected the same classes in both, "
            f"here are {len(dataset.classes)} for evaluation and {len(expected)} for training"
        )
    return dataset


def _refuse_loops(folder):
    """Raise InputError if a link below ``folder`` leads back up: its images would be listed again and again."""
    for place, names, _ in os.walk(folder, followlinks=True):
        for link in (Path(place, name) for name in names):
            if link.is_symlink() and link.resolve() in {above.resolve() for above in link.parents}:
                raise InputError(f"{link}: a link to a folder above it; remove it")


def _cub(root, train):
    """CUB-200-2011 as it is unpacked: class folders below images/, its own split in train_test_split.txt."""
    folder = root / "CUB_200_2011"
    texts = (utils.read_text(folder / name, DATA_SETS["CUB"][2]) for name in ("images.txt", "train_test_split.txt"))
    names, splits = (dict(line.split() for line in text.splitlines()) for text in texts)
    _refuse_loops(folder)
    wanted = {str(folder / "images" / name) for key, name in names.items() if (splits.get(key) == "1") == train}
    return tv.ImageFolder(folder / "images", is_valid_file=wanted.__contains__)


def _inaturalist(year, root, train):
    """iNaturalist from the annotations of its competition, as in DeiT."""
    path = root / f"{'train' if train else 'val'}{year}.json"
    content = utils.parse_json(utils.read_text(path, "expected the annotations of the competition"), path)
    files = {image["id"]: root / image["file_name"] for image in content["images"]}
    samples = [(files[each["image_id"]], each["category_id"]) for each in content["annotations"]]
    return ListedDataset(samples, len(content["categories"]))


def _by_split(cls, root, train):
    """A torchvision data set with a training and a test split."""
    return cls(root, split="train" if train else "test")


# name: (function (folder, whether to train) -> data set, number of classes unless the data set knows it, what is
# expected in the folder)
DATA_SETS = {
    "IMNET": (
        _image_folder,
        None,
        f"train/<class>/, a folder of images ({', '.join(tv.folder.IMG_EXTENSIONS)}) for each class, and val/<class>/",
    ),
    "CIFAR10": (lambda root, train: tv.CIFAR10(root, train=train), 10, "cifar-10-batches-py/"),
    "CIFAR": (lambda root, train: tv.CIFAR100(root, train=train), 100, "cifar-100-python/"),
    "FLOWERS": (partial(_by_split, tv.Flowers102), 102, "flowers-102/"),
    "CARS": (partial(_by_split, tv.StanfordCars), 196, "stanford_cars/"),
    "CUB": (_cub, None, "CUB_200_2011/ with images/, images.txt and train_test_split.txt"),
    "INAT": (partial(_inaturalist, 2018), None, "train2018.json and val2018.json, which name the images"),
    "INAT19": (partial(_inaturalist, 2019), None, "train2019.json and val2019.json, which name the images"),
    "FOOD": (partial(_by_split, tv.Food101), 101, "food-101/"),
    "DIGITS": (_digits, None, "nothing"),
    "FASHION_MNIST": (_fashion_mnist, 10, "its four *-ubyte.gz files, or torchvision's FashionMNIST/raw/"),
}


# The names of the paper's own code, in capitals, and timm's for folders, whose classes it numbers anew in each split.
OTHER_NAMES = {"FLOWERS102": "FLOWERS", "CUB200": "CUB", "CARS196": "CARS", "CIFAR100": "CIFAR", "FOOD101": "FOOD"}
OTHER_NAMES |= dict.fromkeys(("IMAGEFOLDER", "IMAGEFOLDER/", "TORCH/IMAGE_FOLDER", "TORCH/FOLDER"), "IMNET")


def load_images(args, train):
    """The images of ``args.data_set`` below ``args.data_path``, untransformed. Their member ``num_classes`` is None if
    the data set does not say it. Raises InputError if they are absent."""
    name = OTHER_NAMES.get(args.data_set.upper(), args.data_set.upper())
    load, classes, expected = DATA_SETS.get(name, (partial(_timms_data_set, args.data_set), None, "what timm reads"))
    try:
        dataset = load(Path(args.data_path), train)
    except InputError:
        raise
    except Exception as error:  # whatever is missing or damaged there, and whatever timm's readers make of it
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{args.data_path}: no {args.data_set}; expected {expected} ({reason})") from None
    if not len(dataset):
        raise InputError(f"{args.data_path}: no images for {'training' if train else 'evaluation'} in {args.data_set}")
    names = getattr(dataset, "classes", None)
    dataset.num_classes = classes or getattr(dataset, "num_classes", len(names) if names else None)
    return dataset


def _timms_data_set(name, root, train):
    """The data set of a name of timm's. Raises InputError for other names: timm itself takes each for a folder."""
    kind = name.partition("/")[0].lower()
    if kind == "hfds":
        raise InputError(
            f"--data-set {name}: timm cannot import Hugging Face's package 'datasets', since datasets.py here has its "
            "name; save the images in folders, and take ImageFolder"
        )
    if kind in ("tfds", "wds", "hfids"):
        raise InputError(f"--data-set {name}: a stream; supported are data sets with images by number")
    if kind != "torch":
        close = nearest(name.upper(), [*DATA_SETS, *OTHER_NAMES])
        raise InputError(
            f"--data-set {name}: neither one of {', '.join(DATA_SETS)} nor timm's ImageFolder or torch/...{close}"
        )
    _refuse_loops(root)
    return create_dataset(name, root=root, split="train" if train else "validation")


def class_names(dataset):
    """The names of a data set's classes in the order of its labels, or None if it does not say. torchvision's ImageNet
    has synonyms for them: its folders, the wnids, are taken."""
    return list(getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or []) or None


def relabel(images, classes, flag, names=None):
    """Give the images of a data set, in place, the labels that a classifier of ``classes`` classes has for them.

    names: of all classes, in the order of the classifier (default: ImageNet's wnids, if there are as many). Returns
    them. Raises InputError, which begins with ``flag``, if there are none, or not all of the data set's among them.
    """
    own, subset = class_names(images), infer_imagenet_subset({"num_classes": classes})
    names = names or (ImageNetInfo(subset).label_names() if subset else [])
    missing = sorted({*(own or ["?"])} - {*names})
    if len(names) != classes or missing:
        one = f", and none of these is '{missing[0]}'" if names and own and missing else ""
        raise InputError(
            f"{flag} has {images.num_classes} classes, the checkpoint {classes}{one}; if they are some of these, "
            "--class-map FILE says which: their folders' names, a line for each class of the checkpoint"
        )
    images.target_transform, images.num_classes = [names.index(name) for name in own].__getitem__, classes
    return names


def fit_classes(images, classes):
    """Give the images of a data set, in place, the labels that a network of ``classes`` classes has for them: their
    own, or ImageNet's if the data set has some of its classes, by name.

    Raises InputError if there are more labels than classes.
    """
    if not classes:
        raise InputError("--nb-classes is required: neither the weights nor the data set say how many there are")
    own = images.num_classes or 0
    if own > classes:
        raise InputError(f"--nb-classes {classes}: the network has {classes} classes, the data set {own}")
    subset = infer_imagenet_subset({"num_classes": classes})
    if 0 < own < classes and subset and {*(class_names(images) or "?")} <= {*ImageNetInfo(subset).label_names()}:
        relabel(images, classes, "--data-set")


# ------------------------------------------------------------------------------------------ images


def open_image(file):
    """The image of a path or binary file as an RGB PIL image; 16 bits are scaled to 8, which Pillow would clip."""
    with Image.open(file) as image:
        return as_rgb(image)


def as_rgb(image):
    """A PIL image of any mode as RGB."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.int64) // 256).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB Pillow warns, and does the same
    return image.convert("RGB")


def image_name(images, index):
    """The path of an image of a data set, or its number if the data set does not know the path."""
    if hasattr(images, "samples"):
        return str(images.samples[index][0])
    paths = getattr(images, "_image_files", None)  # torchvision's Flowers102 and Food101
    return str(paths[index]) if paths else f"image {index}"


# ------------------------------------------------------------------------------------------ transforms


def train_transform(args, config):
    """DeiT's augmentation through timm. config: of ``data_config``."""
    size = config["input_size"][1:]
    transform = create_transform(
        size, is_training=True, scale=tuple(args.scale), hflip=args.hflip, color_jitter=args.color_jitter,
        auto_augment=args.aa or None, interpolation=config["interpolation"], re_prob=args.reprob, re_mode="pixel",
        mean=config["mean"], std=config["std"],
    )  # fmt: skip
    if uncropped(*size):
        # As in DeiT: images this small are shifted, not cropped to a fraction of their area.
        interpolation = str_to_interp_mode(config["interpolation"])
        shift = T.Compose([T.Resize(size, interpolation), T.RandomCrop(size, padding=max(size) // 8)])
        transform.transforms[0] = shift
    return transform


def _posterize(image, bits, **_):
    """Policies of timm's, DeiT's among them, ask for 0 bits, which recent versions of Pillow refuse: keep one."""
    return posterize(image, max(bits, 1))


NAME_TO_OP.update({name: _posterize for name, op in NAME_TO_OP.items() if op is posterize})


def eval_transform(config):
    """timm's evaluation transform for a model's ``data_config``."""
    return create_transform(**config)


def data_config(model):
    """How timm makes the images of a model at evaluation, for the transforms: input_size (3, h, w), mean, std,
    interpolation, crop_pct and crop_mode. Images of up to 32 pixels are only resized."""
    config, embedding = resolve_data_config(model=model), getattr(model, "patch_embed", None)
    size = embedding.img_size if hasattr(embedding, "img_size") else config["input_size"][1:]
    return config | uncropped(*size) | {"input_size": (3, *size)}


def between_models(student, teacher):
    """The transform that turns a batch [B, 3, h, w] made for the timm model ``student`` into one for ``teacher``."""
    own, other = data_config(student), data_config(teacher)
    mean = [(m - n) / s for m, n, s in zip(other["mean"], own["mean"], own["std"], strict=True)]
    std = [s / t for s, t in zip(other["std"], own["std"], strict=True)]
    steps = []
    if own["input_size"] != other["input_size"]:
        steps.append(T.Resize(other["input_size"][1:], T.InterpolationMode.BICUBIC))
    if (own["mean"], own["std"]) != (other["mean"], other["std"]):
        steps.append(T.Normalize(mean, std))
    return T.Compose(steps)


# ------------------------------------------------------------------------------------------ loaders


class TransformedDataset(Dataset):
    """Items are (transformed image, label, index, [(name, what is wrong in words) of a bad image ...]).

    The index may be a pair (index, key). Then this process's randomness is seeded from the key first, so that the
    augmentation of an image depends on the key alone. replace: the next readable image takes the place of bad ones;
    without it, or after BAD_IN_A_ROW of them, image, label and index are None. Loader processes return bad images,
    because their errors would arrive as tracebacks.
    """

    def __init__(self, images, transform, replace=False):
        self.images, self.transform, self.attempts = images, transform, BAD_IN_A_ROW if replace else 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, key = item if isinstance(item, tuple) else (item, None)
        bad = []
        for _ in range(self.attempts):
            name = image_name(self.images, index)
            try:
                if os.path.exists(name) and not os.path.isfile(name):
                    raise ValueError("not a file")  # a pipe would be waited for
                image, label = self.images[index]
                image = as_rgb(image)
                break
            except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
                bad.append((name, f"{name}: not a readable image ({first_line(error)})"))
                index = (index + 1) % len(self.images)
        else:
            return None, None, None, bad
        if key is not None:
            random.seed(key)
            np.random.seed(key % 2**32)
            torch.default_generator.manual_seed(key)
        return self.transform(image), label, index, bad


def _collate(items):
    """((images, labels, indices) or None if no image could be read, bad images) of a batch of items."""
    good = [item[:3] for item in items if item[0] is not None]
    return default_collate(good) if good else None, [bad for item in items for bad in item[3]]


class ImageLoader:
    """Batches (images [B, 3, h, w], labels [B], indices [B]) of a TransformedDataset.

    A label beyond the classes, the model's if the data set does not say its own, is an InputError, and so is an image
    that cannot be read, with its path. With ``--skip-bad-images`` it is counted, and replaced by the next one that can
    be read if all batches must be of one size (``drop_last``), or else left out.
    title: with one, every pass shows a progress bar of this name, can be stopped by a signal, and ends by reporting bad
    images. All ranks make it together.
    """

    def __init__(self, images, model, transform, args, drop_last, title=None, **kwargs):
        self.skip, self.sampler, self.title = args.skip_bad_images, kwargs["sampler"], title
        self.bad, self.seen, self.reported = {}, 0, set()
        self.classes = getattr(images, "num_classes", None) or model.num_classes
        self.loader = DataLoader(
            TransformedDataset(images, transform, replace=drop_last and self.skip), batch_size=args.batch_size,
            num_workers=args.num_workers, pin_memory=args.pin_mem and args.device != "cpu", collate_fn=_collate,
            worker_init_fn=utils.ignore_signals, drop_last=drop_last, **kwargs,
        )  # fmt: skip

    def __len__(self):
        return len(self.loader)

    def _check_labels(self, batch):
        _, labels, indices = batch
        labels = labels.tolist() if isinstance(labels, torch.Tensor) else labels
        for label, index in zip(labels, indices.tolist(), strict=True):
            if not isinstance(label, int) or not 0 <= label < (self.classes or math.inf):
                name = image_name(self.loader.dataset.images, index)
                raise InputError(f"{name}: label {label} is none of the {self.classes or ''} classes")

    def _together(self):
        """The loader's batches. All ranks ask equally often whether to stop, though one may have a batch less."""
        images = self.loader.batch_size * utils.world_size()
        batches = iter(utils.progress(self.loader, self.title, images=images))
        for _ in range(max(utils.gather(len(self.loader)))):
            utils.stop_if_asked()
            yield from itertools.islice(batches, 1)
        yield from batches  # nothing is left, but the bar ends

    def __iter__(self):
        self.bad, self.seen = {}, 0
        for batch, bad in self._together() if self.title else self.loader:
            if bad and not self.skip:
                raise InputError(f"{bad[0][1]}; --skip-bad-images goes on without such images")
            self.bad |= dict(bad)
            self.seen += len(batch[1]) if batch else 0
            if self.loader.drop_last and (not batch or len(batch[1]) < self.loader.batch_size):
                raise InputError(f"{bad[-1][1]}, and so are {BAD_IN_A_ROW} in a row: too many to go on")
            if batch:
                self._check_labels(batch)
                yield batch
        if self.title:
            report_bad_images(self, self.title)


def report_bad_images(loader, title):
    """Print how many images could not be read in the last pass of all ranks over ``loader``, unless the last report
    named the same. To be called by all ranks. Raises InputError if no image could be read."""
    if not isinstance(loader, ImageLoader) or not loader.skip:
        return
    passes = utils.gather((loader.bad, loader.seen))
    bad = {name: words for found, _ in passes for name, words in found.items()}
    if bad and not any(seen for _, seen in passes):
        raise InputError(f"{title}: no image could be read, the first: {min(bad.items())[1]}")
    if bad and set(bad) != loader.reported:
        loader.reported = set(bad)
        names = ", ".join(sorted(bad)[:3]) + (", ..." if len(bad) > 3 else "")
        utils.print_once(f"{title}: {len(bad)} image(s) could not be read and were skipped: {names}")


class KeyedSampler:
    """Yields (index, key) for each index of a DistributedSampler ``base``. The key is made of the seed, the epoch and
    the position in the epoch's global order, so it does not depend on the number of ranks and workers."""

    def __init__(self, base, seed):
        self.base, self.seed, self.epoch, self.done = base, seed, 0, 0

    def set_epoch(self, epoch, done=0):
        """Go through ``epoch`` next, without its first ``done`` images, which a resumed run has seen."""
        self.epoch, self.done = epoch, done
        # From which alone it is shuffled. Seeds lie further apart than the epochs of a run and share no
        # order; those of seed 0 are as they always were.
        self.base.set_epoch(1_000_003 * self.seed + epoch)

    def __len__(self):
        return len(self.base)

    def __iter__(self):
        for position, index in itertools.islice(enumerate(self.base), self.done, None):
            yield index, utils.mixed_seed(self.seed, self.epoch, position * utils.world_size() + utils.rank())


def train_loader(images, model, args):
    """Shuffled full batches of ``args.batch_size`` images per rank, of ``model``'s size. Raises InputError if there is
    none."""
    place = {"num_replicas": utils.world_size(), "rank": utils.rank()}
    if args.repeated_aug:
        base = RepeatAugSampler(images, num_repeats=3, **place)
    else:
        base = DistributedSampler(images, shuffle=True, **place)
    if len(base) < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size} is more than the {len(base)} training images of one rank")
    sampler, stay = KeyedSampler(base, args.seed), args.num_workers > 0
    transform = train_transform(args, data_config(model))
    return ImageLoader(images, model, transform, args, drop_last=True, sampler=sampler, persistent_workers=stay)


def eval_loader(images, model, args):
    """This rank's share of ``images`` in order, every image exactly once over all ranks, of ``model``'s size."""
    share = range(utils.rank(), len(images), utils.world_size())
    transform = eval_transform(data_config(model))
    return ImageLoader(images, model, transform, args, drop_last=False, title="evaluate", sampler=share)


def test_loader(model, args):
    """``eval_loader`` of the test images of ``args.data_set``, with the labels that ``model`` has for them."""
    images = load_images(args, train=False)
    fit_classes(images, model.num_classes)
    return eval_loader(images, model, args)


def proxy_loader(images, model, args, flag):
    """The proxy set: training images chosen by the seed, sharded over ranks, of ``model``'s size.

    flag: the option that says how many, 'proxy_samples' or 'calibrate'. Batches are (images, labels, positions in the
    data set). Raises InputError if there are too few images.
    """
    count = utils.at_most(args, flag, len(images), f"the training set has {len(images)} images")
    order = torch.randperm(len(images), generator=utils.keyed_generator(args.seed))[:count]
    share = order[utils.rank() :: utils.world_size()].tolist()
    transform = eval_transform(data_config(model))
    return ImageLoader(images, model, transform, args, drop_last=False, title="proxy set", sampler=share)
