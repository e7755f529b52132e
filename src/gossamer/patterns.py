"""Scores -> masks. Pure functions: higher scores survive; how ties fall is fixed but not specified."""

from __future__ import annotations

import torch
from torch import Tensor


def top(scores: Tensor, keep: int) -> Tensor:
    """Bool mask of the `keep` highest entries of the whole tensor; exactly `keep` are set."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(scores.flatten(), keep, sorted=False).indices] = True
    return mask.view(scores.shape)


def top_per_row(scores: Tensor, keep: int) -> Tensor:
    """Bool mask of the `keep` highest entries of each row (last dimension); exactly `keep` are set."""
    index = torch.topk(scores, keep, dim=-1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, index, True)


def balanced(scores: Tensor, keep: int) -> Tensor:
    """Bool mask [M, K] of exactly `keep` entries: the same number in each row, the rest to the best that are left."""
    rows = scores.shape[0]
    mask = top_per_row(scores, keep // rows)
    return mask | top(scores.masked_fill(mask, -torch.inf), keep % rows)


def nm(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Bool mask [..., K] of the `n` highest of every `m` consecutive entries; a last short group keeps at most `n`."""
    k = scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, -k % m), value=-torch.inf).unflatten(-1, (-(-k // m), m))
    index = torch.topk(padded, n, dim=-1, sorted=False).indices
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=scores.device).scatter_(-1, index, True)
    return mask.flatten(-2)[..., :k]
