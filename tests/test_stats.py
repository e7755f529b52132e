import math

import pytest
import torch

from gossamer.stats import CalibrationError, Stats


def stats(x: torch.Tensor) -> Stats:
    return Stats((x.mT @ x).double(), x.shape[0])


def test_the_root_whitens() -> None:
    x = torch.randn(100, 12, dtype=torch.float64)
    error = torch.randn(7, 12, dtype=torch.float64)
    root, inverse = stats(x).root
    assert torch.allclose((error @ root).norm(), (x @ error.mT).norm(), rtol=1e-5)
    assert torch.allclose(root @ inverse, torch.eye(12, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_gram_still_has_a_root(rank: int) -> None:
    x = torch.randn(50, rank, dtype=torch.float64) @ torch.randn(rank, 12, dtype=torch.float64) * 1e4
    root, inverse = stats(x).root
    assert root.isfinite().all() and inverse.isfinite().all()
    error = torch.randn(7, 12, dtype=torch.float64)
    if rank:
        assert torch.allclose((error @ root).norm(), (x @ error.mT).norm(), rtol=1e-2)


def test_an_indefinite_gram_falls_back_to_eigenvalues(caplog: pytest.LogCaptureFixture) -> None:
    """What float32 sums of large activations can come to: a negative eigenvalue larger than the ridge."""
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    gram = (vectors * torch.tensor([1e6, 10.0, 5.0, 1.0, 1.0, -20.0])) @ vectors.mT
    root, inverse = Stats(gram, 10).root
    assert "not positive definite" in caplog.text
    assert torch.allclose(root @ inverse, torch.eye(6, dtype=torch.float64), atol=1e-8)


def test_relative_error_is_the_lost_output_energy() -> None:
    x, w, approximation = torch.randn(80, 12), torch.randn(5, 12), torch.randn(5, 12)
    lost = (x @ (w - approximation).mT).square().sum() / (x @ w.mT).square().sum()
    assert stats(x).relative_error(w, approximation) == pytest.approx(float(lost), rel=1e-4)
    assert stats(x).relative_error(w, w) == 0


def test_bad_statistics_name_the_layer() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"h\.0\.q: NaN or Inf .*fix:"):
        Stats(gram * math.nan, 5).check("h.0.q")
    with pytest.raises(CalibrationError, match=r"h\.0\.q: no calibration tokens .*fix:"):
        Stats(gram, 0).check("h.0.q")
