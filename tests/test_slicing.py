"""Sliced == extracted == zero-masked, stock modules only, and a super-network that behaves like any other module."""

import copy
import io
import pickle

import pytest
import timm
import torch
from conftest import TINY_WIDTHS, random_images, tiny_supernet, tiny_vit
from families import FAMILIES, PLAIN, Family

from models.subnet.extract import extract
from models.vit.supernet import as_supernet, at_widths, compile_branches, current_widths, full_widths, set_widths
from models.vit.widths import Widths
from utils import InputError


def masked(supernet, widths):
    """The full-width network with the weights of all that is dropped set to zero."""
    model = copy.deepcopy(supernet)
    set_widths(model, full_widths(model))
    for block, attn, mlp in zip(model.blocks, widths.attn, widths.mlp, strict=True):
        block.attn.qkv.weight.view(9, 16, -1)[:, attn:] = 0
        block.attn.qkv.bias.view(9, 16)[:, attn:] = 0
        block.attn.proj.weight.view(-1, 3, 16)[:, :, attn:] = 0
        block.mlp.fc2.weight[:, mlp:] = 0
        block.attn.proj.bias *= attn > 0
        block.mlp.fc2.bias *= mlp > 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("widths", TINY_WIDTHS)
def test_sliced_equals_masked_equals_extracted_of_own_weights(widths):
    supernet, images = tiny_supernet().double(), random_images(4, dtype=torch.float64)
    with at_widths(supernet, widths):
        sliced = supernet(images)
    before, subnet = copy.deepcopy(supernet.state_dict()), extract(supernet, widths)
    assert torch.allclose(sliced, subnet(images), rtol=0, atol=1e-12)
    assert torch.allclose(sliced, masked(supernet, widths)(images), rtol=0, atol=1e-10)
    for parameter in subnet.parameters():
        parameter.fill_(7)
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items()), "shares weights"


def test_gradients_of_a_sliced_network_reach_the_kept_prefix_alone():
    supernet = tiny_supernet()
    set_widths(supernet, Widths((4, 0, 16), (192, 12, 0)))
    supernet(random_images(2)).square().sum().backward()
    first, second, third = supernet.blocks
    gradient = first.attn.qkv.weight.grad.view(9, 16, 48)
    assert gradient[:, :4].abs().sum() > 0 and gradient[:, 4:].abs().sum() == 0
    assert second.attn.qkv.weight.grad is None and third.mlp.fc1.weight.grad is None
    assert second.mlp.fc2.weight.grad[:, 12:].abs().sum() == 0


def test_widths_that_do_not_fit_are_refused():
    normed = as_supernet(tiny_vit(scale_attn_norm=True))
    set_widths(normed, Widths((16, 0, 16), (192, 7, 0)))
    for supernet, attn in (
        (tiny_supernet(), (16, 16)), (tiny_supernet(), (17, 16, 16)), (tiny_supernet(), (-1, 16, 16)),
        (normed, (8, 16, 16)),  # attention that can only be kept as a whole
    ):  # fmt: skip
        before = current_widths(supernet)
        with pytest.raises(ValueError, match="widths"):
            set_widths(supernet, Widths(attn, (192,) * len(attn)))
        assert current_widths(supernet) == before


@pytest.mark.parametrize(
    ("name", "named"),
    [("resnet18", "ResNet"), ("vit_base_patch16_xp_224", "ParallelScalingBlock"), ("crossvit_tiny_240", "CrossVit"),
     ("vitamin_small_224", "GeGluMlp")],
)  # fmt: skip
def test_models_that_cannot_be_cut_are_refused_by_what_they_have(name, named):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(InputError, match=f"{named}.*supported are timm's VisionTransformer"):
        as_supernet(model)


# ------------------------------------------------------------------------------------------ like any other module


@pytest.fixture(params=["DeiT", "BEiT"])
def cut(request):
    """(super-network with a branch of two blocks off, its widths): of plain blocks, and of blocks with gamma_1."""
    family = FAMILIES[request.param]
    supernet, widths = as_supernet(family.build()), Widths((4 if family.heads else 16, 0, 16), (4, 192, 0))
    set_widths(supernet, widths)
    return supernet, widths


@torch.no_grad()
def test_a_super_network_is_pickled_copied_and_printed_at_its_widths(cut):
    (supernet, widths), images, file = cut, random_images(2, size=32), io.BytesIO()
    torch.save(supernet, file)
    file.seek(0)
    sliced, full = supernet(images), full_widths(supernet)
    with at_widths(supernet, full):
        whole = supernet(images)
    pickled, saved = pickle.loads(pickle.dumps(supernet)), torch.load(file, weights_only=False)
    for again in (pickled, saved, copy.deepcopy(supernet)):
        assert current_widths(again) == widths and torch.equal(again(images), sliced)
        set_widths(again, full)
        assert torch.equal(again(images), whole) and current_widths(supernet) == widths
    assert "kept=4 of 192" in str(supernet) and "off)" in str(supernet)
    assert ("kept=4 of 16)" in str(supernet)) == (widths.attn[0] == 4)


def test_a_compiled_super_network_follows_its_widths(cut):
    (supernet, widths), images = cut, random_images(2, size=32)
    compiled = torch.compile(supernet, backend="aot_eager", fullgraph=True)
    for now in (widths, full_widths(supernet), Widths((16,) * 3, (96, 12, 192))):
        set_widths(supernet, now)
        assert torch.equal(compiled(images), supernet(images))


def test_a_copy_of_a_compiled_super_network_has_widths_of_its_own(cut):
    (supernet, widths), images = cut, random_images(2, size=32)
    compile_branches(supernet, "eager")
    copied = copy.deepcopy(supernet)
    set_widths(supernet, full_widths(supernet))
    stock = extract(copied, widths)
    assert torch.allclose(copied(images), stock(images), atol=1e-5) and current_widths(copied) == widths
    assert not any(module._compiled_call_impl for module in stock.modules()), "it would run the original's modules"


@pytest.mark.skipif(not timm.is_model("vit_base_patch16_sapiens2"), reason="this timm has no Sapiens2")
def test_a_block_may_scale_its_attention_alone():
    model = Family("vit_base_patch16_sapiens2", PLAIN | {"num_kv_heads": 3}).build()
    images, supernet = random_images(2, size=32), as_supernet(copy.deepcopy(model))
    assert model.blocks[0].gamma_2 is None and torch.equal(supernet(images), model(images))
    set_widths(supernet, Widths((0, 16, 16), (96, 0, 192)))
    assert torch.allclose(extract(supernet, current_widths(supernet))(images), supernet(images), atol=1e-5)


def test_widths_are_put_back_after_an_exception(cut, monkeypatch):
    supernet, widths = cut
    with pytest.raises(ZeroDivisionError), at_widths(supernet, full_widths(supernet)):
        raise ZeroDivisionError
    assert current_widths(supernet) == widths
    monkeypatch.setattr("models.subnet.extract.narrow", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract(supernet, full_widths(supernet))
    assert current_widths(supernet) == widths
