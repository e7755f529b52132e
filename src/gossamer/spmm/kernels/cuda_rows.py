"""CSR rows, cut into segments of balanced length, in plain float32: exact products, and rows of very unequal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ... import nvrtc
from .. import KIND, Csr, Packed, SpmmKernel, Way
from .._columns import columns_of, padded, processors

THREADS, WARP = 128, 32
LANES = (THREADS, 32, 16, 8, 4, 2, 1)  # that a segment may get, in the order in which the kernel takes them
# Loads of a lane in flight; lanes of a team at most (narrow ones find more of B's rows in a multiprocessor's cache);
# whether half as many lanes take twice as much of a row each; and for which rows: entries in the mean, at least.
KNOBS = ((4, 32, False, 0), (8, 32, False, 0), (8, 32, True, 0), (8, 8, False, 24), (16, 8, False, 64))
ALONE = 4.0  # rounds of entries, at most, that a team goes through by itself; a longer segment has several
LONG = 4  # rounds of a warp after which a segment may get a block of its own
SHORTEST = 4  # rounds of a block in the shortest segment of a row that is cut
WARPS_PER_SM = 48  # that should have a segment


@cache
def function(kind: int, team: int, loads: int, unroll: int, entry: str = "spmm_rows") -> nvrtc.Function:
    args = {"spmm_rows": "PPPPPPiiiiiiiii", "spmm_rows_sum": "PPPi", "sddmm": "PPPPPqiii"}[entry]
    macros = {"TYPE": kind, "TEAM": team, "LOADS": loads, "UNROLL": unroll}
    return nvrtc.Function("spmm_rows.cuh", entry, args, macros)


VARIANTS = (
    function(0, 1, 1, 4),
    function(1, 32, 2, 2),
    function(2, 8, 1, 8),
    function(2, 16, 2, 4),
    function(2, 32, 4, 2),
    function(0, WARP, 1, 1, "spmm_rows_sum"),
    function(2, 8, 1, 1, "sddmm"),
)


class CudaRows(SpmmKernel):
    """float32, float16, bfloat16, any shape."""

    name: ClassVar[str] = "cuda_rows"
    live: ClassVar[bool] = True

    @classmethod
    def refuses(cls, a: Csr) -> str | None:
        return nvrtc.refusal(a.device) or (None if a.dtype in KIND else "float32, float16 or bfloat16 values")

    @classmethod
    def ways(cls, a: Csr, tf32: bool, deterministic: bool = True) -> list[Way]:
        mean = mean_of(a)
        return [Way(cls.name, named(unroll, team, double)) for unroll, team, double, least in KNOBS if mean >= least]

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        meta = {"shape": list(a.shape)} | dict(named(*KNOBS[0][:3])) | knobs
        return cls._cut(Packed((a.pointers, a.cols, a.values), meta), n)

    @classmethod
    def refit(cls, packed: Packed, n: int) -> Packed:
        return cls._cut(Packed(packed.tensors[2:], packed.meta), n)

    @classmethod
    def _cut(cls, packed: Packed, n: int) -> Packed:
        pointers, _, values = packed.tensors
        cut = Cut.of(n, values.element_size(), len(values), packed.meta, values.device)
        segments, longs, slots = cut_rows(pointers, cut.limit)
        segments, counts = by_lanes(segments, cut)
        return Packed((segments, longs, *packed.tensors), packed.meta | {"slots": slots, "counts": counts})

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        segments, longs, _, cols, values = packed
        kind, n = KIND[b.dtype], b.shape[1]
        b, width = padded(b)
        c = b.new_empty(meta["shape"][0], width)
        partial = torch.empty(meta["slots"], width, device=b.device)
        if len(segments) and width:
            shape = shape_of(width, b.element_size(), meta["team"], meta["double"])
            counts, blocks = launched(tuple(meta["counts"]), shape.team)
            grid = blocks, -(-width // (shape.bytes // b.element_size())), 1
            kernel = function(kind, *shape, meta["unroll"] // shape.loads)
            kernel.launch(grid, (THREADS, 1, 1), segments, cols, values, b, c, partial, *counts, width, b.stride(0))
        if meta["slots"] and width:
            grid = len(longs), -(-width // THREADS), 1
            function(kind, WARP, 1, 1, "spmm_rows_sum").launch(grid, (THREADS, 1, 1), longs, partial, c, width)
        return columns_of(c, n)

    @classmethod
    def revalued(cls, packed: Sequence[Tensor], values: Tensor) -> Sequence[Tensor]:
        return *packed[:4], values


def named(unroll: int, team: int, double: bool) -> tuple[tuple[str, int], ...]:
    return ("unroll", unroll), ("team", team), ("double", double)


def mean_of(a: Csr) -> float:
    """Entries of a row that has some."""
    return a.nnz / max(1, int((a.lengths > 0).sum()))


class Shape(NamedTuple):
    """`team` lanes hold an entry's row of B, `loads` vectors of 16 bytes each."""

    team: int
    loads: int

    @property
    def bytes(self) -> int:
        return 16 * self.team * self.loads


