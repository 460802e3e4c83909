import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
# Nothing is downloaded, and nothing that was downloaded before is found: the same everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), "skd_tests_without_a_hub")

import utils
from models.supernet import as_supernet
from models.vit import ModelSpec
from models.width_table import Widths

ROOT = Path(__file__).parents[1]
# One thread each: the networks are tiny, and tests may run beside each other.
torch.set_num_threads(1)

# Small enough for a test, large enough that no two of the sizes T, D, H, d, M, L are equal.
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def tiny_vit(seed=0, **kwargs):
    """A random stock ViT in eval mode: D 48, H 3, d 16, M 192, L 3, T 17; biases are random too."""
    import timm

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
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def proxy_batches(count=24, batch=8, classes=7, dtype=torch.float32):
    """(images, labels, positions) batches like a proxy loader's."""
    images = random_images(count, seed=5, dtype=dtype)
    labels = torch.arange(count) % classes
    positions = torch.arange(count)
    return list(zip(images.split(batch), labels.split(batch), positions.split(batch), strict=True))


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
        eval_crop_ratio=0.875, proxy_samples=16, amp="none", skip_bad_images=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Random starting weights: what a run learns does not matter here."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    utils.seed_all(3)
    torch.save(ModelSpec("vit_digits", 10).build().state_dict(), path)
    return path
