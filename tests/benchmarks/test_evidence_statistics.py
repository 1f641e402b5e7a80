"""The statistics against computations that are written out here."""

from itertools import product

import evidence_statistics as statistics
import numpy as np
import pytest
import torch
from evidence_training import calibration_error
from scipy import stats


def test_sign_flip_is_the_share_of_sign_patterns_at_least_as_far_from_zero():
    values = np.array([0.5, -0.1, 0.7, 0.3, 0.9, -0.2, 0.4, 0.6])
    means = [abs(np.mean(values * signs)) for signs in product((1, -1), repeat=8)]
    expected = np.mean(np.array(means) >= abs(values.mean()) - 1e-12)
    assert statistics.sign_flip(values) == pytest.approx(expected)


def test_bca_interval_is_that_of_the_formula(monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 40_000)
    values = np.random.default_rng(1).exponential(size=30) - 0.5
    rng = np.random.default_rng(2)
    resampled = np.sort(values[rng.integers(30, size=(40_000, 30))].mean(1))
    bias = stats.norm.ppf((resampled < values.mean()).mean())
    left_out = (values.sum() - values) / 29
    deviations = left_out.mean() - left_out
    skew = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    expected = []
    for quantile in stats.norm.ppf([0.025, 0.975]):
        shifted = bias + (bias + quantile) / (1 - skew * (bias + quantile))
        expected.append(np.quantile(resampled, stats.norm.cdf(shifted)))
    assert statistics.interval(values) == pytest.approx(expected, abs=0.03)
    percentiles = np.quantile(resampled, [0.025, 0.975])
    assert statistics.interval(values) != pytest.approx(percentiles, abs=0.03)


def test_holm():
    # 3 * 0.01, then 2 * 0.02, then 0.03, which must not fall below the one before.
    adjusted = statistics.holm({"a": 0.02, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"b": 0.03, "a": 0.04, "c": 0.04})
    assert statistics.holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_power_is_what_simulated_pairs_have():
    found = statistics.compare(np.random.default_rng(3).normal(size=30))
    effect = found.detectable(0.05)
    draws = np.random.default_rng(4).normal(effect, found.deviation, size=(20_000, 30))
    z = draws.mean(1) / (found.deviation / 30**0.5)
    assert (abs(z) > stats.norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.01)


def test_verdict_needs_the_test_and_the_interval():
    gain = statistics.Comparison(30, 0.5, 0.2, 0.8, 0.001, 0.8)
    assert gain.verdict(0.01) == "gain"
    assert gain.verdict(0.06) == "no difference seen"
    assert statistics.Comparison(30, -0.5, -0.8, -0.2, 0.001, 0.8).verdict(0.01) == "loss"


def test_equal_differences_have_an_interval_of_one_point():
    found = statistics.compare([0.25] * 10)
    assert (found.low, found.high) == (0.25, 0.25)


def test_calibration_error():
    # Two bins: three predictions at 0.9 of which two are right, one at 0.5 that is wrong.
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.5])
    hits = torch.tensor([True, True, False, False])
    expected = (abs(2 - 2.7) + 0.5) / 4
    assert calibration_error(confidence, hits) == pytest.approx(expected, abs=1e-6)