def shape_of(width: int, size: int, most: int, double: bool) -> Shape:
    """For rows of B of `width` numbers of `size` bytes and at most so many lanes; `double`: half of them, if it may."""
    vectors = -(-width * size // 16)
    team = min(most, 1 << max(0, vectors - 1).bit_length())
    if team == WARP and vectors > WARP:
        return Shape(team, 4 if double and vectors > 2 * WARP else 2)
    return Shape(team // 2, 2) if double and team > 1 else Shape(team, 1)


class Cut(NamedTuple):
    """A row of more than `limit` entries is cut, a segment of more than `whole` gets a block of its own.

    A segment of at most `alone` entries gets one team of `team` lanes.
    """

    limit: int
    whole: int
    alone: int
    team: int

    @classmethod
    def of(cls, n: int, size: int, nnz: int, knobs: dict[str, Any], device: torch.device | None) -> Cut:
        """No chain of rounds should last longer than a fair share of all, or than a few rounds if that is more."""
        shape = shape_of(n, size, knobs["team"], knobs["double"])
        step = knobs["unroll"] // shape.loads  # entries of a team in flight
        tiles = -(-n * size // shape.bytes)
        rounds = nnz * tiles * shape.team / (WARP * step * WARPS_PER_SM * processors(device))
        limit, whole = max(SHORTEST, rounds) * THREADS, max(LONG, rounds) * WARP
        alone = round(min(ALONE, max(1.0, rounds)) * step)
        return cls(round(limit * step / shape.team), round(whole * step / shape.team), alone, shape.team)

    def lanes(self, length: int) -> int:
        """That a segment of so many entries gets."""
        teams = 1 << math.ceil(math.log2(max(1.0, length / self.alone)))
        return THREADS if length > self.whole else min(WARP, self.team * teams)


def cut_rows(pointers: Tensor, limit: int) -> tuple[Tensor, Tensor, int]:
    """Segments int32 [S, 4] of (row, begin, end, slot), in A's order.

    Also the rows that were cut, int32 [L, 3] of (row, first slot, end slot), and how many slots there are.
    """
    lengths = pointers.diff()
    parts = (-(-lengths // limit)).clamp(min=1)
    begins = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    total = int(begins[-1])
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), parts, output_size=total)
    index = torch.arange(total, device=lengths.device) - begins[row]
    begin = pointers[row] + lengths[row] * index // parts[row]
    end = pointers[row] + lengths[row] * (index + 1) // parts[row]
    cut = parts[row] > 1
    slot = torch.where(cut, cut.cumsum(0) - 1, -1)
    segments = torch.stack([row, begin, end, slot], 1).to(torch.int32)
    several = (parts > 1).nonzero().flatten()
    slots = _starts(parts[several])
    longs = torch.stack([several, slots[:-1], slots[1:]], 1).to(torch.int32)
    return segments, longs, int(slots[-1])


def by_lanes(segments: Tensor, cut: Cut) -> tuple[Tensor, list[int]]:
    """Segments that get many lanes first, long ones before short ones, those of about one length as they lay.

    Also how many get each of LANES.
    """
    lengths = (segments[:, 2] - segments[:, 1]).double()
    teams = torch.exp2(torch.ceil(torch.log2((lengths / cut.alone).clamp(min=1))))
    lanes = torch.where(lengths > cut.whole, THREADS, (cut.team * teams).clamp(max=WARP)).long()
    about = torch.ceil(torch.log2(lengths + 1)).long()
    counts = torch.bincount(lanes, minlength=THREADS + 1).tolist()
    return segments[torch.argsort(lanes * 64 + about, descending=True, stable=True)], [counts[x] for x in LANES]


@lru_cache(maxsize=256)
def launched(counts: tuple[int, ...], team: int) -> tuple[tuple[int, ...], int]:
    """Counts for teams of so many lanes, which B may ask for that is wider than was packed for; and the blocks."""
    at = LANES.index(team)
    counts = (*counts[:at], sum(counts[at:]), *[0] * (len(LANES) - 1 - at))
    return counts, sum(-(-count * lanes // THREADS) for count, lanes in zip(counts, LANES, strict=True))


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
