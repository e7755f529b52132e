"""What a damaged `csr` or `bcsr` says; the contract tests have the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gossamer.formats import FormatError
from gossamer.formats.bcsr import Bcsr
from gossamer.formats.csr import CsrFormat


def stored(kind: type[CsrFormat | Bcsr]) -> CsrFormat | Bcsr:
    """Rows of 2, 0 and 2 entries or blocks; the last row and column of blocks are not full."""
    a = torch.zeros(40, 50)
    for i, j in ((0, 0), (0, 40), (39, 3), (39, 49)):
        a[i, j] = 1
    return kind.encode(a if kind is Bcsr else a[[0, 1, 39]])


@pytest.mark.parametrize("kind", [CsrFormat, Bcsr])
def test_damage_is_found(kind: type[CsrFormat | Bcsr]) -> None:
    good = stored(kind)
    good.validate()
    assert good.rows.tolist() == [0, 2, 2, 4]
    high = 50 if kind is CsrFormat else 4
    for rows in ([1, 2, 2, 4], [0, 2, 2, 3], [0, 3, 2, 4]):
        with pytest.raises(FormatError, match=f"{kind.name}: rows must begin in ascending order, 0 to 4; .*fix: "):
            replace(good, rows=torch.tensor(rows)).validate()
    for cols in ([0, high, 0, 1], [-1, 1, 0, 1]):
        with pytest.raises(FormatError, match=f"a column lies outside 0 to {high - 1}; .*fix: "):
            replace(good, cols=torch.tensor(cols, dtype=torch.int32)).validate()
    for cols in ([1, 0, 0, 1], [0, 1, 2, 2]):
        with pytest.raises(FormatError, match="columns must ascend within a row; .*fix: "):
            replace(good, cols=torch.tensor(cols, dtype=torch.int32)).validate()
    replace(good, cols=torch.tensor([1, 2, 1, 3], dtype=torch.int32)).validate()


def test_values_past_the_edge() -> None:
    for at in ((2, 8, 0), (3, 0, 2)):  # block, row, column
        weight = stored(Bcsr).weight.clone()
        weight[at] = 1
        with pytest.raises(FormatError, match="past the last row or column; .*fix: "):
            replace(stored(Bcsr), weight=weight).validate()
