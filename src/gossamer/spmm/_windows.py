"""The layout of `cuda_windows`: windows of 8, 16 or 32 rows, each with the columns that any of its rows has.

A window's columns are cut into groups of 16. Per group: 16 columns (-1 where there are no more), and per tile (8 rows
of the window) the values at (row, column), row-major, either all 128 or a mask of 128 bits and those that are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .csr import Csr

DEPTH = 16  # columns of a group
TILE = 8  # rows of a tile
SLOT_BIT, MIXED_BIT, COUNT_BIT = 10, 9, 4


@dataclass(frozen=True, eq=False)
class Layout:
    """`cols` int32 [16 G], `values`, `masks` int32 [4 G tiles], `starts` int32 [G tiles], `first` group int64 [W + 1].

    `order` int32 [M]: the row of A at each place, None if they are as they were.
    """

    rows: int
    shape: tuple[int, int]
    cols: Tensor
    values: Tensor
    masks: Tensor
    starts: Tensor
    first: Tensor
    order: Tensor | None


@dataclass(frozen=True, eq=False)
class Schedule:
    """`works` int32 [blocks * warps, 4] of (window, first group, end group, team), see cuda/spmm_windows.cuh.

    `longs` int32 [L, 3]: windows that fill several blocks, and their slots; `slots`: how many there are.
    """

    works: Tensor
    longs: Tensor
    slots: int


def lay_out(a: Csr, rows: int, masked: bool, order: Tensor | None = None) -> Layout:
    """`order` [M] puts the rows of A in another order."""
    place = a.rows if order is None else _inverse(order)[a.rows]
    keys, vector = torch.unique(place // rows * max(1, a.shape[1]) + a.cols, return_inverse=True)
    window = keys // max(1, a.shape[1])
    counts = torch.bincount(window, minlength=-(-a.shape[0] // rows))
    first, vectors = _starts(-(-counts // DEPTH)), _starts(counts)
    slot = first[window] * DEPTH + torch.arange(len(keys), device=a.device) - vectors[window]
    groups = int(first[-1])
    cols = torch.full((groups * DEPTH,), -1, dtype=torch.int32, device=a.device)
    cols[slot] = (keys % max(1, a.shape[1])).to(torch.int32)
    slot = slot[vector]
    tile = (slot // DEPTH) * (rows // TILE) + place % rows // TILE
    at = (tile * TILE + place % TILE) * DEPTH + slot % DEPTH
    kept = _masked(at, a.values, groups * (rows // TILE)) if masked else _dense(at, a.values, groups * (rows // TILE))
    return Layout(rows, a.shape, cols, *kept, first, None if order is None else order.to(torch.int32))


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _dense(at: Tensor, values: Tensor, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    all_values = values.new_zeros(tiles * TILE * DEPTH)
    all_values[at] = values
    none = torch.empty(0, dtype=torch.int32, device=values.device)
    return all_values, none, none


def _masked(at: Tensor, values: Tensor, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    at, order = torch.sort(at)
    words = torch.zeros(tiles * 4, dtype=torch.int64, device=values.device)
    words.scatter_add_(0, at // 32, torch.ones_like(at) << at % 32)
    starts = _starts(torch.bincount(at // (TILE * DEPTH), minlength=tiles))[:-1]
    return values[order], words.to(torch.int32), starts.to(torch.int32)


def schedule(layout: Layout, limit: int, warps: int) -> Schedule:
    """Windows cut into segments of at most about `limit` groups; the segments of one lie in one block if they fit.

    Teams have 1, 2, 4 .. `warps` warps, large ones first, so that none lies across two blocks.
    """
    groups = layout.first.diff()
    wanted = (-(-groups // limit)).clamp(min=1)
    team = 1 << torch.ceil(torch.log2(wanted.double())).long()
    segments = torch.where(wanted > warps, -(-wanted // warps) * warps, team)
    order = torch.argsort(segments, descending=True, stable=True)
    segments = segments[order]
    begins = _starts(segments)
    total = int(begins[-1])
    owner = torch.repeat_interleave(torch.arange(len(order), device=order.device), segments, output_size=total)
    index = torch.arange(total, device=order.device) - begins[owner]
    first, size, parts = layout.first[order][owner], groups[order][owner], segments[owner]
    works = torch.zeros(-(-total // warps) * warps, 4, dtype=torch.int64, device=order.device)
    works[:, 0] = -1
    works[:, 3] = torch.arange(len(works), device=order.device) % warps | 1 << COUNT_BIT
    works[:total, 0] = order[owner]
    works[:total, 1] = first + size * index // parts
    works[:total, 2] = first + size * (index + 1) // parts
    works[:total, 3] = _teams(index, parts, begins[owner], warps)
    mixed = (works[:, 3] >> COUNT_BIT).view(-1, warps).amax(1) > 1
    works[:, 3] |= mixed.repeat_interleave(warps).long() << MIXED_BIT
    slot = torch.where(parts > warps, torch.arange(total, device=order.device) // warps + 1, 0)
    works[:total, 3] |= slot << SLOT_BIT
    several = segments > warps
    slots = int(segments[several].sum()) // warps
    bounds = begins[:-1][several] // warps, begins[1:][several] // warps
    return Schedule(works.to(torch.int32), torch.stack([order[several], *bounds], 1).to(torch.int32), slots)


def _teams(index: Tensor, parts: Tensor, begin: Tensor, warps: int) -> Tensor:
    """First warp and number of warps of each segment's team within its block."""
    first = torch.where(parts > warps, 0, begin % warps)
    return first | parts.clamp(max=warps) << COUNT_BIT
