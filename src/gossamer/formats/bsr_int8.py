"""`bsr_int8`: blocks of 4 outputs by 1 or 4 inputs, int8, a float32 scale per row, a bit per block.

Quantisation is symmetric, q = round(a / scale) in -127 .. 127 with scale = max |row| / 127: what comes back is off by
at most scale * 0.501. Scales keep 17 of their 24 bits, so that q * scale is exact in float32, and what was decoded in
float32 or float64 is encoded again to the same bits. Source of the pattern: arXiv 2306.16601, section 3.

Stored bytes of 4x1 at 80 % sparsity: 0.23 per weight, at 4x4 0.21.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import Format, FormatError, Layout, Spec, _coo, dtype_name, dtype_of
from .bitmask import pack_bits, unpack_bits

log = logging.getLogger("gossamer")

ROWS = 4  # of a block
WIDTHS = (1, 4)
MOST = 127
TINY = 2.0**-126  # the least scale of a row that is not zero
LOOSE = 0.25  # more zeros than this inside of the blocks that are kept: the weight was not pruned in blocks


@dataclass(frozen=True, eq=False)
class BsrInt8(Format):
    """`weight` [blocks, 4, width] int8 in row-major order of blocks, `mask` [ceil(M/4), ceil(ceil(K/width)/8)] uint8.

    Bit j of byte i of a row of `mask` is block 8 i + j; `scale` [M] float32, 0 for a row of zeros; rows and columns
    beyond M and K are zero. `dtype` is what `decode` returns by default: that of the matrix that was encoded.
    """

    weight: Tensor
    mask: Tensor
    scale: Tensor
    width: int = 1
    dtype: torch.dtype = field(default=torch.float32)

    name: ClassVar[str] = "bsr_int8"
    exact: ClassVar[bool] = False

    @classmethod
    def encode(cls, a: Any, block: tuple[int, int] = (ROWS, 1)) -> Self:
        """A pruned weight; `block` (4, 1) or (4, 4). A weight that is not block-sparse is stored, with a warning.

        FormatError for NaN, Inf and values that a float32 scale cannot reach.
        """
        if block not in [(ROWS, width) for width in WIDTHS]:
            raise FormatError(f"bsr_int8 has blocks of (4, 1) or (4, 4), not {block}")
        found, width = _coo.matrix(a), block[1]
        m, k = found.shape
        if isinstance(found, _coo.Coo):
            q, scale = _quantised(found.values, found.rows, m)
            weight, mask = _blocks_of(found, q, width)
            kept, dtype = int((q != 0).sum()), found.values.dtype
        else:
            rows = torch.arange(m, device=found.device).unsqueeze(1).expand(m, k)
            q, scale = _quantised(found, rows, m)
            tiles = pad(q, (0, -k % width, 0, -m % ROWS)).view(-(-m // ROWS), ROWS, -(-k // width), width)
            used = (tiles != 0).any(dim=3).any(dim=1)
            weight, mask = tiles.transpose(1, 2)[used], pack_bits(used)
            kept, dtype = int((weight != 0).sum()), found.dtype
        _warn_if_loose(kept, weight.numel(), m, k, width)
        return cls((m, k), weight, mask, scale, width, dtype)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        block_rows, across = self.mask.shape[0], -(-self.shape[1] // self.width)
        tiles = self.weight.new_zeros(block_rows, across, ROWS, self.width)
        tiles[self.used()] = self.weight
        dense = tiles.transpose(1, 2).reshape(block_rows * ROWS, across * self.width)
        return (dense[: self.shape[0], : self.shape[1]].to(wide) * self.scale.to(wide).unsqueeze(1) + 0.0).to(dtype)

    def used(self) -> Tensor:
        """Which blocks are stored: bool [ceil(M/4), ceil(K/width)]."""
        return unpack_bits(self.mask, -(-self.shape[1] // self.width)).bool()

    @property
    def block(self) -> tuple[int, int]:
        return (ROWS, self.width)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "mask": self.mask, "scale": self.scale}

    def spec(self) -> Spec:
        more = {"dtype": dtype_name(self.dtype), "block": list(self.block), "nnz": self.weight.numel()}
        return super().spec() | more

    @classmethod
    def layout(cls, spec: Spec) -> Layout:
        (m, k), (rows, width) = spec["shape"], spec["block"]
        if rows != ROWS or width not in WIDTHS or spec["nnz"] % (ROWS * width):
            raise FormatError(f"bsr_int8: block {spec['block']} with {spec['nnz']} stored weights is none of its specs")
        return {
            "weight": ((spec["nnz"] // (ROWS * width), ROWS, width), torch.int8),
            "mask": ((-(-m // ROWS), _bytes(k, width)), torch.uint8),
            "scale": ((m,), torch.float32),
        }

    @classmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        (m, k), (_, width), dtype = spec["shape"], spec["block"], dtype_of(spec["dtype"])
        return cls((m, k), tensors["weight"], tensors["mask"], tensors["scale"], width, dtype)

    def validate(self) -> None:
        m, k = self.shape
        across = -(-k // self.width)
        bits = unpack_bits(self.mask, 8 * self.mask.shape[1]).bool()
        if bits[:, across:].any() or int(bits.sum()) != len(self.weight):
            raise FormatError(
                f"bsr_int8: the mask has {int(bits.sum())} bits set, {int(bits[:, across:].sum())} of them past the "
                f"last column, but there are {len(self.weight)} blocks: damaged; fix: fetch the file again"
            )
        if not (self.scale.isfinite() & (self.scale >= 0)).all():
            raise FormatError("bsr_int8: a scale is negative, NaN or Inf: damaged; fix: fetch the file again")
        rows, cols = bits[:, :across].nonzero(as_tuple=True)
        row = (rows * ROWS).view(-1, 1, 1) + torch.arange(ROWS, device=rows.device).view(1, -1, 1)
        col = (cols * self.width).view(-1, 1, 1) + torch.arange(self.width, device=rows.device).view(1, 1, -1)
        if self.weight[(row >= m) | (col >= k)].any():
            raise FormatError("bsr_int8: weights beyond the last row or column: damaged; fix: fetch the file again")

    @staticmethod
    def size(shape: tuple[int, int], blocks: int, width: int = 1) -> int:
        """Stored bytes of a matrix of `shape` with so many blocks."""
        m, k = shape
        return blocks * ROWS * width + -(-m // ROWS) * _bytes(k, width) + 4 * m


def _bytes(k: int, width: int) -> int:
    """Of a row of the mask."""
    return -(-k // (8 * width))


def _quantised(values: Tensor, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """int8 of the shape of `values`, and the scale of each of the m rows."""
    wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    if not wide.isfinite().all():
        raise FormatError("bsr_int8 holds finite weights only, found NaN or Inf; fix: check the model they come from")
    most = wide.new_zeros(m).scatter_reduce_(0, rows.flatten(), wide.abs().flatten(), "amax")
    scale = _rounded((most / MOST).float()).clamp_min(TINY)
    if (most > torch.finfo(torch.float32).max / 2).any():
        raise FormatError("bsr_int8: weights of 1e38 and more have no scale; fix: check the model they come from")
    # The scale may have been rounded down.
    q = (wide / scale.to(wide.dtype)[rows]).round_().clamp_(-MOST, MOST).to(torch.int8)
    return q, scale.masked_fill_(most <= TINY / 2, 0.0)


def _rounded(scale: Tensor) -> Tensor:
    """To the nearest with 17 bits of significand."""
    bits = scale.view(torch.int32)
    return (((bits + 64) >> 7) << 7).view(torch.float32)


def _blocks_of(a: _coo.Coo, q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Blocks and mask without the dense matrix."""
    m, k = a.shape
    keep = q != 0
    rows, cols, q = a.rows[keep], a.cols[keep], q[keep]
    across = -(-k // width)
    block_bytes = -(-across // 8)
    ids, place = torch.unique((rows // ROWS) * across + cols // width, return_inverse=True)
    weight = q.new_zeros(len(ids), ROWS, width)
    weight[place, rows % ROWS, cols % width] = q
    mask = torch.zeros(-(-m // ROWS) * block_bytes, dtype=torch.uint8, device=q.device)
    at, bit = ids // max(1, across) * block_bytes + ids % max(1, across) // 8, ids % max(1, across) % 8
    mask.index_put_((at,), (torch.ones_like(bit) << bit).to(torch.uint8), accumulate=True)
    return weight, mask.view(-(-m // ROWS), block_bytes)


def _warn_if_loose(kept: int, stored: int, m: int, k: int, width: int) -> None:
    if kept < (1 - LOOSE) * stored and stored > 0:
        log.warning(
            "bsr_int8: a %d x %d weight is not sparse in blocks of 4x%d: %.0f %% of it is not zero, but its blocks "
            "cover %.0f %% of it; fix: prune whole blocks, or store it as bitmask",
            *(m, k, width, 100 * kept / (m * k), 100 * stored / (m * k)),
        )
