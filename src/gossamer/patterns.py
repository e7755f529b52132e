"""Scores -> masks, and the 2:4 projections of training. Pure functions, plain torch: the oracles of faster versions.

Higher scores survive; how ties fall is fixed but, unless said, not specified.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

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


def hard24(w: Tensor) -> Tensor:
    """Bool mask [..., K]: the two largest magnitudes of every aligned four. Ties: the first; NaN counts as infinite."""
    a = _groups(w).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).unbind(-1)
    wins = {(i, j): a[i] >= a[j] for i, j in combinations(range(4), 2)}
    wins |= {(j, i): ~won for (i, j), won in wins.items()}
    kept = [_majority(*(wins[i, j] for j in range(4) if j != i)) for i in range(4)]
    return torch.stack(kept, -1).flatten(-2)


def _majority(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


def soft24(w: Tensor) -> Tensor:
    """S_soft of S-STE (2409.09099): magnitudes less the second smallest of their aligned four, negative ones to +0.0.

    At most two of four are left, only one or none where magnitudes tie. Continuous in `w`; shape and dtype of `w`.
    """
    g = _groups(w)
    t = _second_smallest(*g.abs().unbind(-1)).unsqueeze(-1)
    return (g - torch.minimum(torch.maximum(g, -t), t)).flatten(-2)  # x - x is +0.0, whatever the sign of x


def _second_smallest(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    return torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))


def mse_scale(w: Tensor, s: Tensor) -> Tensor:
    """beta = <w, s> / <s, s>, the scalar that minimises |w - beta s|^2; 1 where s is all zeros. Float32 or better."""
    kind = torch.promote_types(w.dtype, torch.float32)
    w, s = w.to(kind), s.to(kind)
    energy = (s * s).sum()
    return torch.where(energy > 0, (w * s).sum() / energy, torch.ones_like(energy))


def is_24(w: Tensor, dim: int = -1) -> bool:
    """Has every aligned group of four along `dim` at most two non-zeros? A last short group counts; NaN is no zero."""
    flat = w.movedim(dim, -1)
    padded = torch.nn.functional.pad(flat != 0, (0, -flat.shape[-1] % 4))
    return bool((_groups(padded).sum(-1) <= 2).all())


@cache
def _transposable() -> Tensor:
    """The 90 patterns [90, 4]: for each row which of the six pairs of columns it keeps, two rows per column."""
    pairs = list(combinations(range(4), 2))
    fair = [c for c in product(range(6), repeat=4) if all(sum(k in pairs[r] for r in c) == 2 for k in range(4))]
    return torch.tensor(fair)


TILES = 1 << 18  # scored at once by transposable24, 90 float32 scores each


def transposable24(w: Tensor) -> Tensor:
    """Bool mask [M, K], M and K multiples of 4: of every 4x4 tile the half with the most |w| that is 2:4 both ways.

    Exact: all 90 patterns are compared (FST, 2404.01847). Ties fall to the first pattern. Two per row and
    two per column of every tile are set, whatever `w` holds.
    """
    m, k = w.shape
    if m % 4 or k % 4:
        raise ValueError(f"shape {m} x {k} has no whole 4x4 tiles; fix: both sizes must be multiples of 4")
    tiles = w.view(m // 4, 4, k // 4, 4).transpose(1, 2).reshape(-1, 4, 4).abs()
    masks = torch.cat([_best_pattern(t) for t in tiles.split(TILES)]) if len(tiles) else tiles.bool()
    return masks.view(m // 4, k // 4, 4, 4).transpose(1, 2).reshape(m, k)


def _best_pattern(tiles: Tensor) -> Tensor:
    """Magnitudes [T, 4, 4] -> bool masks. Sums of pairs, not a GEMM: TF32 would not be exact."""
    left, right = torch.tensor(list(combinations(range(4), 2)), device=tiles.device).unbind(1)
    pairs = tiles.float().nan_to_num(nan=torch.inf)
    pairs = pairs[..., left] + pairs[..., right]
    choices = _transposable().to(tiles.device)
    scores = pairs[:, 0, choices[:, 0]]
    for row in range(1, 4):
        scores += pairs[:, row, choices[:, row]]
    chosen = choices[scores.argmax(1)]
    columns = torch.arange(4, device=tiles.device)
    return (columns == left[chosen].unsqueeze(-1)) | (columns == right[chosen].unsqueeze(-1))


LAST = 1 - 2.0**-23  # the largest uniform: one more than it is still below 2 in float32


def uniforms24(g: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What mvue24 draws: float32 [..., K / 4, 2] in [0, 1), from the generator of the device unless given."""
    return torch.rand(*g.shape[:-1], g.shape[-1] // 4, 2, device=g.device, generator=generator)


def mvue24(g: Tensor, uniforms: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """An unbiased 2:4 estimate of `g` [..., K]: two of four are drawn by magnitude and divided by their probability.

    The approximately minimum-variance estimator of both papers (Chmiel et al., 2203.10991): i with probability
    a_i / S, then j of the others with a_j / (S - a_i). `uniforms` as uniforms24 makes them; drawn where None.
    """
    a, share, u = _shares(g, uniforms, generator)
    first = _draw(a, u[..., 0])
    second = _draw(a.masked_fill(first, 0), u[..., 1])
    rest = _sum_of_others(share)
    odds = share / rest.clamp_min(torch.finfo(rest.dtype).tiny)
    return _scaled(g, first | second, share * (1 + _sum_of_others(odds)))


def mvue24_exact(g: Tensor, uniforms: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The unbiased 2:4 estimate of `g` [..., K] of least variance: p_k = min(1, c |g_k|), two of four in the mean.

    Drawn as systematic samples of these probabilities, with the first of each group's two `uniforms`.
    """
    _, share, u = _shares(g, uniforms, generator)
    most = share == share.amax(-1, keepdim=True)
    rest = _sum_of_others(share)
    # Only the largest can exceed one: it then is kept always, and one of the others by their shares of the rest.
    certain = most & (share > rest)
    left = share.masked_fill(certain, 0).sum(-1, keepdim=True)
    capped = (share / left.clamp_min(torch.finfo(left.dtype).tiny)).clamp_max(1)
    p = torch.where(certain.any(-1, keepdim=True), torch.where(certain, 1.0, capped), 2 * share)
    ends = p.cumsum(-1)
    kept = _holds(ends, u[..., :1]) | _holds(ends, u[..., :1] + 1)
    return _scaled(g, kept, p)


def _shares(g: Tensor, uniforms: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes and their shares of each group's sum [..., K / 4, 4], and the uniforms."""
    a = _groups(g).abs().float()
    u = uniforms24(g, generator) if uniforms is None else uniforms
    if u.shape != (*a.shape[:-1], 2):
        raise ValueError(f"uniforms are {tuple(u.shape)}; fix: {(*a.shape[:-1], 2)}, two for each group of four")
    a = a / a.amax(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)  # so that sums neither over- nor underflow
    return a, a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny), u.float().clamp_max(LAST)


def _draw(a: Tensor, u: Tensor) -> Tensor:
    """One-hot, with probability a_i / sum a; nothing where all are zero."""
    ends = a.cumsum(-1)
    return _holds(ends, u.unsqueeze(-1) * ends[..., 3:])


def _holds(ends: Tensor, x: Tensor) -> Tensor:
    """Bool: the one interval [ends[i - 1], ends[i]) that holds x, if any does."""
    starts = torch.nn.functional.pad(ends[..., :3], (1, 0))
    return (starts <= x) & (x < ends)


def _sum_of_others(a: Tensor) -> Tensor:
    """[..., 4]: the sum of the other three, without the cancellation of `sum - a`."""
    p, q, r, s = a.unbind(-1)
    return torch.stack([q + r + s, p + r + s, p + q + s, p + q + r], -1)


def _scaled(g: Tensor, kept: Tensor, p: Tensor) -> Tensor:
    """g / p where kept, +0.0 elsewhere."""
    kept = kept & (p > 0)
    return torch.where(kept, _groups(g) / p.clamp_min(torch.finfo(p.dtype).tiny), 0.0).flatten(-2).to(g.dtype)


def _groups(w: Tensor) -> Tensor:
    """[..., K] -> [..., K / 4, 4]"""
    if w.shape[-1] % 4:
        raise ValueError(f"the last size, {w.shape[-1]}, is not a multiple of 4; fix: pad it, or leave the layer dense")
    return w.unflatten(-1, (w.shape[-1] // 4, 4))


def block_sums(scores: Tensor, rows: int = 4, width: int = 1) -> Tensor:
    """[ceil(M/rows), ceil(K/width)]: the sum over each block of `scores` [M, K]; blocks at the edge are smaller."""
    m, k = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -k % width, 0, -m % rows))
    return padded.view(-(-m // rows), rows, -(-k // width), width).sum((1, 3))


def spread(blocks: Tensor, shape: tuple[int, int], rows: int = 4, width: int = 1) -> Tensor:
    """[M, K] of `shape`: what `blocks` [ceil(M/rows), ceil(K/width)] says of the block that each entry is in."""
    return blocks.repeat_interleave(rows, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]
