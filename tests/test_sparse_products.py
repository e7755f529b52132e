"""The products of 2:4 training on sparse tensor cores."""

import pytest
import torch

from gossamer import patterns
from gossamer.train import ffn24
from gossamer.train.products import Products
from gossamer.train.sparse_products import SparseProducts


def test_without_a_gpu_they_are_the_dense_ones() -> None:
    x, dz = torch.randn(16, 8), torch.randn(16, 12)
    w = torch.where(patterns.hard24(torch.randn(12, 8)), 1.0, 0.0)
    ours, dense = SparseProducts(tiles=True), Products()
    assert torch.equal(ours.forward(x, w), dense.forward(x, w))
    assert torch.equal(ours.grad_input(dz, w), dense.grad_input(dz, w))
    assert torch.equal(ours.grad_weight(dz, x), dense.grad_weight(dz, x))
    assert not ours.plain
    torch.manual_seed(1)
    sampled = SparseProducts(mvue=True).grad_weight(dz, x)
    torch.manual_seed(1)
    assert torch.equal(sampled, Products(mvue=True).grad_weight(dz, x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_three_sparse(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn24, "WORTH", float("inf"))
    ffn24.worth.cache_clear()
    x, dz = (torch.randn(256, n, device="cuda", dtype=dtype) for n in (128, 192))
    w = torch.randn(192, 128, device="cuda", dtype=dtype)
    w = torch.where(patterns.transposable24(w), w, 0)
    ours, dense = SparseProducts(mvue=True, tiles=True), Products()
    for found, expected, loose in (
        (ours.forward(x, w), dense.forward(x, w), 1e-2),
        (ours.grad_input(dz, w), dense.grad_input(dz, w), 1e-2),
        (ours.grad_weight(dz, x), dense.grad_weight(dz, x), 1.0),
    ):
        assert float((found.float() - expected.float()).norm() / expected.float().norm()) < loose
    ffn24.worth.cache_clear()
