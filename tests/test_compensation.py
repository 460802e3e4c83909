"""Closed-form compensation against least squares, and what it must keep exactly."""

import copy

import pytest
import torch
from conftest import TINY_WIDTHS, proxy_batches, random_images, tiny_supernet

from models import peel
from models.calibration import calibrate
from models.compensation import compensate, compensated, factorise, greedy_order, load_memory, save_memory, unit_errors
from models.statistics import OBJECTIVES, collect_statistics
from models.width_table import Widths
from models.wpac import reparameterise
from utils import InputError

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("kept", [1, 5, 11, 12])
def test_compensation_equals_weighted_least_squares(kept):
    a, w, weight, bias, _ = problem()
    mean, covariance = moments_of(a, w)
    new, new_bias = compensated(weight, bias, factorise(covariance), mean, kept)
    design = torch.cat((a[:, :kept], torch.ones(len(a), 1, dtype=a.dtype)), 1) * w.sqrt()[:, None]
    solution = torch.linalg.lstsq(design, (a @ weight.mT + bias) * w.sqrt()[:, None]).solution
    # The ridge, 1e-5 of the mean variance, is all that separates the two.
    assert torch.allclose(new, solution[:-1].mT, rtol=0, atol=1e-2)
    assert torch.allclose(new_bias, solution[-1], rtol=0, atol=1e-2)


def test_unit_errors_add_up_to_what_compensation_leaves():
    a, w, weight, bias, gram = problem()
    mean, covariance = moments_of(a, w)
    factor = factorise(covariance)
    errors = unit_errors(weight, factor, gram)
    for kept in range(1, 12):
        new, new_bias = compensated(weight, bias, factor, mean, kept)
        lost = a @ weight.mT + bias - (a[:, :kept] @ new.mT + new_bias)
        assert errors[kept:].sum() == pytest.approx((w * ((lost @ gram) * lost).sum(1)).sum().item(), rel=1e-3)


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


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.5}, {"pre_norm": True}, {"qkv_bias": False}])
def test_full_width_is_untouched_and_narrower_is_closer(kwargs):
    model = tiny_supernet(**kwargs)
    statistics = collect_statistics(model, proxy_batches(), OBJECTIVES["label"], CPU, hidden=True)
    memory = reparameterise(model, statistics, "balanced", "greedy")
    images = torch.cat([images for images, _, _ in proxy_batches()])
    full, widths = TINY_WIDTHS[0], Widths((16,) * 3, (48,) * 3)
    with torch.no_grad():
        expected = model(images)
        network = peel.extract(model, full)
        before = copy.deepcopy(network.state_dict())
        compensate(network, model, full, memory)
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
        plain = peel.extract(model, widths)
        error_plain = (plain(images) - expected).square().mean()
        error = (compensate(plain, model, widths, memory)(images) - expected).square().mean()
    assert error < 0.5 * error_plain


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.5}, {"pre_norm": True}, {"no_embed_class": True}])
@pytest.mark.parametrize("gone", [(0, "attn"), (1, "attn"), (1, "mlp"), (2, "mlp")])
def test_the_mean_of_a_removed_branch_is_added_exactly_where_it_was(kwargs, gone):
    index, branch = gone
    model = tiny_supernet(**kwargs).double()
    with torch.enable_grad():
        batches = proxy_batches(dtype=torch.float64)
        statistics = collect_statistics(model, batches, OBJECTIVES["label"], CPU, hidden=True)
    memory = reparameterise(model, statistics)
    widths = list(TINY_WIDTHS[0].flat)
    widths[2 * index + (branch == "mlp")] = 0
    widths = Widths.from_flat(widths)
    network = compensate(peel.extract(model, widths), model, widths, memory)
    images = random_images(4, dtype=torch.float64)
    mean = getattr(memory[index], f"{branch}_mean")
    expected = copy.deepcopy(model)
    linear = expected.blocks[index].attn.proj if branch == "attn" else expected.blocks[index].mlp.fc2
    linear.weight.zero_()
    linear.bias.copy_(mean)
    for block, attn, mlp in zip(expected.blocks, TINY_WIDTHS[0].attn, TINY_WIDTHS[0].mlp, strict=True):
        block.set_widths(attn, mlp)
    assert torch.allclose(network(images), expected(images), atol=1e-9)


@pytest.mark.parametrize("widths", TINY_WIDTHS)
def test_every_shape_can_be_compensated_and_stored(widths, tmp_path):
    model = tiny_supernet()
    memory = reparameterise(
        model, collect_statistics(model, proxy_batches(), OBJECTIVES["label"], CPU, hidden=True), "pca", "hessian"
    )
    save_memory(memory, model, tmp_path / "statistics.safetensors")
    again = load_memory(tmp_path / "statistics.safetensors", model)
    images = random_images(2)
    with torch.no_grad():
        one, other = (compensate(peel.extract(model, widths), model, widths, m)(images) for m in (memory, again))
    assert torch.isfinite(one).all()
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_statistics_files_that_do_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "statistics.safetensors", tiny_supernet()
    with pytest.raises(InputError, match=r"main_reparam\.py writes it"):
        load_memory(path, model)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a readable"):
        load_memory(path, model)
    statistics = collect_statistics(model, proxy_batches(), OBJECTIVES["label"], CPU, hidden=True)
    save_memory(reparameterise(model, statistics), model, path)
    load_memory(path, model)
    with pytest.raises(InputError, match="other weights"):
        load_memory(path, tiny_supernet(seed=1))


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.5}])
@pytest.mark.parametrize("widths", [Widths((4,) * 3, (24,) * 3), Widths((0, 8, 4), (24, 0, 96))])
def test_calibration_on_the_images_themselves_is_closer_than_compensation(widths, kwargs):
    model = tiny_supernet(**kwargs)
    batches = proxy_batches()
    memory = reparameterise(model, collect_statistics(model, batches, OBJECTIVES["label"], CPU, hidden=True))
    images = torch.cat([images for images, _, _ in batches])
    with torch.no_grad():
        expected = model(images)
        network = compensate(peel.extract(model, widths), model, widths, memory)
        before = (network(images) - expected).square().mean()
    calibrate(network, model, batches, OBJECTIVES["feature"], CPU)
    with torch.no_grad():
        assert (network(images) - expected).square().mean() < 0.7 * before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibrating_the_full_network_changes_nothing():
    model = tiny_supernet().double()
    network = peel.extract(model, TINY_WIDTHS[0])
    before = copy.deepcopy(network.state_dict())
    calibrate(network, model, proxy_batches(dtype=torch.float64), OBJECTIVES["feature"], CPU)
    assert all(torch.allclose(before[name], value, atol=1e-9) for name, value in network.state_dict().items())
