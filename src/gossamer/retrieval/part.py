"""One segment of an index as Python holds it: the native view, its memory, and which of its documents still live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .grouping import FEWEST, Groups, grouped
from .native import aligned, require
from .rows import Tidy


@dataclass(frozen=True)
class Part:
    """`block`: the segment's bytes; `alive`: bit j of word i is document 32 i + j, None where all live."""

    block: np.ndarray
    native: Any
    alive: np.ndarray | None = None
    groups: Groups | None = None

    @staticmethod
    def build(rows: Tidy, dim: int, values: bool, ids: np.ndarray, threads: int) -> Part:
        """ids: int64 [rows]; those that count up one by one are not stored."""
        running = len(ids) == 0 or bool((np.diff(ids) == 1).all())
        first = int(ids[0]) if len(ids) else 0
        builder = require().Builder(
            len(rows), *rows.pointers(), dim, values, 0 if running else ids.ctypes.data, first, threads
        )
        block = aligned(builder.bytes)
        builder.write(block.ctypes.data)
        return Part.view(block)

    @staticmethod
    def view(block: np.ndarray, alive: np.ndarray | None = None) -> Part:
        """ValueError if the block is damaged."""
        return Part(block, require().Segment(block.ctypes.data, block.nbytes), alive)

    def grouped(self, threads: int) -> Part:
        """The living documents with those that are alike side by side; itself where they are few."""
        if self.groups is not None or self.living < FEWEST or not self.native.exact:
            return self
        rows, ids = self.rows()
        rows, order, starts, block = grouped(rows, self.native.dim, threads)
        part = Part.build(rows, self.native.dim, True, ids[order], threads)
        return replace(part, groups=Groups.view(block, starts, part.native))

    def target(self, allowed: np.ndarray | None, groups: bool = True) -> tuple:
        """What a native search takes."""
        near = self.groups if groups else None
        centres = (None, 0) if near is None else (near.native, near.starts.ctypes.data)
        return (self.native, address(allowed), self._count(allowed), *centres)

    def _count(self, allowed: np.ndarray | None) -> int:
        if allowed is self.alive:
            return self.living
        return int(np.count_nonzero(unpacked(allowed, len(self)))) if allowed is not None else len(self)

    def __len__(self) -> int:
        return self.native.docs

    @property
    def nbytes(self) -> int:
        near = self.groups
        return self.block.nbytes + (0 if near is None else near.block.nbytes + near.starts.nbytes)

    @cached_property
    def living(self) -> int:
        return len(self) if self.alive is None else int(np.count_nonzero(unpacked(self.alive, len(self))))

    @cached_property
    def ids(self) -> np.ndarray:
        """int64 [documents], deleted ones included."""
        if self._running:
            return np.arange(self.native.first_id, self.native.first_id + len(self))
        ids = np.empty(len(self), np.int64)
        self.native.copy_ids(ids.ctypes.data)
        return ids

    @property
    def _running(self) -> bool:
        """Ids count up from the first and are not stored."""
        return self.native.running_ids

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids, kind="stable")

    def living_ids(self) -> np.ndarray:
        return self.ids if self.alive is None else self.ids[unpacked(self.alive, len(self))]

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where those of the ids are that live here."""
        if not self._running:
            at = np.searchsorted(self.ids, ids, sorter=self._order)
            at = self._order[np.minimum(at, len(self) - 1)] if len(self) else at[:0]
            at = at[self.ids[at] == ids] if len(self) else at
        else:
            at = ids - self.native.first_id
            at = at[(at >= 0) & (at < len(self))]
        return at if self.alive is None else at[self.alive[at // 32] >> (at % 32).astype(np.uint32) & 1 == 1]

    def without(self, places: np.ndarray) -> Part:
        alive = unpacked(self.alive, len(self)) if self.alive is not None else np.ones(len(self), bool)
        alive[places] = False
        return replace(self, alive=packed(alive))

    def allowed(self, chosen: np.ndarray) -> np.ndarray:
        """The living ones of the chosen: bool [largest id + 1], or int64 ids."""
        if chosen.dtype != bool:
            mask = np.zeros(len(self), bool)
            mask[self.places(chosen)] = True
        elif not self._running:
            ids = self.ids
            mask = (
                chosen[np.minimum(ids, len(chosen) - 1)] & (ids < len(chosen))
                if len(chosen)
                else np.zeros(len(ids), bool)
            )
        else:
            mask = np.zeros(len(self), bool)
            some = chosen[self.native.first_id : self.native.first_id + len(self)]
            mask[: len(some)] = some
        bits = packed(mask)
        return bits if self.alive is None else bits & self.alive

    def rows(self) -> tuple[Tidy, np.ndarray]:
        """The living documents and their ids; approximate values where the segment keeps no exact ones."""
        keep = 0 if self.alive is None else self.alive.ctypes.data
        lengths = np.empty(self.living, np.int64)
        require().count_rows(self.native, keep, lengths.ctypes.data)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows = Tidy(starts, np.empty(starts[-1], np.uint32), np.empty(starts[-1], np.float32))
        require().extract_rows(self.native, keep, *rows.pointers())
        return rows, self.living_ids()


def packed(mask: np.ndarray) -> np.ndarray:
    """Bits of a boolean vector in uint32 words, padding bits 0."""
    words = np.zeros(-(-len(mask) // 32), np.uint32)
    bits = np.packbits(mask, bitorder="little")
    words.view(np.uint8)[: len(bits)] = bits
    return words


def unpacked(words: np.ndarray, n: int) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8), count=n, bitorder="little").view(bool)


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def concatenated(ids: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *ids])


def statistics(parts: Sequence[Part], dim: int) -> dict[str, Any]:
    """What `SparseIndex.stats` says of the documents, with deleted ones that still lie there."""
    counts = np.zeros(dim, np.int64)
    for part in parts:
        part.native.document_counts(counts.ctypes.data)
    docs, nnz = sum(len(p) for p in parts), sum(p.native.nnz for p in parts)
    living, stored = sum(p.living for p in parts), sum(p.nbytes for p in parts)
    flops = float(((counts / max(docs, 1)) ** 2).sum())
    mean = nnz / max(docs, 1)
    return {
        "documents": living,
        "deleted": docs - living,
        "dim": dim,
        "columns_used": int((counts > 0).sum()),
        "nnz_per_document": mean,
        "flops": flops,
        "evenness": flops * dim / mean**2 if nnz else 1.0,
        "largest_column": float(counts.max() / max(docs, 1)),
        "bytes": stored,
        "bytes_per_nonzero": stored / max(nnz, 1),
        "parts": len(parts),
    }
