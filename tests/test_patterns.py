import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import patterns
from gossamer.patterns import LAST


@given(st.integers(1, 20), st.integers(1, 40), st.data())
def test_counts_are_exact(m: int, k: int, data: st.DataObject) -> None:
    scores = torch.rand(m, k)
    keep = data.draw(st.integers(0, m * k))
    assert int(patterns.top(scores, keep).sum()) == keep
    mask = patterns.balanced(scores, keep)
    assert int(mask.sum()) == keep
    assert int(mask.sum(1).max()) - int(mask.sum(1).min()) <= max(1, keep % m)
    row = data.draw(st.integers(0, k))
    assert (patterns.top_per_row(scores, row).sum(1) == row).all()


def test_equal_scores_do_not_add_entries() -> None:
    scores = torch.ones(8, 16)
    assert int(patterns.top(scores, 5).sum()) == 5
    assert (patterns.top_per_row(scores, 3).sum(1) == 3).all()
    assert (patterns.nm(scores).view(8, 4, 4).sum(-1) == 2).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 7), (1, 1), (16, 16)])
def test_nm_keeps_the_highest_of_each_group(n: int, m: int) -> None:
    scores = torch.rand(5, 3 * m)
    mask = patterns.nm(scores, n, m).view(5, 3, m)
    kept = scores.view(5, 3, m)
    assert (mask.sum(-1) == n).all()
    worst_kept = kept.masked_fill(~mask, torch.inf).amin(-1)
    best_dropped = kept.masked_fill(mask, -torch.inf).amax(-1)
    assert (worst_kept > best_dropped).all()


def test_a_short_last_group_keeps_at_most_n() -> None:
    mask = patterns.nm(torch.rand(3, 10), 2, 4)
    assert mask.shape == (3, 10) and (mask[:, 8:].sum(1) == 2).all()
    assert (patterns.nm(torch.rand(3, 9), 2, 4)[:, 8:].sum(1) == 1).all()


def test_top_keeps_the_highest() -> None:
    scores = torch.tensor([[1.0, 9.0, 3.0], [8.0, 2.0, 7.0]])
    assert patterns.top(scores, 3).tolist() == [[False, True, False], [True, False, True]]
    assert patterns.top_per_row(scores, 1).tolist() == [[False, True, False], [True, False, False]]
    assert patterns.balanced(scores, 3).tolist() == [[False, True, False], [True, False, True]]


EXTREME = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, -3e38, float("inf")]


def groups_of_four(values) -> torch.Tensor:
    return torch.tensor(list(itertools.product(values, repeat=4)))


def test_hard24_keeps_the_two_largest_and_the_first_of_equals():
    w = torch.randn(64, 32)
    assert torch.equal(patterns.hard24(w), patterns.nm(w.abs()))
    every = groups_of_four([*EXTREME, float("nan")])
    mask = patterns.hard24(every)
    assert (mask.sum(-1) == 2).all()
    order = every.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(-1, order[:, :2], True))


def test_soft24_is_the_threshold_of_the_paper_without_negative_zeros():
    w = torch.cat([torch.randn(500, 4), groups_of_four([0.0, -0.0, 1.0, -1.0, 0.25])])
    t = w.abs().sort(-1).values[:, 1:2]
    found = patterns.soft24(w)
    assert torch.equal(found, w.sign() * (w.abs() - t).clamp_min(0))
    assert patterns.is_24(found)
    assert not torch.signbit(found[found == 0]).any()
    assert (patterns.soft24(torch.ones(1, 8)) == 0).all()


