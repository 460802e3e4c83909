"""Data sets by DeiT's names, their transforms, and loaders whose randomness does not depend on ranks or workers."""

import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler, Subset
from torchvision import datasets as tv
from torchvision import transforms as T

import utils
from utils import InputError

IMAGENET_LAYOUT = """expected
  {root}/train/n01440764/*.JPEG  ... one folder for each class
  {root}/val/n01440764/*.JPEG    ... the same folders"""


# ------------------------------------------------------------------------------------------ data sets


class ArrayDataset(Dataset):
    """Grey images [N, h, w] uint8 and labels [N], given out as (RGB PIL image, int)."""

    def __init__(self, images, labels, classes):
        self.images, self.labels, self.num_classes = images, labels, classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def _digits(root, train):
    """scikit-learn's 1,797 digits of 8 x 8 pixels; two thirds train, one third test, split once and for all."""
    from sklearn.datasets import load_digits  # a second to import, needed for this data set only

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = order[:1198] if train else order[1198:]
    return ArrayDataset((digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen], 10)


def _fashion_mnist(root, train):
    """Fashion-MNIST from gzipped IDX files in ``root``, as Debian's dataset-fashion-mnist, or torchvision's."""
    stem = "train" if train else "t10k"
    files = [Path(root) / f"{stem}-images-idx3-ubyte.gz", Path(root) / f"{stem}-labels-idx1-ubyte.gz"]
    if all(file.is_file() for file in files):
        return ArrayDataset(_idx(files[0]), _idx(files[1]), 10)
    return _torchvision(
        lambda: tv.FashionMNIST(root, train=train),
        f"{root}: no Fashion-MNIST; expected {files[0].name} and {files[1].name}, or torchvision's FashionMNIST/raw/",
    )


def _idx(path):
    """One gzipped IDX file of unsigned bytes as an array. Raises InputError if it is damaged."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a gzipped IDX file ({error})") from None


def _imagenet(root, train):
    folder = Path(root) / ("train" if train else "val")
    return _torchvision(
        lambda: tv.ImageFolder(folder), f"{folder}: no class folders with images; " + IMAGENET_LAYOUT.format(root=root)
    )


def _torchvision(make, complaint):
    try:
        return make()
    except (FileNotFoundError, RuntimeError) as error:
        raise InputError(f"{complaint} ({str(error).splitlines()[0]})") from None


def _from_torchvision(cls, classes, folder, split_of):
    """A loader for a torchvision data set that lies under ``root`` as torchvision's own download leaves it."""

    def load(root, train):
        dataset = _torchvision(
            lambda: cls(root, **split_of(train)), f"{root}: no {cls.__name__}; expected {Path(root) / folder} in it"
        )
        dataset.num_classes = classes
        return dataset

    return load


def _cub(root, train):
    """CUB-200-2011 as it is unpacked: class folders below images/, its own split in train_test_split.txt."""
    folder = Path(root) / "CUB_200_2011"
    try:
        names, splits = (
            dict(line.split() for line in (folder / file).read_text().splitlines())
            for file in ("images.txt", "train_test_split.txt")
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{root}: no CUB-200-2011; expected {folder}/images.txt and beside it ({error})") from None
    wanted = {str(folder / "images" / name) for key, name in names.items() if (splits.get(key) == "1") == train}
    return _torchvision(
        lambda: tv.ImageFolder(folder / "images", is_valid_file=wanted.__contains__),
        f"{folder}/images: not all class folders have images that train_test_split.txt names",
    )


class _INaturalist(Dataset):
    """One split of iNaturalist from its annotations, as in DeiT: (RGB PIL image, category)."""

    def __init__(self, root, train, year):
        content = json.loads((Path(root) / f"{'train' if train else 'val'}{year}.json").read_text())
        files = {image["id"]: Path(root) / image["file_name"] for image in content["images"]}
        self.num_classes = len(content["categories"])
        self.items = [(files[each["image_id"]], each["category_id"]) for each in content["annotations"]]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        return Image.open(path).convert("RGB"), label


def _inaturalist(year):
    def load(root, train):
        try:
            return _INaturalist(root, train, year)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{root}: no iNaturalist {year}; expected train{year}.json and val{year}.json, which name the images "
                f"({type(error).__name__}: {error})"
            ) from None

    return load


