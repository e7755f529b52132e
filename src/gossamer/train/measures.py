"""What a run shows of its masks: the flip rate, groups with three zeros, and mu, the flip rate against dense's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..patterns import hard24


def flips(before: Tensor, after: Tensor) -> Tensor:
    """How many entries of two masks differ; an integer scalar on their device."""
    return (before ^ after).sum()


def flip_rate(before: Tensor, after: Tensor) -> float:
    """|m_t - m_(t-1)|_1 / D: the share of mask entries that changed, 0 to 1."""
    return float(flips(before, after)) / max(1, before.numel())


def three_zeros(w: Tensor) -> Tensor:
    """How many aligned groups of four hold three zeros or more; an integer scalar on the device."""
    return (w.unflatten(-1, (-1, 4)).ne(0).sum(-1) < 2).sum()


def virtual_mask(w: Tensor) -> Tensor:
    """The two largest of four: what dense weights would keep, and the same question asked of every method."""
    return hard24(w)


def mu(rates: Mapping[int, float], dense: Mapping[int, float], last: float = 1.0) -> float:
    """Flip rates over those of the dense run, {step: rate}, both averaged over the last share of their common steps."""
    common = sorted(rates.keys() & dense.keys())
    if not common:
        raise ValueError("the two runs were measured at no common step; fix: the same `every` in both")
    taken = common[-max(1, round(len(common) * last)) :]
    reference = sum(dense[s] for s in taken)
    return sum(rates[s] for s in taken) / reference if reference else torch.inf
