"""metrics.py against values by hand."""

import corruptions
import math
import metrics
import pytest
import torch
from helpers import refused, seeded

def probabilities_as_logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log()

def test_top_k_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [3, 1, 2]])
    target = torch.tensor([0, 2, 0, 1])
    found = [metrics.top_k_accuracy(logits, target, k) for k in (1, 2, 3, 5)]
    assert found == [0.25, 0.5, 1.0, 1.0]

def test_nll_and_brier_by_hand():
    logits = probabilities_as_logits([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    target = torch.tensor([2, 1])
    assert metrics.nll(logits, target) == pytest.approx(-(math.log(0.2) + math.log(0.8)) / 2)
    squares = (0.25 + 0.09 + 0.64) + (0.01 + 0.04 + 0.01)
    assert metrics.brier(logits, target) == pytest.approx(squares / 2)
    certain = torch.tensor([[0.0, 1e4], [0.0, 1e4]])
    assert metrics.brier(certain, torch.tensor([1, 0])) == 1.0  # 0 and 2
    assert metrics.nll(logits.bfloat16(), target) == pytest.approx(0.916, rel=0.02)

def test_ece_by_hand():
    rows = [[0.95, 0.05], [0.92, 0.08], [0.65, 0.35], [0.62, 0.38], [0.45, 0.55]]
    logits, target = probabilities_as_logits(rows), torch.tensor([0, 1, 0, 0, 1])
    # Width 0.1: {.95, .92} half right, {.65, .62} all right, {.55} right.
    expected = (2 * (0.935 - 0.5) + 2 * (1 - 0.635) + 0.45) / 5
    assert metrics.ece(logits, target, bins=10) == pytest.approx(expected)
    # Mass 2, 2, 1: {.55, .62} {.65, .92} {.95}.
    expected = (2 * (1 - 0.585) + 2 * (0.785 - 0.5) + (1 - 0.95)) / 5
    assert metrics.ece(logits, target, bins=3, equal_mass=True) == pytest.approx(expected)
    confidence, accuracy, count = metrics.calibration_bins(logits, target, bins=10)
    assert count.tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert confidence[9].item() == pytest.approx(0.935) and accuracy[9] == 0.5
    assert confidence[0] == accuracy[0] == 0

def test_calibration_bins_has_fifteen_and_an_edge_in_the_lower_one():
    target = torch.zeros(3, dtype=torch.int64)
    _, _, count = metrics.calibration_bins(torch.zeros(3, 2), target, bins=2)
    assert count.tolist() == [3, 0]  # confidence exactly 0.5
    assert len(metrics.calibration_bins(torch.zeros(3, 2), target)[2]) == 15
    logits, target = torch.randn(100, 5, generator=seeded()), torch.zeros(100, dtype=torch.int64)
    _, _, count = metrics.calibration_bins(logits, target, equal_mass=True)
    assert count.tolist() == [7] * 10 + [6] * 5

@pytest.mark.parametrize("temperature", (0.02, 0.5, 3.0, 40.0))
def test_fit_temperature_recovers_the_one_that_was_applied(temperature):
    # Ten equal rows whose targets come in proportion to the probabilities: the best temperature
    # undoes the scaling.
    logits = probabilities_as_logits([[0.5, 0.3, 0.2]] * 10) * temperature
    target = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert metrics.fit_temperature(logits, target) == pytest.approx(temperature, rel=1e-6)

def test_fit_temperature_has_the_least_nll():
    logits = 4 * torch.randn(500, 10, generator=seeded(1))
    target = torch.randint(10, (500,), generator=seeded(2))
    target[:300] = logits[:300].argmax(dim=1)
    best = metrics.fit_temperature(logits, target)
    for factor in (0.98, 1.02):
        assert metrics.nll(logits / best, target) < metrics.nll(logits / best / factor, target)

def test_quadrants_by_hand():
    logits = probabilities_as_logits([[0.95, 0.05], [0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    target = torch.tensor([0, 1, 1, 1, 1])
    found = metrics.quadrants(logits, target, 0.75)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in found.items()} == {
        "confident_right": [0, 4], "confident_wrong": [1], "unsure_right": [2], "unsure_wrong": [3]}
    assert metrics.quadrants(torch.zeros(1, 2), torch.tensor([0]), 0.5)["confident_right"].item()

def test_bootstrap_interval_is_that_of_a_mean():
    values = (torch.arange(400) % 4 == 0).double()  # mean .25, its error sqrt(.25 * .75 / 400)
    error = 0.02165
    low, high = metrics.bootstrap_interval(values, seeded(), resamples=2000)
    assert (low, high) == pytest.approx((0.25 - 1.96 * error, 0.25 + 1.96 * error), abs=0.004)
    assert metrics.bootstrap_interval(values, seeded(), resamples=2000) == (low, high)
    narrow = metrics.bootstrap_interval(values, seeded(), resamples=2000, level=0.5)
    assert low < narrow[0] < narrow[1] < high

def test_mean_corruption_error_by_hand():
    flat, alexnet = dict.fromkeys(corruptions.COMMON, 0.4), metrics.ALEXNET_ERRORS
    assert list(alexnet) == list(corruptions.COMMON)
    assert sum(alexnet.values()) / 15 == pytest.approx(0.788, abs=0.001)  # published: 78.8 %
    assert metrics.mean_corruption_error(flat) == pytest.approx(0.4)
    found = metrics.mean_corruption_error({**flat, "fog": 0.7, "spatter": 1.0})
    assert found == pytest.approx(0.42)
    assert metrics.mean_corruption_error(flat, clean_error=0.1) == pytest.approx(0.3)
    assert metrics.mean_corruption_error(alexnet, alexnet=True) == pytest.approx(1)
    relative = {name: 0.2 + 0.5 * (error - 0.43478) for name, error in alexnet.items()}
    found = metrics.mean_corruption_error(relative, clean_error=0.2, alexnet=True)
    assert found == pytest.approx(0.5)
    only_fog = {**dict.fromkeys(corruptions.COMMON, 0.0), "fog": 0.819324}
    assert metrics.mean_corruption_error(only_fog, alexnet=True) == pytest.approx(1 / 15)
    for bad in (41.0, -0.1, math.nan):
        assert "fog" in refused(metrics.mean_corruption_error, {**flat, "fog": bad})
        assert "clean_error" in refused(metrics.mean_corruption_error, flat, bad)
    del flat["fog"]
    assert "fog" in refused(metrics.mean_corruption_error, flat)

@pytest.mark.parametrize("name", ("top_k_accuracy", "nll", "brier", "calibration_bins", "ece",
                                  "fit_temperature", "quadrants"))
def test_every_metric_refuses_what_it_would_compute_wrongly(name):
    metric, settings = getattr(metrics, name), (0.5,) if name == "quadrants" else ()
    z, y = torch.randn(50, 50, generator=seeded()), torch.randint(50, (50,), generator=seeded())
    expected = metric(z, y, *settings)
    found = metric(z.double(), y.to(torch.uint8), *settings)
    assert repr(found) == repr(expected)
    spoiled = z.repeat(3, 1, 1)
    spoiled[0, 7, 7], spoiled[1, 7, 7], spoiled[2, 7] = math.nan, math.inf, -math.inf
    for target in (y[:, None], y[None], y[:49], y[:1], y.float(), y > 0, torch.eye(50)[y],
                   torch.eye(50).long()[y], torch.where(y == y[0], -100, y), y + 50):
        assert "(N,)" in refused(metric, z, target, *settings)
    for logits in (z[0], z[None], z[:, :0], z[:49], *spoiled):
        assert "(N, K)" in refused(metric, logits, y, *settings)
    refused(metric, z[:0], y[:0], *settings)

def test_metrics_refuse_settings_out_of_range_and_take_a_class_ruled_out():
    z, y = torch.eye(3), torch.arange(3)
    for call in (lambda: metrics.top_k_accuracy(z, y, 0), lambda: metrics.ece(z, y, bins=0),
                 lambda: metrics.quadrants(z, y, 70), lambda: metrics.quadrants(z, y, math.nan),
                 lambda: metrics.bootstrap_interval(z, seeded()),
                 lambda: metrics.bootstrap_interval(z[0] * math.nan, seeded()),
                 lambda: metrics.bootstrap_interval(z[0], seeded(), level=95)):
        refused(call)
    z, y = torch.tensor([[1.0, 0, -math.inf], [0, 2, -math.inf]]), torch.tensor([1, 1])
    for metric in (metrics.nll, metrics.ece, metrics.fit_temperature):
        assert metric(z, y) == pytest.approx(metric(z[:, :2], y))
