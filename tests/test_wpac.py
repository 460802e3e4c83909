"""Function preservation of both bases, closed forms of the solvers, statistics against a direct computation."""

import copy
import importlib
import operator
import re

import pytest
import torch
from conftest import ROOT, difference, measured, proxy_batches, random_images, tiny_supernet
from families import FAMILIES

from models.vit.supernet import as_supernet, branches, hooks, set_widths
from models.vit.widths import Widths
from models.wpac.bases import output_basis, pca_basis, query_key_basis, symmetric_power
from models.wpac.compensation import measure_compensation
from models.wpac.density import densities
from models.wpac.moments import Moments
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES
from utils import InputError


@torch.no_grad()
def changed(before, after):
    """How far the logits of two networks lie apart."""
    images = random_images(8, dtype=next(before.parameters()).dtype)
    return difference(before(images), after(images))


@pytest.mark.parametrize("basis", ["balanced", "pca"])
@pytest.mark.parametrize("objective", ["label", "feature"])
@pytest.mark.parametrize("kwargs", [{}, {"proj_bias": False}])
def test_both_bases_preserve_the_function(basis, objective, kwargs):
    """In float32; test_families.py has the other kinds of networks, in float64."""
    model = tiny_supernet(**kwargs)
    original = copy.deepcopy(model)
    reparameterise(model, measured(model, objective), basis)
    by = (model.blocks[0].attn.qkv.weight - original.blocks[0].attn.qkv.weight).abs().max()
    assert by > 0.1, "the weights were not rewritten at all"
    assert changed(original, model) < 1e-4


@pytest.mark.parametrize("basis", ["balanced", "pca"])
def test_dead_heads_and_too_few_tokens_do_not_fail(basis):
    model = tiny_supernet().double()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.view(3, 3, 16, 48)[:, 1] = 0
        model.blocks[1].attn.qkv.bias.view(3, 3, 16)[:, 1] = 0
        model.blocks[2].attn.proj.weight.zero_()
    original = copy.deepcopy(model)
    reparameterise(model, measured(model, batches=proxy_batches(1, 1, dtype=torch.float64)), basis)
    assert changed(original, model) < 1e-9


def test_balanced_rows_have_equal_norms():
    model = tiny_supernet()
    reparameterise(model, measured(model), "balanced")
    attn = model.blocks[0].attn
    q, k, v = attn.qkv.weight.view(3, 48, 48)
    q_bias, k_bias, v_bias = attn.qkv.bias.view(3, 48)

    def norm(weight, bias):
        return (weight.square().sum(1) + bias.square()).sqrt()

    assert torch.allclose(norm(q, q_bias), norm(k, k_bias), rtol=1e-4)
    assert torch.allclose(norm(v, v_bias), attn.proj.weight.norm(dim=0), rtol=1e-4)


def random_covariance(heads, d, seed):
    root = torch.randn(heads, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT


def test_pca_basis_diagonalises_in_descending_order():
    covariance = random_covariance(3, 6, 0)
    u = pca_basis(covariance)
    diagonal = u.mT @ covariance @ u
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(u.mT @ u, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), atol=1e-12)
    assert torch.allclose(diagonal, torch.diag_embed(values), atol=1e-10)
    assert (values.diff(dim=-1) <= 0).all()


