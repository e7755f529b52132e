"""CSR rows, cut into segments of balanced length, in plain float32: exact products, and rows of very unequal length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ... import nvrtc
from .. import KIND, Csr, Packed, SpmmKernel, Way
from .._columns import columns_of, padded, processors

THREADS, WARP = 128, 32
# Entries of a team in flight, lanes of a team at most: narrow teams find more of B's rows in a multiprocessor's cache.
KNOBS = ((4, 32), (8, 32), (8, 8), (8, 4))
LONG = 4  # rounds of entries after which a segment may get a block of its own
SHORTEST = 4  # rounds of a block in the shortest segment of a row that is cut
WARPS_PER_SM = 48  # that should have a segment


@cache
def function(kind: int, team: int, par: int, loads: int, unroll: int, entry: str = "spmm_rows") -> nvrtc.Function:
    args = {"spmm_rows": "PPPPPPiiii", "spmm_rows_sum": "PPPi", "sddmm": "PPPPPqiii"}[entry]
    macros = {"TYPE": kind, "TEAM": team, "PAR": par, "LOADS": loads, "UNROLL": unroll}
    return nvrtc.Function("spmm_rows.cuh", entry, args, macros)


VARIANTS = (
    function(0, 1, 8, 1, 4),
    function(1, 32, 1, 2, 2),
    function(2, 8, 4, 1, 8),
    function(0, 1, 1, 1, 1, "spmm_rows_sum"),
    function(2, 8, 1, 1, 1, "sddmm"),
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
        return [Way(cls.name, (("unroll", unroll), ("team", team))) for unroll, team in KNOBS]

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        mean = a.nnz / max(1, int((a.lengths > 0).sum()))
        meta = {"shape": list(a.shape), "mean": mean} | dict(zip(("unroll", "team"), KNOBS[0], strict=True)) | knobs
        return cls._cut(Packed((a.pointers, a.cols, a.values), meta), n)

    @classmethod
    def refit(cls, packed: Packed, n: int) -> Packed:
        return cls._cut(Packed(packed.tensors[2:], packed.meta), n)

    @classmethod
    def _cut(cls, packed: Packed, n: int) -> Packed:
        pointers, _, values = packed.tensors
        knobs = packed.meta["unroll"], packed.meta["team"]
        cut = Cut.of(n, values.element_size(), packed.meta["mean"], len(values), *knobs, values.device)
        segments, longs, slots = cut_rows(pointers, cut.limit)
        wide = int((segments[:, 2] - segments[:, 1] > cut.whole).sum())
        return Packed((segments, longs, *packed.tensors), packed.meta | {"slots": slots, "wide": wide})

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        segments, longs, _, cols, values = packed
        kind, n = KIND[b.dtype], b.shape[1]
        b, width = padded(b)
        team, par, loads = shape_of(width, b.element_size(), meta["mean"], meta["team"])
        c = b.new_empty(meta["shape"][0], width)
        partial = torch.empty(meta["slots"], width, device=b.device)
        blocks = meta["wide"] + -(-team * par * (len(segments) - meta["wide"]) // THREADS)
        grid = blocks, -(-width // (team * loads * 16 // b.element_size())), 1
        tensors = segments, cols, values, b, c, partial
        if len(segments) and width:
            kernel = function(kind, team, par, loads, meta["unroll"] // loads)
            sizes = len(segments), meta["wide"], width, b.stride(0)
            kernel.launch(grid, (THREADS, 1, 1), *tensors, *sizes)
        if meta["slots"] and width:
            grid = len(longs), -(-width // THREADS), 1
            function(kind, 1, 1, 1, 1, "spmm_rows_sum").launch(grid, (THREADS, 1, 1), longs, partial, c, width)
        return columns_of(c, n)

    @classmethod
    def revalued(cls, packed: Sequence[Tensor], values: Tensor) -> Sequence[Tensor]:
        return *packed[:4], values


def shape_of(width: int, size: int, mean: float, most: int) -> tuple[int, int, int]:
    """Lanes per entry, entries at a time, loads per lane, for rows of B of `width` numbers of `size` bytes."""
    vectors = width * size // 16
    team = min(most, 1 << max(0, vectors - 1).bit_length())
    loads = 2 if team == WARP and vectors > WARP else 1
    par = next(p for p in (32, 16, 8, 4, 2, 1) if p <= 32 // team and (p == 1 or 2 * p <= mean))
    return team, par, loads


class Cut(NamedTuple):
    """A row of more than `limit` entries is cut, a segment of more than `whole` gets a block of its own."""

    limit: int
    whole: int

    @classmethod
    def of(cls, n: int, size: int, mean: float, nnz: int, unroll: int, most: int, device: torch.device | None) -> Cut:
        """No chain of rounds should last longer than a fair share of all, or than a few rounds if that is more."""
        team, par, loads = shape_of(-(-n * size // 16) * 16 // size, size, mean, most)
        tiles = -(-n * size // (16 * team * loads))
        rounds = nnz * tiles * team / (WARP * unroll // loads * WARPS_PER_SM * processors(device))
        step = unroll // loads * THREADS // team
        return cls(round(max(SHORTEST, rounds) * step), round(max(LONG, rounds) * unroll // loads * par))


def cut_rows(pointers: Tensor, limit: int) -> tuple[Tensor, Tensor, int]:
    """Segments int32 [S, 4] of (row, begin, end, slot), long ones first, those of about one length in A's order.

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
    size = torch.ceil(torch.log2((end - begin + 1).double())).long()
    return segments[torch.argsort(size, descending=True, stable=True)], longs, int(slots[-1])


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