DATA_SETS = {
    "IMNET": _imagenet,
    "CIFAR10": _from_torchvision(tv.CIFAR10, 10, "cifar-10-batches-py/", lambda train: {"train": train}),
    "CIFAR": _from_torchvision(tv.CIFAR100, 100, "cifar-100-python/", lambda train: {"train": train}),
    "FLOWERS": _from_torchvision(
        tv.Flowers102, 102, "flowers-102/", lambda train: {"split": "train" if train else "test"}
    ),
    "CARS": _from_torchvision(
        tv.StanfordCars, 196, "stanford_cars/", lambda train: {"split": "train" if train else "test"}
    ),
    "CUB": _cub,
    "INAT": _inaturalist(2018),
    "INAT19": _inaturalist(2019),
    "FOOD": _from_torchvision(tv.Food101, 101, "food-101/", lambda train: {"split": "train" if train else "test"}),
    "DIGITS": _digits,
    "FASHION_MNIST": _fashion_mnist,
}


def load_images(args, train):
    """The images of ``args.data_set`` below ``args.data_path``, untransformed. Raises InputError if they are absent."""
    if args.data_set in DATA_SETS:
        return DATA_SETS[args.data_set](args.data_path, train)
    try:
        return create_dataset(args.data_set, root=args.data_path, split="train" if train else "validation")
    except Exception as error:  # timm's readers raise whatever their back ends do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--data_set {args.data_set} at {args.data_path}: neither one of {', '.join(DATA_SETS)} nor a data set "
            f"that timm's create_dataset can open ({reason})"
        ) from None


def count_classes(dataset):
    """The number of classes of a data set, or None if it does not say."""
    if hasattr(dataset, "num_classes"):
        return dataset.num_classes
    names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return len(names) if names else None


# ------------------------------------------------------------------------------------------ transforms