def test_query_key_basis_is_exact_and_optimal():
    """map_q^T map_k = I, and the error of keeping k dimensions is the tail of the singular values: the optimum."""
    moment_q, covariance_k = random_covariance(2, 5, 1), random_covariance(2, 5, 2)
    map_q, map_k = query_key_basis(moment_q, covariance_k)
    assert torch.allclose(map_q.mT @ map_k, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), atol=1e-9)
    values = torch.linalg.svdvals(symmetric_power(moment_q, 0.5) @ symmetric_power(covariance_k, 0.5))
    for kept in range(1, 5):
        lost = torch.eye(5, dtype=torch.float64) - map_q[:, :kept].mT @ map_k[:, :kept]
        # E[(q^T lost k)^2] = tr(Sigma_q lost Sigma_k lost^T)
        error = (moment_q @ lost @ covariance_k @ lost.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        assert torch.allclose(error, values[:, kept:].square().sum(-1), rtol=1e-8)


def test_output_basis_is_exact_and_optimal():
    """to @ back = I, and the lost output energy is the tail of the singular values of G^(1/2) W_o Sigma^(1/2)."""
    covariance, gram = random_covariance(2, 5, 3), random_covariance(1, 8, 4)[0]
    proj = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    to, back = output_basis(covariance, gram, proj)
    assert torch.allclose(to @ back, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), atol=1e-9)
    values = torch.linalg.svdvals(symmetric_power(gram, 0.5) @ proj @ symmetric_power(covariance, 0.5))
    for kept in range(1, 5):
        lost = proj - proj @ back[:, :, :kept] @ to[:, :kept]
        error = (gram @ lost @ covariance @ lost.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        assert torch.allclose(error, values[:, kept:].square().sum(-1), rtol=1e-6)


def test_weighted_moments_equal_the_direct_computation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 4, dtype=torch.float64, generator=generator) + 3
    w = torch.rand(2, 50, dtype=torch.float64, generator=generator)
    moments = Moments(2, 4, "cpu")
    for part_x, part_w in zip(x.split(7, dim=1), w.split(7, dim=1), strict=True):
        moments.add(part_x, part_w)
    centred = x - x.mean(1, keepdim=True)
    direct = torch.einsum("gn,gni,gnj->gij", w, centred, centred) / w.sum(1)[:, None, None]
    assert torch.allclose(moments.mean, x.mean(1))
    assert torch.allclose(moments.covariance, direct, atol=1e-10)


def test_taylor_sums_equal_autograd_on_retained_activations():
    model = tiny_supernet().double()
    batches, kept = proxy_batches(6, 6, dtype=torch.float64), {}
    images, labels, _ = batches[0]
    handle = model.blocks[1].mlp.act.register_forward_hook(lambda m, i, o: (o.retain_grad(), kept.update(a=o))[0])
    model(images).gather(1, labels[:, None]).sum().backward()
    handle.remove()
    product = (kept["a"] * kept["a"].grad).abs()
    sums = measured(model, batches=batches)[3]
    assert torch.allclose(sums.taylor, product.sum((0, 1)), rtol=1e-5)
    assert torch.allclose(sums.hessian, product.square().sum((0, 1)), rtol=1e-5)


def test_statistics_do_not_depend_on_the_batch_size():
    model = tiny_supernet().double()
    one, other = (
        measured(model, batches=proxy_batches(batch=batch, dtype=torch.float64), hidden=True) for batch in (3, 24)
    )
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        pairs = list(zip(a.inputs.apart, b.inputs.apart, strict=True))
        pairs += [] if index % 2 else [(getattr(a, n), getattr(b, n)) for n in ("grad_z", "theta_v", "grad_k")]
        for first, second in pairs:
            assert torch.allclose(second.second_moment, first.second_moment, rtol=1e-9, atol=1e-12)
        assert torch.allclose(a.mean_gram, b.mean_gram, rtol=1e-9)


def test_statistics_of_a_sliced_network_and_flags_left_as_they_were():
    model = tiny_supernet().train()
    model.head.weight.requires_grad_(False)
    set_widths(model, Widths((4, 0, 16), (192, 12, 0)))
    sums = measured(model, moments=False)
    assert [tuple(x.taylor.shape) for x in sums] == [(3, 3, 4), (192,), (3, 3, 0), (12,), (3, 3, 16), (0,)]
    assert model.training and not model.head.weight.requires_grad and model.head.bias.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_an_empty_proxy_set_is_refused():
    with pytest.raises(InputError, match="no proxy image"):
        measured(tiny_supernet(), batches=[])


