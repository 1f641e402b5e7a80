"""The error of int8, against torch's own rounding and by hand."""

from __future__ import annotations

import pytest
import torch

from we_surgery.analysis.quantization import (
    LARGE_ERROR,
    channel_errors,
    int8_error,
    int8_summary,
    round_weight,
)


def test_rounding_is_that_of_torch() -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scale = (weight.abs().max() / 127).item()
    expected = torch.fake_quantize_per_tensor_affine(weight, scale, 0, -127, 127)
    torch.testing.assert_close(round_weight(weight), expected)
    scales = weight.abs().amax((1, 2, 3)) / 7
    zeros = torch.zeros(5, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -7, 7)
    torch.testing.assert_close(round_weight(weight, 4, per_channel=True), expected)


def test_the_error_is_that_of_uniform_rounding() -> None:
    """A step has a variance of its square over 12."""
    weight = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    error = int8_error("fc.weight", weight)
    assert error.peak == pytest.approx(weight.abs().max().item(), rel=0.01)
    assert error.per_tensor == pytest.approx(error.peak / 127 / 12**0.5, rel=0.02)
    assert error.per_channel < error.per_tensor


def test_each_channel_counts_alike_and_zeros_do_not() -> None:
    weight = torch.tensor([[100.0, 0], [1, 1], [0, 0]])
    rounded = torch.tensor([[100.0, 0], [1, 0], [0, 0]])
    assert channel_errors(weight, rounded).tolist() == pytest.approx([0, 0.5**0.5])
    zeros = int8_error("dead", torch.zeros(2, 2))
    assert (zeros.peak, zeros.per_tensor, zeros.per_channel, zeros.advice) == (0, 0, 0, "")


def test_what_to_do_follows_from_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    fits, channel, outliers = torch.randn(3, 8, 2000, generator=generator)
    channel[3] *= 100
    outliers[:, 0] = 100
    errors = [int8_error(*each) for each in (("a", fits), ("b", channel), ("c", outliers))]
    assert [error.advice for error in errors] == ["", "scale per channel", "keep in float"]
    assert errors[1].per_channel < LARGE_ERROR < errors[1].per_tensor
    assert int8_summary(errors).endswith("train quantization-aware: c")
    assert "output channel: b; 1 of 3" in int8_summary(errors)
    assert int8_summary(errors[:1]).startswith("int8: all 1 weights fit")
    assert int8_summary([]) == "int8: no float weights to measure"