def train_transform(args, config):
    """DeiT's augmentation through timm; ``config`` has the model's img_size, mean and std."""
    size = config["img_size"]
    transform = create_transform(
        input_size=size,
        is_training=True,
        scale=tuple(args.scale),
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa or None,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=config["mean"],
        std=config["std"],
    )
    if size <= 32:
        # As in DeiT: images this small are shifted, not cropped to a fraction of their area.
        shift = T.Compose([T.Resize((size, size), T.InterpolationMode.BICUBIC), T.RandomCrop(size, padding=size // 8)])
        transform.transforms[0] = shift
    for policy in transform.transforms:
        if isinstance(policy, RandAugment):
            for op in policy.ops:
                op.aug_fn = _posterize if op.aug_fn is posterize else op.aug_fn
    return transform


def _posterize(image, bits, **_):
    """DeiT's policy asks for 0 bits at its largest magnitude, which recent versions of Pillow refuse: keep one."""
    return posterize(image, max(bits, 1))


def eval_transform(args, config):
    """DeiT's evaluation transform: resize by 1 / crop ratio, crop the centre; small images are resized alone."""
    size = config["img_size"]
    resize = [T.Resize((size, size), T.InterpolationMode.BICUBIC)]
    if size > 32:
        resize = [T.Resize(int(size / args.eval_crop_ratio), T.InterpolationMode.BICUBIC), T.CenterCrop(size)]
    return T.Compose([*resize, T.ToTensor(), T.Normalize(config["mean"], config["std"])])


def data_config(model):
    """Image size, mean and std of a timm model, for the transforms."""
    cfg, embedding = model.pretrained_cfg, getattr(model, "patch_embed", None)
    size = embedding.img_size[0] if hasattr(embedding, "img_size") else cfg["input_size"][-1]
    return {"img_size": size, "mean": cfg["mean"], "std": cfg["std"]}


def between_models(student, teacher):
    """The transform of a batch [B, 3, h, w] made for the timm model ``student`` into one for ``teacher``."""
    own, other = data_config(student), data_config(teacher)
    mean = [(m - n) / s for m, n, s in zip(other["mean"], own["mean"], own["std"], strict=True)]
    std = [s / t for s, t in zip(other["std"], own["std"], strict=True)]
    steps = [T.Resize((other["img_size"],) * 2, T.InterpolationMode.BICUBIC)] * (own["img_size"] != other["img_size"])
    return T.Compose(
        [*steps, T.Normalize(mean, std)] if (own["mean"], own["std"]) != (other["mean"], other["std"]) else steps
    )


# ------------------------------------------------------------------------------------------ loaders


class TransformedDataset(Dataset):
    """(transformed image, label, index). An item asked for as (index, key) first seeds this process's randomness
    from the key, so that an image's augmentation depends on nothing but the key."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, key = item if isinstance(item, tuple) else (item, None)
        if key is not None:
            random.seed(key)
            np.random.seed(key % 2**32)
            torch.default_generator.manual_seed(key)
        image, label = self.images[index]
        return self.transform(image.convert("RGB")), label, index


class KeyedSampler:
    """Gives (index, key) for each index of a DistributedSampler-like ``base``; the key is made of the seed, the epoch
    and the position in the epoch's global order, so it is the same whatever the number of ranks and workers."""

    def __init__(self, base, seed):
        self.base, self.seed, self.epoch, self.done = base, seed, 0, 0

    def set_epoch(self, epoch, done=0):
        """Go through ``epoch`` next, without its first ``done`` images: those a resumed run has seen."""
        self.epoch, self.done = epoch, done
        self.base.set_epoch(epoch)

    def __len__(self):
        return len(self.base)

    def __iter__(self):
        for position, index in itertools.islice(enumerate(self.base), self.done, None):
            yield index, utils.key(self.seed, self.epoch, position * utils.world_size() + utils.rank())


def train_loader(images, transform, args):
    """Shuffled full batches of ``args.batch_size`` images per rank. Raises InputError if there is none."""
    place = {"num_replicas": utils.world_size(), "rank": utils.rank()}
    if args.repeated_aug:
        base = RepeatAugSampler(images, num_repeats=3, **place)
    else:
        base = DistributedSampler(images, shuffle=True, seed=args.seed, **place)
    if len(base) < args.batch_size:
        raise InputError(f"--batch_size {args.batch_size} is more than the {len(base)} training images of one rank")
    return _loader(
        TransformedDataset(images, transform), args, sampler=KeyedSampler(base, args.seed), drop_last=True,
        persistent_workers=args.num_workers > 0,
    )  # fmt: skip


def eval_loader(images, transform, args):
    """This rank's share of ``images`` in order, every image exactly once over all ranks."""
    share = Subset(images, range(utils.rank(), len(images), utils.world_size()))
    dataset = TransformedDataset(share, transform)
    return _loader(dataset, args, sampler=SequentialSampler(dataset), drop_last=False)


def proxy_loader(images, transform, args, count):
    """The proxy set: ``count`` training images chosen by the seed, sharded over ranks.

    Batches are (images, labels, positions in the data set). Raises InputError if there are too few images.
    """
    if count > len(images):
        raise InputError(f"{count} proxy images asked for, the training set has {len(images)}")
    order = torch.randperm(len(images), generator=utils.keyed_generator(args.seed))[:count]
    dataset = TransformedDataset(images, transform)
    return _loader(dataset, args, sampler=order[utils.rank() :: utils.world_size()].tolist(), drop_last=False)


def _loader(dataset, args, **kwargs):
    pin = args.pin_mem and args.device != "cpu"
    return DataLoader(
        dataset, batch_size=args.batch_size, num_workers=args.num_workers, pin_memory=pin,
        worker_init_fn=utils.restore_signals, **kwargs,
    )  # fmt: skip


def make_mixup(args, classes):
    """timm's Mixup as the flags ask for it, or None."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )
