"""Documents that are alike, side by side: a search may then look at the groups nearest to a query only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .native import aligned, require
from .rows import Tidy

SIZE = 48  # documents of a group, on average
FEWEST = 4096  # documents worth grouping


@dataclass(frozen=True)
class Groups:
    """`starts`: uint32 [groups + 1], places of a part's documents; `block`: the segment of the groups' centres."""

    block: np.ndarray
    native: Any
    starts: np.ndarray

    @staticmethod
    def view(block: np.ndarray, starts: np.ndarray, part: Any) -> Groups:
        """ValueError if they do not fit the part's native segment, or the block is damaged."""
        if len(starts) == 0:
            raise ValueError("the index is damaged (no groups): restore the file or build it again")
        groups = Groups(block, require().Segment(block.ctypes.data, block.nbytes), starts)
        require().check_groups(part, groups.native, starts.ctypes.data, len(starts))
        return groups

    def save(self, add: Callable[[np.ndarray], int]) -> dict[str, int]:
        """Numbers of the blocks that `add` stores."""
        return {"centres": add(self.block), "starts": add(self.starts.view(np.uint8))}


def grouped(rows: Tidy, dim: int, threads: int) -> tuple[Tidy, np.ndarray, np.ndarray, np.ndarray]:
    """(the rows group after group, where each was, starts of the groups, block of their centres)."""
    native = require()
    found = native.Grouping(len(rows), *rows.pointers(), dim, SIZE, threads)
    order, starts = np.empty(len(rows), np.uint32), np.empty(found.groups + 1, np.uint32)
    nnz = found.nnz
    centres = Tidy(np.empty(found.groups + 1, np.int64), np.empty(nnz, np.uint32), np.empty(nnz, np.float32))
    found.copy(order.ctypes.data, starts.ctypes.data, *centres.pointers())
    out = Tidy(np.empty_like(rows.starts), np.empty_like(rows.columns), np.empty_like(rows.values))
    native.permute(len(rows), *rows.pointers(), order.ctypes.data, *out.pointers(), threads)
    builder = native.Builder(len(centres), *centres.pointers(), dim, False, 0, 0, threads)
    block = aligned(builder.bytes)
    builder.write(block.ctypes.data)
    return out, order, starts, block
