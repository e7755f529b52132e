"""The feed-forward block of 2:4 training."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.cslt import CsltError
from gossamer.cuda_patterns import mask_of
from gossamer.train import ffn24
from gossamer.train.ffn24 import Pruned, Recipe


def as_dense(w: Tensor, masks: Tensor | None = None) -> Pruned:
    nothing = torch.empty(0)
    return Pruned((w.shape[0], w.shape[1]), nothing, None, False, (w, masks))


def test_what_runs_dense_is_made_when_asked_for() -> None:
    w, masks = torch.randn(8, 4), torch.tensor([[0xEE44], [0xEE44]]).to(torch.int16)
    assert torch.equal(as_dense(w).dense, w)
    assert torch.equal(as_dense(w, masks).dense, torch.where(mask_of(masks), w, 0))


def test_products_without_sparse_ones_are_dense() -> None:
    x, w, dz = torch.randn(16, 8), torch.randn(24, 8), torch.randn(16, 24)
    pruned = as_dense(w)
    assert torch.allclose(ffn24.multiply_back(dz, pruned), dz @ w)
    assert torch.equal(ffn24.weight_gradient(dz, x, None), dz.mT @ x)
    assert not ffn24.estimates(pruned, x)


def test_bad_input() -> None:
    x, w_in, w_out = torch.randn(64, 64), torch.randn(192, 64), torch.randn(64, 64)
    with pytest.raises(ValueError, match="F or 2 F rows for F columns"):
        ffn24.ffn24(x, w_in, w_out, as_dense(w_in), as_dense(w_out))
    with pytest.raises(CsltError, match="ffn24 needs an NVIDIA GPU; fix"):
        ffn24.ffn24(x, w_in[:128], w_out, as_dense(w_in[:128]), as_dense(w_out))
    with pytest.raises(ValueError, match=r"x has 32 features, w_in 64 columns, w_out 64 rows; fix"):
        ffn24.ffn24(x[:, :32], w_in[:128], w_out, as_dense(w_in[:128]), as_dense(w_out))
    with pytest.raises(ValueError, match=r"\(64, 64\) pruned of \(128, 64\); fix: ffn24.prune the same weight"):
        ffn24.ffn24(x, w_in[:128], w_out, as_dense(w_in[:64]), as_dense(w_out))
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 on cpu, a weight torch.float32 on cpu; fix"):
        ffn24.ffn24(x.bfloat16(), w_in[:128], w_out, as_dense(w_in[:128]), as_dense(w_out))


def reference(x: Tensor, w_in: Tensor, w_out: Tensor, act: str) -> Tensor:
    z = F.linear(x, w_in)
    gate, up = z.chunk(2, -1) if w_in.shape[0] == 2 * w_out.shape[1] else (z, None)
    h = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
    return F.linear(h if up is None else h * up, w_out)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["s_ste", "transposable", "fst"])
@pytest.mark.parametrize(("act", "gated"), [("silu", True), ("gelu_tanh", False), ("gelu_tanh", True)])
@pytest.mark.parametrize("always", [True, False])
def test_gradients(recipe: Recipe, act, gated: bool, always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if always:  # sparse even where dense is faster
        monkeypatch.setattr(ffn24, "WORTH", float("inf"))
        ffn24.worth.cache_clear()
    d, ff = 128, 192
    x = torch.randn(2, 128, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w_in = torch.randn(ff * (1 + gated), d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w_out = torch.randn(d, ff, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first, second = ffn24.prune(w_in, recipe), ffn24.prune(w_out, recipe)
    y = ffn24.ffn24(x, w_in, w_out, first, second, act)
    leaves = [t.detach().float().requires_grad_() for t in (x, first.dense, second.dense)]
    expected = reference(leaves[0], leaves[1], leaves[2], act)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.float())
    assert error(y, expected) < 2e-2
    assert x.grad is not None and w_in.grad is not None and w_out.grad is not None
    assert error(x.grad, leaves[0].grad) < 3e-2  # type: ignore[arg-type]
    loose = 1.5 if recipe == "fst" else 3e-2  # of an estimate with about half of the energy as variance
    assert error(w_in.grad, leaves[1].grad) < loose and error(w_out.grad, leaves[2].grad) < loose  # type: ignore[arg-type]
    ffn24.worth.cache_clear()