@torch.no_grad()
def test_truncation_after_balanced_beats_pca_beats_unrotated():
    """The expected order of the three, on the attention of a random network, by mean squared change of the logits."""
    images, widths = random_images(32), Widths((4,) * 3, (192,) * 3)
    errors = {}
    for basis in (None, "pca", "balanced"):
        model = tiny_supernet()
        original = model(images)
        if basis:
            reparameterise(model, measured(model), basis)
        set_widths(model, widths)
        errors[basis] = (model(images) - original).square().mean().item()
    assert errors["balanced"] < errors["pca"] < errors[None]


def test_every_function_that_the_method_names_exists():
    named = re.findall(r"`(models/[\w/]+)\.py: ([\w.]+)`", (ROOT / "docs/method.md").read_text())
    assert len(named) > 25
    for module, name in named:
        assert operator.attrgetter(name)(importlib.import_module(module.replace("/", "."))), f"{module}.py: {name}"


def test_density_is_the_share_of_the_loss_that_the_first_dimensions_hold():
    model = tiny_supernet().double()
    original = copy.deepcopy(model)
    sums = measured(model, batches=proxy_batches(dtype=torch.float64), hidden=True)
    found = densities(model, sums, reparameterise(model, sums, "balanced", "taylor"))
    for (before, after), branch, own in zip(found.values(), branches(original), sums, strict=True):
        assert before.shape == after.shape == (4 if branch.name == "attn" else 1, branch.full + 1)
        # The same from the original network's weights, one width at a time.
        weight, gram = branch.output.weight.view(48, -1, branch.full), own.mean_gram
        moment = (own.grad_z if branch.name == "attn" else own.inputs.together).second_moment

        def lost(kept, row, weight=weight, gram=gram, moment=moment):
            rest = weight[:, row, kept:]
            return torch.trace(rest.mT @ gram @ rest @ moment[row, kept:, kept:]).item()

        for row, kept in ((0, 3), (len(moment) - 1, 11)):
            assert before[row, kept].item() == pytest.approx(1 - lost(kept, row) / lost(0, row), abs=1e-9)
        assert after[:3].mean() > before[:3].mean() + 0.02
        heads = after[:3] if branch.name == "attn" else after[:0]
        assert (heads.diff(dim=1) > -1e-9).all() and (heads.diff(dim=1).diff(dim=1) < 1e-9).all(), "sorted"


def test_density_of_a_network_that_is_left_alone_is_the_same_before_and_after():
    model = tiny_supernet()
    sums = measured(model, hidden=True)
    state = copy.deepcopy(model.state_dict())
    for before, after in densities(model, sums, reparameterise(model, sums, untouched=range(6))).values():
        assert torch.allclose(before, after, atol=1e-9)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["Swin, padded", "inner norms", "DeiT"])
def test_the_metric_is_a_sum_over_an_image_and_the_mean_of_a_removed_attention_is_weighted(key):
    """Stages of Swin have their own numbers of tokens, and padded windows more: what the objective loses is a sum over
    all of them. An output that it does not read, as that of padding, is no part of the mean."""
    supernet, batches, found = as_supernet(FAMILIES[key].build()), proxy_batches(size=32), {}

    def watch(branch):
        def hook(_module, _inputs, output):
            output.register_hook(lambda gradient: found.setdefault(str(branch), []).append((output, gradient)))

        return branch.output.register_forward_hook(hook)

    with hooks([watch(branch) for branch in branches(supernet)]):
        for batch in batches:
            OBJECTIVES["label"](supernet, *batch).backward()
    statistics, images = measured(supernet, batches=batches, hidden=True), sum(len(batch[0]) for batch in batches)
    compensation = measure_compensation(supernet, batches, OBJECTIVES["label"])
    for branch, sums, known in zip(branches(supernet), statistics, compensation, strict=True):
        pairs = zip(*found[str(branch)], strict=True)
        output, gradient = (torch.cat([x.detach().flatten(0, -2) for x in part]).double() for part in pairs)
        assert difference(gradient.mT @ gradient / images, sums.mean_gram) < 1e-5
        if branch.name == "attn":
            weights = gradient.norm(dim=-1)
            assert difference(weights @ output / weights.sum(), known.output_mean) < 1e-5
