"""Sliced == extracted == zero-masked, stock modules only, and the full width is timm's own network."""

import copy

import pytest
import timm
import torch
from conftest import TINY_WIDTHS, random_images, tiny_supernet, tiny_vit

from models import peel
from models.supernet import as_supernet, full_widths, set_widths
from models.width_table import Widths
from utils import InputError


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_full_width_is_bit_for_bit_timms(name, fused):
    timm.layers.set_fused_attn(fused)
    try:
        torch.manual_seed(0)
        stock = timm.create_model(name, img_size=32, num_classes=5, depth=2).eval()
    finally:
        timm.layers.set_fused_attn(True)
    supernet = as_supernet(copy.deepcopy(stock))
    assert supernet.state_dict().keys() == stock.state_dict().keys()
    supernet.load_state_dict(stock.state_dict(), strict=True)
    images = random_images(3, size=32)
    assert torch.equal(supernet(images), stock(images))


def masked(supernet, widths):
    """The full-width network with the weights of all that is dropped set to zero."""
    model = copy.deepcopy(supernet)
    set_widths(model, full_widths(model))
    with torch.no_grad():
        for block, attn, mlp in zip(model.blocks, widths.attn, widths.mlp, strict=True):
            heads, width = block.num_heads, block.attn.qkv.width
            block.attn.qkv.weight.view(3 * heads, width, -1)[:, attn:] = 0
            block.attn.qkv.bias.view(3 * heads, width)[:, attn:] = 0
            block.attn.proj.weight.view(-1, heads, width)[:, :, attn:] = 0
            block.mlp.fc2.weight[:, mlp:] = 0
            if attn == 0:
                block.attn.proj.bias.zero_()
            if mlp == 0:
                block.mlp.fc2.bias.zero_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("widths", TINY_WIDTHS)
def test_sliced_equals_extracted_equals_masked(widths):
    supernet = tiny_supernet().double()
    images = random_images(4, dtype=torch.float64)
    set_widths(supernet, widths)
    sliced = supernet(images)
    extracted = peel.extract(supernet, widths)(images)
    assert torch.allclose(sliced, extracted, rtol=0, atol=1e-12)
    assert torch.allclose(sliced, masked(supernet, widths)(images), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("widths", TINY_WIDTHS)
def test_extracted_networks_consist_of_stock_modules_alone(widths):
    supernet = tiny_supernet()
    before = copy.deepcopy(supernet.state_dict())
    network = peel.extract(supernet, widths)
    for module in network.modules():
        assert type(module).__module__.startswith(("timm.", "torch.nn.")), type(module)
    for parameter in network.parameters():
        parameter.fill_(7)
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items()), "shares weights"


def test_gradients_of_a_sliced_network_reach_the_kept_prefix_alone():
    supernet = tiny_supernet()
    set_widths(supernet, Widths((4, 0, 16), (192, 12, 0)))
    supernet(random_images(2)).square().sum().backward()
    gradient = supernet.blocks[0].attn.qkv.whole("weight").grad.view(9, 16, 48)
    assert gradient[:, :4].abs().sum() > 0 and gradient[:, 4:].abs().sum() == 0
    assert supernet.blocks[1].attn.qkv.whole("weight").grad is None
    assert supernet.blocks[1].mlp.fc2.whole("weight").grad[:, 12:].abs().sum() == 0
    assert supernet.blocks[2].mlp.fc1.whole("weight").grad is None


def test_peeled_description_round_trip():
    from models.vit import ModelSpec

    spec, widths = ModelSpec("vit_digits", 10), Widths((16, 8, 0, 0), (256, 0, 8, 0))
    network = peel.extract(as_supernet(spec.build()), widths)
    content = {"peeled": peel.describe(spec, widths), "model": network.state_dict()}
    again, spec_again, widths_again = peel.load_peeled(content, "a test")
    images = random_images(2)
    assert (spec_again, widths_again) == (spec, widths)
    assert torch.equal(network(images), again.eval()(images))


def test_widths_that_do_not_fit_are_refused():
    supernet = tiny_supernet()
    for widths in (Widths((16, 16), (192, 192)), Widths((17, 16, 16), (192,) * 3), Widths((-1, 16, 16), (192,) * 3)):
        with pytest.raises(ValueError, match="widths"):
            set_widths(supernet, widths)


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


def test_attention_that_goes_as_a_whole_has_no_width_in_between():
    supernet = as_supernet(tiny_vit(scale_attn_norm=True))
    set_widths(supernet, Widths((16, 0, 16), (192, 7, 0)))
    with pytest.raises(ValueError, match="widths"):
        set_widths(supernet, Widths((8, 16, 16), (192,) * 3))
