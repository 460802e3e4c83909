"""Closed-form compensation against least squares, and what it must keep exactly."""

from contextlib import nullcontext

import pytest
import torch
from conftest import TINY_WIDTHS, measured, proxy_batches, random_images, rewritten, tiny_supernet
from torch.nn import functional as F

from models.subnet.extract import extract
from models.vit.families import Transform
from models.vit.supernet import branches, full_widths, hooks, set_widths
from models.vit.widths import Widths
from models.wpac.bases import SHRINKAGES, choose_shrinkage, factorise, greedy_order, shrunk
from models.wpac.calibration import calibrate
from models.wpac.compensation import (
    attach,
    compensate,
    fold,
    inverse_of,
    load_compensation,
    plain_errors,
    save_compensation,
    through_norm,
    unit_errors,
)
from models.wpac.statistics import OBJECTIVES
from utils import InputError


def problem(count=400, units=12, outputs=5, seed=0):
    """Weighted samples of a correlated hidden vector with a mean, an output layer, and a metric of its output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    a = normal(count, 7) @ normal(7, units) + 0.3 * normal(count, units) + 2 * normal(units)
    root = normal(outputs, outputs)
    weights = torch.rand(count, dtype=torch.float64, generator=generator)
    return a, weights / weights.sum(), normal(outputs, units), normal(outputs), root @ root.mT


def moments_of(a, w):
    mean = w @ a
    return mean, (a - mean).mT @ ((a - mean) * w[:, None])


@pytest.mark.parametrize("kept", range(1, 13))
def test_compensation_is_weighted_least_squares_and_leaves_the_sum_of_the_unit_errors(kept):
    a, w, weight, bias, gram = problem()
    (mean, covariance), output = moments_of(a, w), a @ weight.mT + bias
    factor = factorise(covariance)
    new, new_bias = fold(weight, bias, factor, mean, kept)
    design = torch.cat((a[:, :kept], torch.ones(len(a), 1, dtype=a.dtype)), 1) * w.sqrt()[:, None]
    solution = torch.linalg.lstsq(design, output * w.sqrt()[:, None]).solution
    # The ridge, 1e-5 of the mean variance, is all that separates the two.
    assert torch.allclose(new, solution[:-1].mT, rtol=0, atol=1e-2)
    assert torch.allclose(new_bias, solution[-1], rtol=0, atol=1e-2)
    for tensor, other in zip((new, new_bias), fold(weight, bias, factor, mean, kept, inverse_of(factor)), strict=True):
        assert torch.allclose(tensor, other, rtol=0, atol=1e-9)
    lost = output - (a[:, :kept] @ new.mT + new_bias)
    left = (w * ((lost @ gram) * lost).sum(1)).sum()
    assert unit_errors(weight, factor, gram)[kept:].sum() == pytest.approx(left.item(), rel=1e-3)


def test_without_compensation_an_entry_costs_what_the_plain_slice_loses_of_it():
    a, w, weight, _, gram = problem()
    moment = (a * w[:, None]).mT @ a

    def lost(kept):
        dropped = a[:, kept:] @ weight[:, kept:].mT
        return (w * ((dropped @ gram) * dropped).sum(1)).sum()

    steps = torch.stack([lost(kept) - lost(kept + 1) for kept in range(12)])
    assert torch.allclose(plain_errors(weight, moment, gram), steps.clamp(min=0), rtol=1e-9)


def test_attention_whose_proj_has_no_bias_is_ranked_as_it_is_cut():
    """Its means are lost, and nothing predicts what goes: of the same function it counts more than with a bias."""
    bare, biased = tiny_supernet(proj_bias=False).double(), tiny_supernet().double()
    assert biased.load_state_dict(bare.state_dict(), strict=False).missing_keys
    for branch in branches(biased):
        torch.nn.init.zeros_(branch.output.bias)
    errors = []
    for supernet in (bare, biased):
        batches = proxy_batches(dtype=torch.float64)
        errors.append([known.errors for known in rewritten(supernet, measured(supernet, batches=batches, hidden=True))])
    assert [branch.part.can(Transform.COMPENSATION) for branch in branches(bare)] == [False] * 6
    for plain, compensated in zip(errors[0][::2], errors[1][::2], strict=True):
        assert plain.sum() > 1.05 * compensated.sum() and plain[-1] > compensated[-1] and (plain >= 0).all()


@pytest.mark.parametrize("kept", [3, 6, 9, 11])
def test_compensation_through_a_norm_is_nearly_the_best_for_what_the_narrower_norm_returns(kept):
    hidden, w, weight, bias, _ = problem()
    gamma, beta = 1 + 0.3 * weight[0], weight[1]

    def normed(units):
        return F.layer_norm(hidden[:, :units], (units,), gamma[:units], beta[:units])

    (mean, covariance), output, x = moments_of(normed(12), w), normed(12) @ weight.mT + bias, normed(kept)
    factor = factorise(covariance)

    def left(new, new_bias):
        return (w * (output - x @ new.mT - new_bias).square().sum(1)).sum().item()

    plain = fold(weight, bias, factor, mean, kept)
    ours = through_norm(*plain, factor[:kept, :kept], mean[:kept], gamma[:kept], beta[:kept])
    design = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), 1) * w.sqrt()[:, None]
    solution = torch.linalg.lstsq(design, output * w.sqrt()[:, None], driver="gelsd").solution
    best = left(solution[:-1].mT, solution[-1])
    assert best <= left(*ours) < 1.1 * best and left(*ours) < left(*plain)
    inverse = inverse_of(factor)[:kept, :kept]
    others = through_norm(*plain, factor[:kept, :kept], mean[:kept], gamma[:kept], beta[:kept], inverse)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-8) for pair in zip(ours, others, strict=True))


def test_a_norm_that_has_lost_a_unit_gives_it_a_finite_gradient():
    gamma = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    one, three = torch.ones(1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    weight, bias = through_norm(torch.ones(1, 3).double(), one, torch.eye(3).double(), three, gamma, three)
    (weight.sum() + bias.sum()).backward()
    assert torch.isfinite(gamma.grad).all()


def halves_of(count):
    """(problem's weight, its metric, (mean, covariance) of ``count`` samples and of as many others, the samples)."""
    a, w, weight, _, gram = problem(2 * count)
    samples = [(half, share / share.sum()) for half, share in zip(a.chunk(2), w.chunk(2), strict=True)]
    return weight, gram, [moments_of(*half) for half in samples], samples


@pytest.mark.parametrize("count", [10, 14, 30])
def test_the_shrinkage_is_the_one_that_predicts_the_other_half_best(count):
    weight, gram, halves, samples = halves_of(count)
    lost, order = torch.zeros(len(SHRINKAGES), dtype=torch.float64), torch.arange(12).roll(5)
    sorted_weight = weight[:, order]
    for (mean, covariance), (a, w) in zip(halves, samples[::-1], strict=True):
        mean, covariance, a = mean[order], covariance[order][:, order], a[:, order]
        for index, share in enumerate(SHRINKAGES):
            new, bias = fold(sorted_weight, torch.zeros(5), factorise(shrunk(covariance, share)), mean, 3)
            left = a @ sorted_weight.mT - a[:, :3] @ new.mT - bias
            lost[index] += (w * ((left @ gram) * left).sum(1)).sum()
    share = max(share for share, value in zip(SHRINKAGES, lost, strict=True) if value <= 1.003 * lost.min())
    assert choose_shrinkage(halves, weight, gram, order) == share / (2 - share)


def test_correlations_shrink_where_tokens_are_few_and_not_where_they_are_many():
    found, order = {}, torch.arange(12)
    for count in (8, 1000):
        weight, gram, halves, _ = halves_of(count)
        found[count] = choose_shrinkage(halves, weight, gram, order)
    assert found[1000] < 0.01 and found[8] > 0.1
    nothing = (torch.zeros(12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64))
    halved = choose_shrinkage([halves[0], nothing], weight, gram, order)
    assert 0 < halved < 1, "one proxy image: nothing to compare with"
    rounding = torch.linspace(-1, 1, 144, dtype=torch.float64).view(12, 12) * 1e-17
    halves[0] = (halves[0][0], rounding + rounding.mT)
    assert 0.8 < choose_shrinkage(halves, weight, gram, order) < 1, "a half of one token predicts nothing"


def test_greedy_order_picks_the_best_next_unit_each_time():
    a, w, weight, _, gram = problem()
    _, covariance = moments_of(a, w)

    def left(chosen):
        order = [*chosen, *(j for j in range(12) if j not in chosen)]
        factor = factorise(covariance[order][:, order])
        return unit_errors(weight[:, order], factor, gram)[len(chosen) :].sum().item()

    order = greedy_order(covariance, weight, gram, torch.rand(12)).tolist()
    assert sorted(order) == list(range(12))
    for count in range(8):
        best = min(left([*order[:count], j]) for j in range(12) if j not in order[:count])
        assert left(order[: count + 1]) == pytest.approx(best, rel=1e-3)


def reparameterised(*how, **kwargs):
    """(a super-network that has been rewritten, its Compensation)."""
    supernet = tiny_supernet(**kwargs)
    return supernet, rewritten(supernet, measured(supernet, hidden=True), *how)


def cut(supernet, widths, compensation):
    return compensate(extract(supernet, widths), supernet, compensation)


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.5}, {"pre_norm": True}, {"qkv_bias": False}])
def test_full_width_is_untouched_and_narrower_is_closer(kwargs):
    supernet, compensation = reparameterised("balanced", "greedy", **kwargs)
    full = cut(supernet, full_widths(supernet), compensation).state_dict()
    assert all(torch.equal(full[name], value) for name, value in supernet.state_dict().items())
    images, widths = torch.cat([images for images, _, _ in proxy_batches()]), Widths((16,) * 3, (48,) * 3)
    with torch.no_grad():
        networks = extract(supernet, widths), cut(supernet, widths, compensation)
        plain, compensated = ((network(images) - supernet(images)).square().mean() for network in networks)
    assert compensated < 0.5 * plain


