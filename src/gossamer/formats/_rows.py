"""What `csr` and `bcsr` share: compressed rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from . import Format, FormatError, Spec

DAMAGED = "the file is damaged; fix: fetch or write it again"


@dataclass(frozen=True, eq=False)
class Rows(Format):
    """`weight` [count, ...] row after row, `cols` [count] int32, `rows` [rows + 1] int64 where each row begins."""

    weight: Tensor
    cols: Tensor
    rows: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "cols": self.cols, "rows": self.rows}

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(spec["shape"]), tensors["weight"], tensors["cols"], tensors["rows"])

    def owners(self) -> Tensor:
        """The row of each entry, int64 [count]."""
        steps = self.rows.diff()
        return torch.repeat_interleave(torch.arange(len(steps), device=steps.device), steps, output_size=len(self.cols))

    def check(self, wide: int) -> None:
        """FormatError unless rows ascend, and columns within each, from 0 to `wide` - 1."""
        if int(self.rows[0]) or int(self.rows[-1]) != len(self.cols) or bool((self.rows.diff() < 0).any()):
            raise FormatError(f"{self.name}: rows must begin in ascending order, 0 to {len(self.cols)}; {DAMAGED}")
        if len(self.cols) and not bool(((self.cols >= 0) & (self.cols < wide)).all()):
            raise FormatError(f"{self.name}: a column lies outside 0 to {wide - 1}; {DAMAGED}")
        if bool(((self.owners() * wide + self.cols).diff() <= 0).any()):
            raise FormatError(f"{self.name}: columns must ascend within a row; {DAMAGED}")


def starts_of(rows: Tensor, count: int) -> Tensor:
    """Where each row begins among sorted `rows`, int64 [count + 1]."""
    starts = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=count), 0, out=starts[1:])
    return starts
