"""Sparse embeddings as compressed rows, from whatever the caller has: scipy, torch, numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .native import require

_FAULTS = {
    1: "row starts must ascend and end at the number of values",
    2: "a column index is negative",
    3: "a column index is not below the dimension",
    4: "a column stands twice: sum it first (scipy: sum_duplicates(), torch: coalesce())",
    5: "a value is NaN or infinite: clean the embeddings first",
    6: "a value is beyond 1e16 in size: scale the embeddings down",
}


@dataclass(frozen=True)
class Rows:
    """`len(starts) - 1` rows; row i owns columns[starts[i] : starts[i + 1]], int32 or int64, and float32 values."""

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    dim: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def tidy(self, begin: int = 0, end: int | None = None) -> Tidy:
        """Rows begin to end checked, each in ascending order of column, without zeros. ValueError names the bad row."""
        end = len(self) if end is None else end
        first, last = int(self.starts[begin]), int(self.starts[end])
        if not 0 <= first <= last <= len(self.values):
            raise ValueError(f"row {begin}: {_FAULTS[1]}")
        starts = np.ascontiguousarray(self.starts[begin : end + 1] - first)
        columns, values = self.columns[first:last], self.values[first:last]
        out = Tidy(np.empty(len(starts), np.int64), np.empty(len(values), np.uint32), np.empty(len(values), np.float32))
        fault, row, kept = require().tidy(
            end - begin,
            starts.ctypes.data,
            columns.ctypes.data,
            columns.itemsize,
            values.ctypes.data,
            len(values),
            self.dim,
            *out.pointers(),
        )
        if fault:
            raise ValueError(f"row {begin + row}: {_FAULTS[fault]}")
        return Tidy(out.starts, out.columns[:kept], out.values[:kept])

    def pieces(self, most_rows: int, most_values: int) -> Iterator[tuple[int, int]]:
        """Cuts into runs of rows within both limits; one row may exceed `most_values`."""
        begin = 0
        while begin < len(self):
            end = int(np.searchsorted(self.starts, self.starts[begin] + most_values, side="right")) - 1
            end = min(max(end, begin + 1), begin + most_rows, len(self))
            yield begin, end
            begin = end


@dataclass(frozen=True)
class Tidy:
    """Checked rows: starts int64, columns uint32, values float32."""

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def concatenate(parts: Sequence[Tidy]) -> Tidy:
        ends = np.cumsum([0, *(int(p.starts[-1]) for p in parts)])
        starts = [p.starts[:-1] + end for p, end in zip(parts, ends, strict=False)]
        return Tidy(
            np.concatenate([*starts, ends[-1:]]).astype(np.int64),
            np.concatenate([np.empty(0, np.uint32), *(p.columns for p in parts)]),
            np.concatenate([np.empty(0, np.float32), *(p.values for p in parts)]),
        )

    def pointers(self) -> tuple[int, int, int]:
        return self.starts.ctypes.data, self.columns.ctypes.data, self.values.ctypes.data


def as_rows(x: Any, dim: int | None = None) -> Rows:
    """scipy sparse, torch (sparse CSR, COO or dense), numpy dense, or (starts, columns, values): see `Rows`.

    A triple needs `dim`. ValueError if the dimension is another than `dim`, or the parts contradict each other.
    """
    parts: tuple[Any, ...]
    if isinstance(x, Rows):
        parts, width = (x.starts, x.columns, x.values), x.dim
    elif isinstance(x, tuple):
        parts, width = _triple(x), dim
    elif hasattr(x, "tocsr"):
        csr = x.tocsr()
        parts, width = (csr.indptr, csr.indices, csr.data), csr.shape[1]
    elif hasattr(x, "layout"):
        parts, width = _from_torch(x)
    else:
        parts, width = _from_dense(np.asarray(x))
    if width is None:
        raise ValueError("(starts, columns, values) do not tell the dimension: pass dim=")
    if dim is not None and width != dim:
        raise ValueError(
            f"the embeddings have {width} dimensions, the index has {dim}: use the model it was built with"
        )
    if not 0 < width < 2**32 - 1:
        raise ValueError(f"{width} dimensions: expected 1 to 2^32 - 2")
    starts, columns, values = parts
    return _checked(starts, columns, values, width)


def _checked(starts: Any, columns: Any, values: Any, dim: int) -> Rows:
    starts, columns, values = np.asarray(starts), np.asarray(columns), np.asarray(values)
    if starts.ndim != 1 or columns.ndim != 1 or values.ndim != 1 or len(starts) == 0 or len(columns) != len(values):
        raise ValueError("expected vectors: starts [rows + 1], columns [nnz], values [nnz]")
    for name, array in (("starts", starts), ("columns", columns)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, not {array.dtype}")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"values must be real numbers, not {values.dtype}")
    starts = np.ascontiguousarray(starts, np.int64)
    if columns.dtype not in (np.int32, np.int64):
        columns = columns.astype(np.int64)
    if starts[0] != 0 or starts[-1] != len(values):
        raise ValueError(
            f"starts must go from 0 to {len(values)}, the number of values, not {starts[0]} to {starts[-1]}"
        )
    if (falling := np.flatnonzero(starts[1:] < starts[:-1])).size:
        raise ValueError(f"row {falling[0]}: {_FAULTS[1]}")
    with np.errstate(over="ignore"):  # becomes infinite, which tidy() names
        values = np.ascontiguousarray(values, np.float32)
    return Rows(starts, np.ascontiguousarray(columns), values, int(dim))


def _triple(x: tuple) -> tuple:
    if len(x) != 3:
        raise ValueError(f"expected (starts, columns, values), got {len(x)} parts")
    return tuple(part.numpy() if hasattr(part, "layout") else part for part in x)


def _from_torch(x: Any) -> tuple[tuple, int]:
    x = x.detach().cpu().float()
    if x.dim() == 1:
        x = x.unsqueeze(0)
    if x.dim() != 2:
        raise ValueError(f"expected a matrix, one embedding a row, got {x.dim()} dimensions")
    if str(x.layout) == "torch.sparse_coo":
        x = x.coalesce()  # sums duplicates and sorts by row
        rows, columns = x.indices().numpy()
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=x.shape[0]))])
        return (starts, columns, x.values().numpy()), x.shape[1]
    if str(x.layout) == "torch.sparse_csr":
        return (x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy()), x.shape[1]
    return _from_dense(x.to_dense().numpy())


def _from_dense(x: np.ndarray) -> tuple[tuple, int]:
    if x.dtype.kind not in "fiub":
        raise ValueError(f"expected a sparse matrix or an array of numbers, got {x.dtype}")
    x = np.atleast_2d(x)
    if x.ndim != 2:
        raise ValueError(f"expected a matrix, one embedding a row, got {x.ndim} dimensions")
    rows, columns = np.nonzero(x)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(x)))])
    return (starts, columns, x[rows, columns]), x.shape[1]


def as_ids(ids: Any, unique: bool = True) -> np.ndarray:
    """int64 vector; ValueError for what is no id: negative, fractional, or there twice."""
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.empty(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be a vector of integers, not {ids.dtype} of {ids.ndim} dimensions")
    ids = np.ascontiguousarray(ids, np.int64)
    if ids.min() < 0:
        raise ValueError(f"id {ids.min()} is negative: ids are 0 to 2^63 - 1")
    if unique and len(np.unique(ids)) != len(ids):
        raise ValueError("an id stands twice: give every document its own")
    return ids


def as_filter(chosen: Any) -> np.ndarray:
    """A boolean vector indexed by id, or int64 ids."""
    chosen = np.asarray(chosen)
    if chosen.dtype == bool and chosen.ndim == 1:
        return chosen
    return as_ids(chosen, unique=False)