def _shrinkage_of(factor, covariance):
    """(share by which the correlations of ``covariance`` are smaller in F F^T, variances); the share must be one."""
    found, variance = factor @ factor.mT, covariance.diagonal()
    assert torch.allclose(found.diagonal(), variance, rtol=1e-3, atol=2e-5 * variance.mean())
    off = ~torch.eye(len(found), dtype=torch.bool)
    share = 1 - (found[off] @ covariance[off]) / (covariance[off] @ covariance[off])
    assert torch.allclose(found[off], (1 - share) * covariance[off], rtol=1e-6)
    assert any(abs(share - chosen / (2 - chosen)) < 1e-6 for chosen in SHRINKAGES)
    return share, variance


@pytest.mark.parametrize("basis", ["balanced", "pca"])
def test_compensated_attention_equals_weighted_least_squares(basis):
    """The kept dimensions of all heads predict the output of proj, with tokens weighted by the gradient there and a
    ridge, the same share of every variance, towards the weights as they were."""
    supernet, kept, seen = tiny_supernet().double(), 4, []
    compensation, attention = rewritten(supernet, measured(supernet, hidden=True), basis), branches(supernet)[2]

    def note(_module, given, output):
        output.register_hook(lambda go: seen.append((given[0].detach(), output.detach(), go.norm(dim=-1))))

    with hooks([attention.output.register_forward_hook(note)]):
        for batch in proxy_batches(dtype=torch.float64):
            OBJECTIVES["label"](supernet, *batch).backward()
    z, output, weight = (torch.cat(tensors).flatten(0, 1) for tensors in zip(*seen, strict=True))
    root, x = (weight / weight.sum()).sqrt()[:, None], z.unflatten(1, (3, 16)).mT.flatten(1)  # dimension first
    share, variance = _shrinkage_of(compensation[2].factor, moments_of(x, root.flatten().square())[1])
    pull = (share / (1 - share) * variance[: 3 * kept]).sqrt().diag()
    design = torch.cat((x[:, : 3 * kept], torch.ones_like(root)), 1) * root
    design = torch.cat((design, F.pad(pull, (0, 1))))
    before = attention.output.weight.unflatten(1, (3, 16))[..., :kept].transpose(1, 2).flatten(1).mT
    solution = torch.linalg.lstsq(design, torch.cat((output * root, pull @ before))).solution
    solution[:-1] = solution[:-1].unflatten(0, (kept, 3)).transpose(0, 1).flatten(0, 1)  # head first
    proj = cut(supernet, Widths((16, kept, 16), (192,) * 3), compensation).blocks[1].attn.proj
    assert torch.allclose(proj.weight, solution[:-1].mT, rtol=0, atol=1e-3)
    assert torch.allclose(proj.bias, solution[-1], rtol=0, atol=1e-3)
    assert proj.weight.abs().max() > 0.5 and not torch.allclose(
        proj.weight, attention.output.weight.unflatten(1, (3, 16))[..., :kept].flatten(1), rtol=0, atol=1e-2
    )


