import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import patterns


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
