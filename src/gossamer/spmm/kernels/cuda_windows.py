"""Windows of rows on the tensor cores: a row of B is fetched once for all rows of a window. See docs/spmm.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import nvrtc
from .. import KIND, Csr, Packed, SpmmKernel, Way
from .._columns import columns_of, padded, processors
from .._windows import Layout, lay_out, schedule

ROWS = (8, 16, 32)
WARPS_PER_SM = 24  # what a schedule aims for
SHORTEST, LONGEST = 2, 48  # groups of a segment
SUM_THREADS = 128


@cache
def function(kind: int, rows: int, cols: int, masked: bool, warps: int) -> nvrtc.Function:
    unroll = 2 if rows * cols <= 32 else 1
    macros = {"TYPE": kind, "ROWS": rows, "COLS": cols, "MASKED": int(masked), "WARPS": warps, "UNROLL": unroll}
    return nvrtc.Function("spmm_windows.cuh", "spmm_windows", "PPPPPPPPPiii", macros)


@cache
def sum_function(kind: int, rows: int) -> nvrtc.Function:
    macros = {"TYPE": kind, "ROWS": rows, "COLS": 1, "MASKED": 0, "WARPS": 1, "UNROLL": 1}
    return nvrtc.Function("spmm_windows.cuh", "spmm_windows_sum", "PPPPii", macros)


# For the tests: every type, height and width with some of the others.
VARIANTS = (
    function(0, 8, 1, True, 4),
    function(1, 8, 8, False, 16),
    function(0, 32, 16, True, 4),
    function(1, 16, 4, True, 4),
    function(2, 8, 1, False, 4),
    function(2, 16, 8, True, 4),
    sum_function(0, 8),
)


class CudaWindows(SpmmKernel):
    """float16, bfloat16, and tf32 products of float32; any shape."""

    name: ClassVar[str] = "cuda_windows"

    @classmethod
    def refuses(cls, a: Csr) -> str | None:
        return nvrtc.refusal(a.device) or (None if a.dtype in KIND else "float32, float16 or bfloat16 values")

    @classmethod
    def ways(cls, a: Csr, tf32: bool, deterministic: bool = True) -> list[Way]:
        if a.dtype == torch.float32 and not tf32:
            return []
        heights = [Way(cls.name, (("rows", r), ("masked", False))) for r in ROWS]
        return [*heights, Way(cls.name, (("rows", 8), ("masked", True)))]

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        values = rounded_to_tf32(a.values) if a.dtype == torch.float32 else a.values
        found = Csr(a.shape, a.pointers, a.cols, values)
        layout = lay_out(found, knobs["rows"], knobs["masked"], knobs.get("order"))
        return planned(layout, n, knobs)

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        works, longs, cols, values, masks, starts, order, _ = packed
        m, rows, kind, n = meta["shape"][0], meta["rows"], KIND[b.dtype], b.shape[1]
        b, width = padded(b)
        c = b.new_empty(m, width)
        if not m or not width:
            return columns_of(c, n)
        partial = torch.empty(meta["slots"], rows, width, device=b.device)
        per_lane = lane_columns(width, kind, rows)
        grid = works.shape[0] // meta["warps"], -(-width // (8 * per_lane)), 1
        kernel = function(kind, rows, per_lane, meta["masked"], meta["warps"])
        tensors = works, cols, values, masks, starts, order, b, c, partial
        kernel.launch(grid, (32 * meta["warps"], 1, 1), *tensors, m, width, b.stride(0))
        if meta["slots"]:
            grid = len(longs), rows, -(-width // SUM_THREADS)
            sum_function(kind, rows).launch(grid, (SUM_THREADS, 1, 1), longs, order, partial, c, m, width)
        return columns_of(c, n)

    @classmethod
    def refit(cls, packed: Packed, n: int) -> Packed:
        _, _, cols, values, masks, starts, order, first = packed.tensors
        meta = packed.meta
        placed = order if order.numel() else None
        layout = Layout(meta["rows"], tuple(meta["shape"]), cols, values, masks, starts, first, placed)
        return planned(layout, n, {})


def planned(layout: Layout, n: int, knobs: dict[str, Any]) -> Packed:
    """A layout with its schedule for B of about n columns."""
    kind = KIND[layout.values.dtype]
    per_lane = lane_columns(n, kind, layout.rows)
    tiles = -(-n // (8 * per_lane))
    groups, windows = int(layout.first[-1]), len(layout.first) - 1
    wanted = WARPS_PER_SM * processors(layout.cols.device) / max(1, tiles)
    limit = min(LONGEST, max(SHORTEST, round(groups / wanted)))
    few_windows = groups > 4 * limit * windows and layout.rows * per_lane <= 128
    warps = knobs.get("warps") or (16 if few_windows else 4)
    limit = knobs.get("limit") or limit
    plan = schedule(layout, limit, warps)
    order = layout.order if layout.order is not None else layout.cols[:0]
    tensors = plan.works, plan.longs, layout.cols, layout.values, layout.masks, layout.starts, order, layout.first
    meta = {"shape": list(layout.shape), "rows": layout.rows, "masked": bool(layout.masks.numel())}
    return Packed(tensors, meta | {"slots": plan.slots, "warps": warps})


def lane_columns(n: int, kind: int, rows: int) -> int:
    """Columns of B per lane: the fewest that cover n; a lane loads 16 bytes of a row at a time, once or twice."""
    most = 16 if rows * 16 <= 256 and kind != 2 else 8
    return next((c for c in (1, 2, 4, 8, 16) if 8 * c >= n or c == most), most)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits after the point, to the nearest; NaN and Inf stay."""
    bits = x.view(torch.int32)
    near = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite() & near.isfinite(), near, x)
