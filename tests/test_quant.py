"""Static quantisation ranges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.quant import Range, affine
from gossamer.stats import CalibrationError


def quantised(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    return ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_the_range_is_held_and_zero_is_exact(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = affine(low, high)
    assert scale > 0 and 0 <= zero <= 255
    x = torch.tensor([low, high, 0.0], dtype=torch.float64)
    assert ((quantised(x, scale, zero) - x).abs() <= scale * 0.501 + 1e-37).all() or low == high == 0
    assert quantised(x, scale, zero)[2] == 0


def test_ranges_against_outliers() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    seen = Range()
    for part in x.split(7000):
        seen.observe(part.view(-1, 1))
    seen.observe(torch.tensor([[50.0]]))
    most, errors, with_outlier = torch.cat([x, torch.tensor([50.0])]), {}, {}
    for name, found in (("minmax", seen.minmax()), ("percentile", seen.percentile(0.999)), ("mse", seen.mse())):
        errors[name] = float((quantised(x, *found) - x).square().mean())
        with_outlier[name] = float((quantised(most, *found) - most).square().mean())
    assert seen.minmax()[0] == pytest.approx((50 - float(x.min())) / 255)
    assert errors["percentile"] < 0.1 * errors["minmax"] and min(with_outlier, key=with_outlier.__getitem__) == "mse"
    assert seen.percentile(1.0) == seen.minmax()


def test_relu_outputs_take_all_levels() -> None:
    seen = Range()
    seen.observe(torch.linspace(0, 5, 100))
    assert seen.minmax() == (pytest.approx(5 / 255), 0)


def test_bad_input() -> None:
    with pytest.raises(CalibrationError, match="no activations were observed; fix"):
        Range().mse()
    for bad in (math.nan, math.inf):
        with pytest.raises(CalibrationError, match="NaN or Inf"):
            Range().observe(torch.tensor([1.0, bad]))
    seen = Range()
    seen.observe(torch.zeros(0))
    seen.observe(torch.zeros(4))
    assert seen.minmax() == (1.0, 0) and seen.mse() == (1.0, 0)
    with pytest.raises(ValueError, match=r"not 0\.5"):
        seen.percentile(0.5)
