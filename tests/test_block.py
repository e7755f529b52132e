"""Whole blocks of 4 outputs by 1 or 4 inputs: which survive, what they become, what they take."""

import pytest
import torch
from torch import Tensor

from gossamer import methods, patterns
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.methods import RatioError, dense_bytes
from gossamer.methods.block import Block, refit
from gossamer.stats import Stats


def layer(m: int = 96, k: int = 64, seed: int = 0) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x = x * torch.logspace(0, -1, k)
    return torch.randn(m, k, generator=generator), Stats((x.mT @ x).double(), 1024)


def test_sums_and_spread_of_blocks() -> None:
    a = torch.arange(30.0).view(5, 6)
    sums = patterns.block_sums(a, 4, 4)
    assert torch.equal(sums, torch.tensor([[a[:4, :4].sum(), a[:4, 4:].sum()], [a[4:, :4].sum(), a[4:, 4:].sum()]]))
    chosen = patterns.spread(torch.tensor([[True, False], [False, True]]), (5, 6), 4, 4)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[:4, :4] = expected[4:, 4:] = True
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("shape", [(96, 64), (30, 41), (3, 2)])
def test_as_many_blocks_survive_as_were_asked_for(score: str, width: int, shape: tuple[int, int]) -> None:
    weight, stats = layer(*shape)
    blocks = patterns.block_sums(weight, width=width).numel()
    for keep in {1, blocks // 3 or 1, blocks}:
        pruned = Block(score=score, width=width).prune(weight, stats, keep)
        assert int((patterns.block_sums(pruned.abs(), width=width) > 0).sum()) == keep
        whole = patterns.spread(patterns.block_sums(pruned.abs(), width=width) > 0, shape, width=width)
        assert torch.equal(whole, pruned != 0), "a block is kept whole"


def test_the_chosen_blocks_have_the_highest_scores() -> None:
    weight, stats = layer()
    energy = stats.gram.diagonal().float()
    for score, values in (("magnitude", weight**2), ("wanda", weight**2 * energy)):
        sums = patterns.block_sums(values)
        kept = patterns.block_sums(Block(score=score).prune(weight, stats, 500).abs()) > 0
        assert sums[kept].min() >= sums[~kept].max()


def test_more_knowledge_means_less_error() -> None:
    weight, stats = layer()

    def lost(**knobs: object) -> float:
        return stats.relative_error(weight, methods.create("block", **knobs).prune(weight, stats, 500))

    assert lost(score="obs") < lost(score="obs", rounds=1) < lost(score="wanda") < lost(score="magnitude")
    elementwise = methods.create("sparsegpt").fit([weight], stats, 0.6)[0].decode(torch.float32)
    assert lost() > stats.relative_error(weight, elementwise) * 0.5, "blocks cannot beat free choice by far"


def test_survivors_are_the_least_squares_of_their_support() -> None:
    weight, stats = layer(8, 24)
    gram = stats.damped(0.01)
    mask = patterns.spread(torch.rand(2, 24) < 0.5, (8, 24))
    found = refit(weight.double(), mask, gram, weight.double(), 60)
    for i in range(8):
        s = mask[i]
        best = torch.linalg.solve(gram[s][:, s], (gram @ weight[i].double())[s])
        assert torch.allclose(found[i, s], best, rtol=1e-4, atol=1e-6)
    assert not found[~mask].any()


@pytest.mark.parametrize("format", ["bitmask", "bsr_int8"])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("shape", [(96, 64), (30, 41)])
def test_a_sparsity_has_a_ratio_and_it_is_kept(format: str, width: int, shape: tuple[int, int]) -> None:
    weight, stats = layer(*shape)
    method = Block(format=format, width=width)
    blocks = patterns.block_sums(weight, width=width).numel()
    for sparsity in (0.0, 0.5, 0.8):
        ratio = method.ratio(shape, sparsity)
        stored = method.fit([weight], stats, ratio)[0]
        kept = int((patterns.block_sums(stored.decode(torch.float32).abs(), width=width) > 0).sum())
        assert kept == pytest.approx((1 - sparsity) * blocks, abs=2)
        assert stored.nbytes <= method.size([shape], ratio)[0] <= (1 - ratio) * dense_bytes(shape) + 1e-6


def test_int8_costs_little_beside_pruning() -> None:
    weight, stats = layer()
    method = Block(format="bsr_int8")
    found = method.fit([weight], stats, method.ratio((96, 64), 0.7))[0]
    assert isinstance(found, BsrInt8) and found.block == (4, 1)
    exact = method.prune(weight, stats, len(found.weight))
    assert (found.decode() - exact).abs().amax(1).le(0.501 * found.scale).all()


def test_bad_knobs_and_numbers_are_refused() -> None:
    for knobs, text in (
        ({"score": "random"}, "score is"),
        ({"format": "nm24"}, "format is"),
        ({"width": 2}, "width is"),
        ({"rounds": 0}, "at least 1"),
        ({"damp": 0.0}, "damp is above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            methods.create("block", **knobs)
    with pytest.raises(ValueError, match=r"below 1, not 1\.0"):
        Block().ratio((8, 8), 1.0)
    with pytest.raises(RatioError, match=r"out of reach for \(8, 8\); at most 0\.7031"):
        Block(format="bsr_int8").size([(8, 8)], 0.95)


def test_scores_without_statistics() -> None:
    weight, _ = layer()
    assert Block(score="magnitude").fit([weight], None, 0.5)[0].shape == (96, 64)
    with pytest.raises(ValueError, match="'wanda' needs calibration statistics"):
        Block(score="wanda").fit([weight], None, 0.5)
