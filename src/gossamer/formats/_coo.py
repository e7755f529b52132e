"""One canonical view of every kind of input: sorted, summed, without zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import FormatError

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@dataclass(frozen=True)
class Coo:
    """Non-zeros of A in row-major order, no duplicates: `rows`, `cols` int64 [nnz], `values` [nnz]."""

    shape: tuple[int, int]
    rows: Tensor
    cols: Tensor
    values: Tensor


def matrix(a: Any) -> Tensor | Coo:
    """A dense 2-D tensor as it is; anything sparse as a `Coo`, without making it dense."""
    if not isinstance(a, Tensor):
        return _from_scipy(a)
    if a.ndim != 2:
        raise FormatError(f"a matrix has two dimensions, this tensor has shape {tuple(a.shape)}; fix: reshape it")
    if a.layout not in SPARSE:
        return a.detach()
    coo = a.detach().to_sparse_coo().coalesce()
    rows, cols = coo.indices()
    return _nonzero(tuple(coo.shape), rows, cols, coo.values())


def coo(a: Any) -> Coo:
    """`matrix(a)`, dense ones included."""
    found = matrix(a)
    if isinstance(found, Coo):
        return found
    rows, cols = torch.nonzero(found, as_tuple=True)
    return Coo((found.shape[0], found.shape[1]), rows, cols, found[rows, cols])


def _from_scipy(a: Any) -> Coo:
    if not hasattr(a, "tocsr"):
        raise FormatError(f"a matrix is a torch tensor or a scipy sparse matrix, not {type(a).__name__}; fix: make one")
    # Through CSR because it sums duplicates; a copy because sum_duplicates works in place.
    found = a.tocsr(copy=True)
    found.sum_duplicates()
    found = found.tocoo()
    rows, cols = (torch.from_numpy(i.astype("int64")) for i in (found.row, found.col))
    return _nonzero(tuple(found.shape), rows, cols, torch.from_numpy(found.data.copy()))


def _nonzero(shape: tuple[int, ...], rows: Tensor, cols: Tensor, values: Tensor) -> Coo:
    keep = values != 0
    return Coo((int(shape[0]), int(shape[1])), rows[keep], cols[keep], values[keep])