def test_every_shape_can_be_compensated_and_stored(tmp_path):
    supernet, compensation = reparameterised("pca", "hessian")
    save_compensation(compensation, supernet, tmp_path / "x.safetensors", "digest")
    again, images = load_compensation(tmp_path / "x.safetensors", supernet, "digest"), random_images(2)
    for widths in TINY_WIDTHS:
        with torch.no_grad():
            one, other = (cut(supernet, widths, known)(images) for known in (compensation, again))
        assert torch.isfinite(one).all()
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_compensation_of_images_of_another_size_is_said(tmp_path, capsys):
    supernet, compensation = reparameterised("pca", "hessian")
    save_compensation(compensation, supernet, tmp_path / "x.safetensors", "digest")
    load_compensation(tmp_path / "x.safetensors", supernet, "digest")
    assert not capsys.readouterr().out
    load_compensation(tmp_path / "x.safetensors", tiny_supernet(img_size=32), "digest")
    assert "measured on images of 16x16 pixels, and these are of 32x32" in capsys.readouterr().out


def test_fp16_cannot_hold_the_gradients_that_are_measured():
    with pytest.raises(InputError, match=r"^--amp fp16: "):
        measured(tiny_supernet(), amp="fp16")


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.5}])
@pytest.mark.parametrize("widths", [Widths((4,) * 3, (24,) * 3), Widths((0, 8, 4), (24, 0, 96))])
def test_calibration_on_the_images_themselves_is_closer_than_compensation(widths, kwargs):
    (supernet, compensation), batches = reparameterised(**kwargs), proxy_batches()
    images = torch.cat([images for images, _, _ in batches])
    with torch.no_grad():
        expected = supernet(images)
        network = cut(supernet, widths, compensation)
        before = (network(images) - expected).square().mean()
    calibrate([network], supernet, batches, OBJECTIVES["feature"])
    with torch.no_grad():
        assert (network(images) - expected).square().mean() < 0.7 * before
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_sizes_that_are_calibrated_together_are_those_calibrated_alone():
    (supernet, compensation), batches = reparameterised(), proxy_batches()

    def networks():
        return [cut(supernet, widths, compensation) for widths in TINY_WIDTHS]

    together = calibrate(networks(), supernet, batches, OBJECTIVES["feature"])
    for network, one in zip(together, networks(), strict=True):
        (alone,) = calibrate([one], supernet, batches, OBJECTIVES["feature"])
        state = network.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())


def test_a_super_network_that_is_moved_takes_along_what_it_folds_with(monkeypatch):
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # there is none for this device
    supernet = tiny_supernet()
    attach(supernet, rewritten(supernet, measured(supernet, hidden=True)))
    set_widths(supernet, Widths((8, 16, 4), (96, 50, 192)))
    assert supernet.to("meta")(random_images(2).to("meta")).shape == (2, 7)
    assert branches(supernet)[0].output.folding.factor.device.type == "meta"
