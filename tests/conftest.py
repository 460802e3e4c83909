import os
import sys
import tempfile
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
# Nothing is downloaded, and nothing that was downloaded before is found: the same everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), "skd_tests_without_a_hub")

import utils
from models.vit.pretrained import ModelSpec
from models.vit.supernet import as_supernet
from models.vit.widths import Widths
from models.wpac.compensation import compensation_of
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES, collect_statistics

ROOT = Path(__file__).parents[1]
# Files whose tests start whole stages. They go first, so that they do not keep one process busy while others are done.
LONGEST = ("test_stages.py", "test_resume.py", "test_ranks.py", "test_scripts.py", "test_bad_input.py")
# One thread each: the networks are tiny, and tests may run beside each other.
torch.set_num_threads(1)

# Small enough for a test, large enough that no two of the sizes T, D, H, d, M, L are equal.
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def tiny_vit(seed=0, **kwargs):
    """A random stock ViT in eval mode: D 48, H 3, d 16, M 192, L 3, T 17; biases are random too."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny_supernet(seed=0, **kwargs):
    return as_supernet(tiny_vit(seed, **kwargs))


def random_images(count, seed=1, size=16, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def images_in(root, *names):
    """An image folder with one image in each class."""
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("L", (9, 9)).save(root / split / name / "0.png")
    return root


def proxy_batches(count=24, batch=8, size=16, dtype=torch.float32):
    """(images, labels, positions) batches like a proxy loader's, of 7 classes."""
    images, positions = random_images(count, 5, size, dtype), torch.arange(count)
    columns = (images, positions % 7, positions)
    return list(zip(*(column.split(batch) for column in columns), strict=True))


def measured(supernet, objective="label", batches=None, **kwargs):
    """The statistics of a super-network (default: on ``proxy_batches``)."""
    batches = proxy_batches(dtype=next(supernet.parameters()).dtype) if batches is None else batches
    with torch.enable_grad():
        return collect_statistics(supernet, batches, OBJECTIVES[objective], **kwargs)


def rewritten(supernet, statistics, *how):
    """2L Compensation of a super-network that ``reparameterise`` rewrites, in place, from hidden statistics."""
    return compensation_of(supernet, statistics, reparameterise(supernet, statistics, *how))


def difference(first, second):
    """Largest difference of two tensors, relative to the largest entry of the first."""
    return ((first - second).abs().max() / first.abs().max()).item()


@contextmanager
def fused_attention(on):
    """Whether timm builds models with fused attention, which fvcore does not see into."""
    timm.layers.set_fused_attn(on)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(True)


def macs_by_fvcore(network, images):
    """fvcore's count for a network that was built without fused attention."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(network.eval(), images)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


# Many shapes of sub-network of the tiny ViT: uneven, narrow, branches gone, everything gone.
TINY_WIDTHS = [
    Widths((16, 16, 16), (192, 192, 192)),
    Widths((8, 8, 8), (96, 96, 96)),
    Widths((2, 14, 6), (6, 186, 60)),
    Widths((0, 16, 4), (192, 0, 12)),
    Widths((4, 0, 0), (0, 12, 0)),
    Widths((0, 0, 0), (0, 0, 0)),
]


@pytest.fixture
def shared_args(tmp_path):
    """What the data and engine functions read from a command line."""
    return Namespace(
        data_set="DIGITS", data_path=str(tmp_path), batch_size=8, num_workers=0, pin_mem=False, device="cpu", seed=0,
        eval_crop_ratio=None, proxy_samples=16, amp="none", skip_bad_images=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Random starting weights: what a run learns does not matter here."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    utils.seed_all(3)
    torch.save(ModelSpec("vit_digits", 10).build().state_dict(), path)
    return path
