"""cuSPARSE: its algorithms for CSR, and Blocked-ELL where blocks of 32 x 32 are well filled.

Two runs of its CSR_ALG2 hardly ever agree to the bit, those of CSR_ALG3 agree unless float32 rows are long: seen to
differ with rows of 511 entries (cut from longer ones) and more, never where the longest has 481 or fewer
(benchmarks/results/spmm.jsonl, `unstable`). That is experience, not a promise of cuSPARSE's. CSR_ALG2 adds up what is
rounded already, so that 16 bits are no candidate for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import cusparse
from .. import Csr, Packed, SpmmKernel, Way

ALGORITHMS = {2: cusparse.ALG2, 3: cusparse.ALG3}
BLOCK = 32  # of Blocked-ELL; 16 was never faster
LEAST_FILL = 0.2  # of what Blocked-ELL stores
STEADY = 481  # entries of a row up to which CSR_ALG3 is trusted to repeat itself in float32
PLANS = 16  # widths of B that a packed matrix keeps plans for


class Cusparse(SpmmKernel):
    """float32, float16, bfloat16; float32 products are exact."""

    name: ClassVar[str] = "cusparse"

    @classmethod
    def refuses(cls, a: Csr) -> str | None:
        if a.dtype not in cusparse.TYPES:
            return "float32, float16 or bfloat16 values"
        return cusparse.refusal(a.device)

    @classmethod
    def ways(cls, a: Csr, tf32: bool, deterministic: bool = True) -> list[Way]:
        found = [
            Way(cls.name, (("alg", i),))
            for i in ALGORITHMS
            if repeats(a, i) or not (deterministic or a.dtype != torch.float32)
        ]
        return [*found, Way(cls.name, (("ell", BLOCK),))] if suits_blocks(a) else found

    @classmethod
    def pack(cls, a: Csr, n: int, **knobs: Any) -> Packed:
        if "ell" in knobs:
            tensors = blocks_of(a, knobs["ell"])
            left = cusparse.blocked_ell(a.shape[1], *tensors) if a.nnz else None
            meta = {"algorithm": cusparse.BLOCKED_ELL}
        else:
            tensors = a.pointers.to(torch.int32), a.cols, a.values
            left = cusparse.csr(a.shape, *tensors) if a.nnz else None
            meta = {"algorithm": ALGORITHMS[knobs["alg"]]}
        return Packed(tensors, meta | {"shape": list(a.shape), "left": left, "plans": {}})

    @classmethod
    def run(cls, b: Tensor, packed: Sequence[Tensor], meta: dict[str, Any]) -> Tensor:
        m, n = meta["shape"][0], b.shape[1]
        if meta["left"] is None or not n:
            return b.new_zeros(m, n)
        b = b if b.stride(1) == 1 and b.stride(0) >= n else b.clone(memory_format=torch.contiguous_format)
        c = b.new_empty(meta["left"].shape[0], n)
        plan_for(b, meta).run(b, c)
        return c[:m]


def plan_for(b: Tensor, meta: dict[str, Any]) -> cusparse.Plan:
    """The plan for B of this width, kept."""
    plans, key = meta["plans"], (b.shape[1], b.stride(0))
    if key not in plans:
        plan = cusparse.Plan(meta["left"], b, meta["algorithm"])
        if len(plans) >= PLANS:
            del plans[next(iter(plans))]
        plans[key] = plan
    return plans[key]


def repeats(a: Csr, algorithm: int) -> bool:
    """Do two runs agree to the bit?"""
    short = a.dtype != torch.float32 or not a.nnz or int(a.lengths.max()) <= STEADY
    return ALGORITHMS[algorithm] == cusparse.ALG3 and short


def suits_blocks(a: Csr) -> bool:
    """Would Blocked-ELL be filled well enough, and do its blocks end where A does?"""
    if a.dtype == torch.float32 or a.shape[1] % BLOCK or a.nnz < LEAST_FILL * BLOCK * a.shape[0] or not a.nnz:
        return False
    return a.nnz >= LEAST_FILL * BLOCK * BLOCK * -(-a.shape[0] // BLOCK) * blocks_across(a)


def blocks_across(a: Csr) -> int:
    """The most blocks that a row of blocks has."""
    wide = -(-a.shape[1] // BLOCK)
    return int(torch.bincount(torch.unique(a.rows // BLOCK * wide + a.cols // BLOCK) // wide).max())


def blocks_of(a: Csr, size: int) -> tuple[Tensor, Tensor]:
    """Blocked-ELL: `table` int32 [H, most] of block columns, -1 for none; `values` [H, size, most, size]."""
    high, wide = -(-a.shape[0] // size), -(-a.shape[1] // size)
    keys, index = torch.unique(a.rows // size * wide + a.cols // size, return_inverse=True)
    rows = keys // wide
    counts = torch.bincount(rows, minlength=high)
    place = torch.arange(len(keys), device=a.device) - (counts.cumsum(0) - counts)[rows]
    table = torch.full((high, int(counts.max())), -1, dtype=torch.int32, device=a.device)
    table[rows, place] = (keys % wide).to(torch.int32)
    values = torch.zeros(high, size, table.shape[1], size, dtype=a.dtype, device=a.device)
    values[rows[index], a.rows % size, place[index], a.cols.long() % size] = a.values
    return table, values
