"""`nm24`: N of every M consecutive entries of a row, values and indices; 2:4 unless told otherwise.

Stored bytes of 2:4 in bf16: 9/16 of dense, the same as a bitmask of density 1/2. Within a group the indices ascend, as
sparse tensor cores want them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import Format, FormatError, Layout, Spec, _coo, dtype_name, dtype_of
from .bitmask import pack_bits, unpack_bits

CHUNK = 1 << 24  # entries made dense at a time when encoding a sparse matrix


@dataclass(frozen=True, eq=False)
class NM(Format):
    """`weight` [M, G * n] with G = ceil(K/m) groups a row; `index` [M, ceil(G * n * bits / 8)] uint8.

    An index takes bits = max(1, ceil(log2 m)), lowest bit first, rows padded to bytes. A group with fewer than n
    non-zeros holds zeros at the first free positions.
    """

    weight: Tensor
    index: Tensor
    n: int = 2
    m: int = 4

    name: ClassVar[str] = "nm24"

    @classmethod
    def encode(cls, a: Any, n: int = 2, m: int = 4) -> Self:
        if not 1 <= n <= m <= 16:
            raise FormatError(f"nm24 holds n of m entries for 1 <= n <= m <= 16, not {n}:{m}")
        found = _coo.matrix(a)
        if isinstance(found, _coo.Coo):
            parts = [cls.encode(rows, n, m) for rows in _dense_chunks(found)]
            weight, index = torch.cat([p.weight for p in parts]), torch.cat([p.index for p in parts])
            return cls(found.shape, weight, index, n, m)
        groups = pad(found, (0, -found.shape[1] % m)).view(found.shape[0], -(-found.shape[1] // m), m)
        used = groups != 0
        _check_counts(used.sum(-1), n, m)
        slots = _slots(used, n)
        values = torch.where(used, groups, 0).gather(-1, slots).flatten(1)
        return cls((found.shape[0], found.shape[1]), values, _pack(slots.flatten(1), m), n, m)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        slots = self._slots()
        dense = self.weight.new_zeros(*slots.shape[:2], self.m)
        dense.scatter_(-1, slots, self.weight.view_as(slots))
        return dense.flatten(1)[:, : self.shape[1]].to(dtype or self.weight.dtype)

    def _slots(self) -> Tensor:
        """Positions within each group, [M, G, n]."""
        groups = -(-self.shape[1] // self.m)
        return _unpack(self.index, self.weight.shape[1], self.m).view(self.shape[0], groups, self.n)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "index": self.index}

    def spec(self) -> Spec:
        return super().spec() | {"dtype": dtype_name(self.weight.dtype), "n": self.n, "m": self.m}

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        rows, kept = spec["shape"][0], -(-spec["shape"][1] // spec["m"]) * spec["n"]
        return {
            "weight": ((rows, kept), dtype_of(spec["dtype"])),
            "index": ((rows, -(-kept * _bits(spec["m"]) // 8)), torch.uint8),
        }

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(spec["shape"]), tensors["weight"], tensors["index"], spec["n"], spec["m"])

    def validate(self) -> None:
        slots = self._slots()
        if (slots >= self.m).any() or (slots.diff(dim=-1) <= 0).any():
            raise FormatError(f"nm24: the indices of some group of {self.m} do not ascend within 0..{self.m - 1}")

    @staticmethod
    def size(shape: tuple[int, int], n: int = 2, m: int = 4, itemsize: int = 2) -> int:
        """Stored bytes of a matrix of `shape`."""
        kept = -(-shape[1] // m) * n
        return shape[0] * (kept * itemsize + -(-kept * _bits(m) // 8))


def _bits(m: int) -> int:
    return max(1, (m - 1).bit_length())


def _pack(slots: Tensor, m: int) -> Tensor:
    shifts = torch.arange(_bits(m), device=slots.device)
    return pack_bits(((slots.unsqueeze(-1) >> shifts) & 1).flatten(1))


def _unpack(index: Tensor, kept: int, m: int) -> Tensor:
    bits = unpack_bits(index, kept * _bits(m)).unflatten(1, (kept, _bits(m))).long()
    return (bits << torch.arange(_bits(m), device=index.device)).sum(-1)


def _slots(used: Tensor, n: int) -> Tensor:
    """Positions to store in each group, ascending: the used ones, then the first free ones."""
    m = used.shape[-1]
    rank = used.long() * m - torch.arange(m, device=used.device)
    return rank.topk(n, dim=-1).indices.sort(dim=-1).values


def _check_counts(counts: Tensor, n: int, m: int) -> None:
    if counts.numel() and int(counts.max()) > n:
        row, group = divmod(int(counts.flatten().argmax()), counts.shape[1])
        raise FormatError(
            f"not {n}:{m} sparse: row {row}, columns {group * m}..{group * m + m - 1} hold "
            f"{int(counts[row, group])} non-zeros; fix: prune with patterns.nm(scores, {n}, {m}) first"
        )


def _dense_chunks(a: _coo.Coo) -> list[Tensor]:
    step = max(1, CHUNK // max(1, a.shape[1]))
    chunks = []
    for start in range(0, max(1, a.shape[0]), step):
        keep = (a.rows >= start) & (a.rows < start + step)
        chunk = a.values.new_zeros(min(step, a.shape[0] - start), a.shape[1])
        chunk[a.rows[keep] - start, a.cols[keep]] = a.values[keep]
        chunks.append(chunk)
    return chunks
