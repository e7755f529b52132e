"""What makes a code sparse: each maps pre-activations (..., d) to codes with exact zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReLU(nn.ReLU):
    """Non-negative codes, as many non-zeros as the penalty leaves."""

    def config(self) -> dict:
        return {"activation": "relu"}


class SThresh(nn.Module):
    """Soft threshold ReLU(x - t) - ReLU(-x - t): signed codes, exactly zero inside the dead zone (eq. 7)."""

    def __init__(self, threshold: float = 0.05) -> None:
        if threshold < 0:
            raise ValueError(f"threshold {threshold} is negative; fix: pass one >= 0, 0.05 suits unit vectors")
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softshrink(x, self.threshold)

    def config(self) -> dict:
        return {"activation": "sthresh", "threshold": self.threshold}

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class TopK(nn.Module):
    """The k largest pre-activations of a row, where positive. While training, k falls from `start` to `k`.

    Annealing keeps columns alive that a small k would never let learn: `anneal` says how far training is, and k goes
    down linearly (the schedule of CSRv2, arXiv 2602.05735). Out of training it is always `k`.
    """

    def __init__(self, k: int = 32, start: int | None = None) -> None:
        if k < 1 or (start is not None and start < k):
            raise ValueError(f"k={k}, start={start} is no schedule; fix: 1 <= k <= start")
        super().__init__()
        self.k, self.start = k, start if start is not None else 4 * k
        self.progress = 0.0

    def anneal(self, progress: float) -> None:
        """`progress`: the share of the annealing that is over; beyond 1 it stays over."""
        self.progress = min(max(progress, 0.0), 1.0)

    @property
    def kept(self) -> int:
        """The k of this moment."""
        return round(self.start + (self.k - self.start) * self.progress) if self.training else self.k

    def forward(self, x: Tensor) -> Tensor:
        return keep_largest(x.relu(), self.kept)

    def config(self) -> dict:
        return {"activation": "topk", "k": self.k, "start": self.start}

    def extra_repr(self) -> str:
        return f"k={self.k}, start={self.start}"


def keep_largest(x: Tensor, k: int) -> Tensor:
    """`x` (..., d) with all but the k entries of largest magnitude in each row set to zero."""
    if k >= x.shape[-1]:
        return x
    at = x.detach().abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, at, x.gather(-1, at))


def create(activation: str, **options: float) -> nn.Module:
    """An activation by its name: relu, sthresh (threshold) or topk (k, start)."""
    kinds = {"relu": ReLU, "sthresh": SThresh, "topk": TopK}
    if activation not in kinds:
        raise ValueError(f"no activation {activation!r}; fix: one of {', '.join(kinds)}")
    return kinds[activation](**options)
