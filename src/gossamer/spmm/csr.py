"""The canonical sparse matrix: rows sorted, columns sorted within, no duplicates, no zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..formats import FormatError, _coo
from ..formats._rows import starts_of

MOST = 2**31 - 1  # rows, columns and entries: the kernels count in int32


@dataclass(frozen=True, eq=False)
class Csr:
    """`pointers` int64 [M + 1], `cols` int32 [nnz], `values` [nnz], on one device."""

    shape: tuple[int, int]
    pointers: Tensor
    cols: Tensor
    values: Tensor

    @classmethod
    def of(cls, a: Any) -> Csr:
        """Any scipy matrix or torch tensor, checked; FormatError says what is wrong with it and what to do."""
        check_indices(a)
        found = _coo.coo(a)
        if found.values.is_complex():
            raise FormatError("complex values are not multiplied; fix: one matrix of the real parts, one of the others")
        for what, count in (("rows", found.shape[0]), ("columns", found.shape[1]), ("entries", found.values.numel())):
            if count > MOST:
                raise FormatError(f"{count} {what}: at most 2^31 - 1 are possible; fix: cut the matrix into parts")
        return cls(found.shape, starts_of(found.rows, found.shape[0]), found.cols.to(torch.int32), found.values)

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @cached_property
    def lengths(self) -> Tensor:
        """Entries of each row, int64 [M]."""
        return self.pointers.diff()

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry, int64 [nnz]."""
        return torch.repeat_interleave(
            torch.arange(self.shape[0], device=self.device), self.lengths, output_size=self.nnz
        )

    @cached_property
    def rows32(self) -> Tensor:
        """The row of each entry, int32 [nnz]."""
        return self.rows.to(torch.int32)

    def transposed(self) -> tuple[Csr, Tensor]:
        """A^T, and the place in A of each of its entries."""
        order = torch.argsort(self.cols, stable=True)
        pointers = starts_of(self.cols[order].long(), self.shape[1])
        return Csr(
            (self.shape[1], self.shape[0]), pointers, self.rows[order].to(torch.int32), self.values[order]
        ), order

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Csr:
        parts = {n: getattr(self, n).to(device) for n in ("pointers", "cols")}
        return replace(self, **parts, values=self.values.to(device, dtype))

    def torch(self) -> Tensor:
        """The same as a torch.sparse_csr tensor, without a copy of its values."""
        index = self.pointers.to(torch.int32), self.cols
        return torch.sparse_csr_tensor(*index, self.values, self.shape, check_invariants=False)


def check_indices(a: Any) -> None:
    """FormatError if an index points outside: what made the matrix may not have looked."""
    if isinstance(a, Tensor):
        if a.layout in _coo.SPARSE and a.ndim == 2:
            _check_tensor(a)
        return
    if not hasattr(a, "tocsr"):
        raise FormatError(f"a sparse matrix is a torch tensor or a scipy matrix, not {type(a).__name__}; fix: make one")
    if len(a.shape) != 2:
        raise FormatError(f"a matrix has two dimensions, this one has shape {tuple(a.shape)}; fix: reshape it")
    try:
        a.check_format(full_check=True) if hasattr(a, "check_format") else a.tocoo()._check()
    except (AttributeError, ValueError) as error:
        if isinstance(error, ValueError):
            raise FormatError(f"the indices do not make a matrix: {error}; fix: check how it was built") from error


def _check_tensor(a: Tensor) -> None:
    if a.layout == torch.sparse_coo:
        spans = [(a._indices()[i], a.shape[i]) for i in (0, 1)]
    elif a.layout in (torch.sparse_csr, torch.sparse_bsr):
        _check_pointers(a.crow_indices(), a.col_indices())
        spans = [(a.col_indices(), a.shape[1])]
    else:
        _check_pointers(a.ccol_indices(), a.row_indices())
        spans = [(a.row_indices(), a.shape[0])]
    for index, size in spans:
        if index.numel() and not bool(((index >= 0) & (index < size)).all()):
            span = f"{int(index.min())} to {int(index.max())}"
            raise FormatError(f"indices run from {span} in a dimension of {size}; fix: check how it was built")


def _check_pointers(pointers: Tensor, index: Tensor) -> None:
    good = int(pointers[0]) == 0 and int(pointers[-1]) == index.shape[-1] and bool((pointers.diff() >= 0).all())
    if not good:
        raise FormatError(
            f"row pointers must ascend from 0 to {index.shape[-1]}, the number of entries; fix: check how it was built"
        )
