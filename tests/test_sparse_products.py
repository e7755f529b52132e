"""The products of 2:4 training on sparse tensor cores."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import patterns
from gossamer.cslt import Problem
from gossamer.train import FST, SSTE, Dense, ffn24, sparsify
from gossamer.train.products import Products
from gossamer.train.sparse_products import SparseProducts

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def all_worth(monkeypatch: pytest.MonkeyPatch):
    """Small sizes are computed sparse, too."""
    monkeypatch.setattr(ffn24, "WORTH", float("inf"))
    ffn24.worth.cache_clear()
    yield
    ffn24.worth.cache_clear()


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


def test_they_stay_whole_under_compilation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sparsify(net, FST(dense_tail=0), filter="*", products="sparse")
    x, found = torch.randn(8, 16), []
    torch._dynamo.reset()
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)  # of the estimate
        run(x).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
        net.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_the_ops_keep_the_rules_of_torch() -> None:
    x, w = torch.randn(16, 8), torch.randn(12, 8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gossamer.product24.default, (x, w), test_utils=checks)
    torch.library.opcheck(torch.ops.gossamer.product24.default, (torch.randn(16, 12), w.mT), test_utils=checks)
    torch.library.opcheck(
        torch.ops.gossamer.estimated24.default, (torch.randn(16, 12), x), test_utils="test_faketensor"
    )


def test_weights_that_are_not_2_of_4_are_refused() -> None:
    with pytest.raises(ValueError, match="are not 2:4, sparse products would prune them; fix"):
        sparsify(nn.Linear(8, 8), Dense(), filter="*", products="sparse")


def test_gpus_and_sizes_without_sparse_products_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn24.worth.cache_clear()
    fits = Problem(32, 32, 32, torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(ffn24.cslt, "refusal", lambda device: "a GPU of compute capability 8.0 (Ampere) or later")
    assert ffn24.worth(fits, 0) is None
    ffn24.worth.cache_clear()
    monkeypatch.setattr(ffn24.cslt, "refusal", lambda device: None)
    monkeypatch.setattr(ffn24.cslt_search, "best", lambda *_: pytest.fail("a size that the library refuses was tried"))
    assert all(ffn24.worth(fits._replace(**odd), 0) is None for odd in ({"rows": 20}, {"depth": 40}, {"columns": 12}))
    ffn24.worth.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_three_sparse(dtype: torch.dtype, all_worth: None) -> None:
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


@pytest.mark.gpu
def test_a_projection_of_s_ste_multiplies_as_exactly_as_dense(all_worth: None) -> None:
    layer = nn.Linear(128, 192, bias=False, device="cuda")
    with torch.no_grad():
        layer.weight[:64].mul_(torch.rand(64, 128, device="cuda") < 0.3)  # groups with three zeros and four
        layer.weight[64:72].fill_(0.01)  # ties
    (layer,) = sparsify(layer, SSTE(), filter=lambda name, module: True).layers
    w, x = layer.projected().bfloat16(), torch.randn(512, 128, device="cuda", dtype=torch.bfloat16)
    exact = x.double() @ w.double().mT
    ours, dense = (
        float((p.forward(x, w).double() - exact).norm() / exact.norm()) for p in (SparseProducts(), Products())
    )
    assert 0 < ours < 1.05 * dense < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "apart"), [("s_ste", 0.02), ("fst_no_mvue", 0.02), ("fst", 0.2)])
def test_captured_steps_train_as_with_dense_products(
    method: str, apart: float, all_worth: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps as CUDA graphs, compressing, timing in the first step, and a dense tail included."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from pretrain.llama import SHAPES, Shape
    from pretrain.loop import Run, Training

    monkeypatch.setitem(SHAPES, "small", Shape(2, 2, 64, 128, 64))
    text = torch.randint(97, 123, (20000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    calls, curves = [], []
    matmul = ffn24.cslt.matmul
    monkeypatch.setattr(ffn24.cslt, "matmul", lambda *given: calls.append(given[1]) or matmul(*given))
    for products in ("dense", "sparse"):
        torch._dynamo.reset()
        run, curve = Run(method, None, "small", 48, 16, 1, 1e-2, 4, 0, 8, products), []
        training = Training(run, text, compile=True)
        assert training.captured is not None
        training.train(curve.append)
        curves.append(curve)
        assert bool(calls) == (products == "sparse")
    for dense, sparse in zip(*curves, strict=True):
        assert sparse["loss"] == pytest.approx(dense["loss"], abs=apart)
    assert curves[1][-1]["loss"] < 3.3  # 26 letters by chance: 3.26 nats; it begins at 5.5
    assert len(set(calls)) == {"s_ste": 2, "fst_no_mvue": 2, "fst": 4}[method]