@given(st.lists(st.floats(-4, 4), min_size=4, max_size=4), st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_soft24_is_continuous(w: list[float], step: list[float]) -> None:
    w, step = torch.tensor(w, dtype=torch.double), torch.tensor(step, dtype=torch.double) * 1e-3
    moved = patterns.soft24(w + step) - patterns.soft24(w)
    assert moved.norm() <= 2.0 * step.norm() + 1e-12  # the worst local constant is sqrt(3)


def test_mse_scale_is_the_best_and_depends_on_the_distribution_only():
    w = torch.randn(512, 512)
    s = patterns.soft24(w)
    beta = patterns.mse_scale(w, s)
    assert abs(beta - 1.483) < 0.01
    best = (w - beta * s).square().sum()
    assert all((w - (beta + d) * s).square().sum() > best for d in (-0.02, 0.02))
    assert abs(patterns.mse_scale(w.uniform_(-1, 1), patterns.soft24(w)) - 1.751) < 0.01
    assert patterns.mse_scale(torch.ones(4), torch.zeros(4)) == 1
    assert patterns.mse_scale(w.half(), s.half()).dtype == torch.float32


def test_is_24_looks_along_the_axis_asked_for():
    w = torch.zeros(8, 8)
    w[0] = 1
    assert not patterns.is_24(w) and patterns.is_24(w, dim=0)
    assert patterns.is_24(torch.tensor([0.0, -0.0, 1, 2, 3, 4])) and not patterns.is_24(torch.ones(1, 7))
    assert not patterns.is_24(torch.full((4,), torch.nan))
    assert patterns.is_24(torch.empty(0, 8))


def brute_force(tile: torch.Tensor) -> float:
    rows = [r for r in itertools.product((0, 1), repeat=4) if sum(r) == 2]
    masks = torch.tensor(list(itertools.product(rows, repeat=4)))
    fair = masks[(masks.sum(1) == 2).all(1)]
    assert len(fair) == 90
    return float((fair * tile.abs()).sum((1, 2)).max())


def test_transposable24_is_2_of_4_both_ways_and_the_best():
    w = torch.randn(12, 20)
    mask = patterns.transposable24(w)
    for m in (mask, mask.T):
        assert (m.reshape(-1, 4).sum(1) == 2).all()
    kept = (w.abs() * mask).view(3, 4, 5, 4).sum((1, 3))
    best = [[brute_force(w[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]) for j in range(5)] for i in range(3)]
    torch.testing.assert_close(kept, torch.tensor(best))


def test_transposable24_takes_any_values_and_sizes(monkeypatch):
    for w in (torch.zeros(4, 4), torch.full((8, 4), torch.nan), torch.full((4, 8), torch.inf), torch.ones(4, 8).half()):
        mask = patterns.transposable24(w)
        assert patterns.is_24(mask) and patterns.is_24(mask, 0) and mask.sum() == w.numel() // 2
    assert patterns.transposable24(torch.empty(0, 8)).shape == (0, 8)
    w = torch.randn(16, 16)
    whole = patterns.transposable24(w)
    monkeypatch.setattr(patterns, "TILES", 3)
    assert torch.equal(patterns.transposable24(w), whole)
    assert torch.equal(patterns.transposable24(w.T.contiguous().T), whole)


def test_transposable24_keeps_its_share_of_gaussian_weights():
    w = torch.randn(400, 400)
    kept = float((w.abs() * patterns.transposable24(w)).sum() / w.abs().sum())
    assert abs(kept - 0.703) < 0.005


ESTIMATORS = [patterns.mvue24, patterns.mvue24_exact]


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_mvue_is_2_of_4_whatever_is_drawn(estimate):
    edges = torch.tensor(list(itertools.product([0.0, 0.25, 0.5, LAST, 1.0], repeat=2)))
    g = groups_of_four([0.0, -0.0, 1.0, -2.0, 1e-30, 5e37])
    for u in edges:
        found = estimate(g, u.expand(len(g), 1, 2))
        assert patterns.is_24(found) and found.isfinite().all()
        assert not torch.signbit(found[found == 0]).any()
        assert ((g != 0) | (found == 0)).all()
    two = g[(g != 0).sum(1) <= 2]
    torch.testing.assert_close(estimate(two), two)  # nothing to drop, nothing to scale


@pytest.mark.parametrize(("estimate", "variance"), [*zip(ESTIMATORS, (0.503, 0.474), strict=True)])
def test_mvue_is_unbiased_with_the_known_variance(estimate, variance):
    g, draws = torch.randn(64, 4), 20000
    seeded = torch.Generator().manual_seed(1)
    found = estimate(g.expand(draws, 64, 4), generator=seeded)
    error = (found.mean(0) - g).abs() / (found.std(0) / draws**0.5 + 1e-9)
    assert error[found.std(0) > 0].max() < 5
    many = torch.randn(200000, 4)
    relative = (estimate(many, generator=seeded) - many).square().sum() / many.square().sum()
    assert abs(relative - variance) < 0.02


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_mvue_follows_its_uniforms(estimate):
    g = torch.randn(3, 32)
    u = patterns.uniforms24(g)
    assert torch.equal(estimate(g, u), estimate(g, u))
    assert not torch.equal(estimate(g), estimate(g))
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert torch.equal(estimate(g, generator=seeds[0]), estimate(g, generator=seeds[1]))
    assert estimate(g.bfloat16(), u).dtype == torch.bfloat16
    assert torch.equal(estimate(g.T.contiguous().T, u), estimate(g, u))
    with pytest.raises(ValueError, match="two for each group"):
        estimate(g, u[:2])


def test_what_cannot_be_cut_into_fours_is_refused():
    for f in (patterns.hard24, patterns.soft24, patterns.mvue24):
        with pytest.raises(ValueError, match=r"multiple of 4; fix"):
            f(torch.ones(2, 6))
    with pytest.raises(ValueError, match="no whole 4x4 tiles; fix"):
        patterns.transposable24(torch.ones(6, 4))
