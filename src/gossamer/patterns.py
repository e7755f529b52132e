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


def block_sums(scores: Tensor, rows: int = 4, width: int = 1) -> Tensor:
    """[ceil(M/rows), ceil(K/width)]: the sum over each block of `scores` [M, K]; blocks at the edge are smaller."""
    m, k = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -k % width, 0, -m % rows))
    return padded.view(-(-m // rows), rows, -(-k // width), width).sum((1, 3))


def spread(blocks: Tensor, shape: tuple[int, int], rows: int = 4, width: int = 1) -> Tensor:
    """[M, K] of `shape`: what `blocks` [ceil(M/rows), ceil(K/width)] says of the block that each entry is in."""
    return blocks.repeat_interleave(rows, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]
