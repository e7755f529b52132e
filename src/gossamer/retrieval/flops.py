"""What a search over sparse codes costs, and a penalty with a gradient that lowers it (arXiv 2004.05665).

An inverted index multiplies once for every column that query and row share. Over independent queries and rows that is
F = sum_j p_j q_j multiplications a row, p_j and q_j being the shares of rows and of queries with a non-zero in column
j (sec. 3). `flops` counts it; `flops_penalty` is its relaxation F~ = sum_j a_j b_j over the column means of |codes|
(eq. 4): it pushes hardest on the busiest columns, which an l1 penalty never does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def flops(codes: Any, queries: Any = None) -> float:
    """Multiplications per (query, row) pair of an exact search; times the number of rows: per query.

    `codes` (n, d) and `queries` (m, d): torch tensors (dense, COO or CSR) or scipy sparse matrices. Without `queries`
    the rows themselves ask, each against the n - 1 others, an unbiased estimate: sum_j n_j (n_j - 1) / (n (n - 1)).
    ValueError where there are too few rows to estimate from or the dimensions differ.
    """
    counts, n = column_counts(codes), codes.shape[0]
    if queries is None:
        if n < 2:
            raise ValueError(f"one set of {n} row(s) has no pairs; fix: give at least 2 rows, or queries=")
        return float((counts * (counts - 1)).sum() / (n * (n - 1)))
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(f"codes have {codes.shape[1]} columns, queries {queries.shape[1]}; fix: encode both alike")
    if not n or not queries.shape[0]:
        raise ValueError("no rows or no queries; fix: encode at least one of each")
    return float((counts * column_counts(queries)).sum() / (n * queries.shape[0]))


def unevenness(codes: Any, queries: Any = None) -> float:
    """F over what it would be with the same non-zeros spread evenly: s^2 / d, or s t / d with queries of t non-zeros.

    1: every column as busy. With one set it cannot be lower but for sampling (Cauchy-Schwarz); queries can also avoid
    the rows' busy columns.
    """
    sizes = [float(column_counts(c).sum()) / max(c.shape[0], 1) for c in (codes, codes if queries is None else queries)]
    least = sizes[0] * sizes[1] / codes.shape[1]
    return flops(codes, queries) / least if least else 1.0


def column_counts(codes: Any) -> Tensor:
    """(d,) float64: how many rows have a non-zero in each column. Stored zeros are not counted."""
    if not isinstance(codes, Tensor):
        coo = codes.tocoo(copy=True)
        coo.sum_duplicates()
        return torch.bincount(torch.as_tensor(coo.col[coo.data != 0]).long(), minlength=codes.shape[1]).double()
    if codes.layout == torch.strided:
        return codes.count_nonzero(dim=0).double()
    if codes.layout == torch.sparse_csr:
        columns, values = codes.col_indices(), codes.values()
    else:
        codes = codes.coalesce()
        columns, values = codes.indices()[1], codes.values()
    return torch.bincount(columns[values != 0], minlength=codes.shape[1]).double()


def flops_penalty(codes: Tensor, queries: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """F~ (eq. 4), a scalar with a gradient: sum_j a_j b_j, a and b the means of |codes| and |queries| by column.

    `codes` (..., batch, d), `queries` (..., batch', d) or None for one encoder (sum_j a_j^2); leading dimensions are
    collections of their own, and the result is their mean. Under an initialised process group the means are those of
    the global batch, and the gradients, once DDP has averaged them, those of the global penalty. Codes may be signed:
    without the absolute value the two signs of a column would cancel.
    """
    means = column_means(codes, group)
    return (means * (means if queries is None else column_means(queries, group))).sum(-1).mean()


def l1_penalty(codes: Tensor) -> Tensor:
    """The baseline: mean over rows of sum_j |c_ij|; `codes` (..., batch, d)."""
    return codes.abs().sum(-1).mean()


def column_means(codes: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(..., d) means of |codes| over the rows of all processes; the gradient is this process's own share.

    DDP averages gradients over W processes, hence a local share of W sums / rows: exact, with batches of unequal size.
    """
    sums = codes.abs().sum(-2)
    if not _distributed():
        return sums / codes.shape[-2]
    total, rows = _all_reduce(sums.detach(), codes.shape[-2], group)
    own = dist.get_world_size(group) * sums / rows
    return own + (total / rows - own.detach())


def batch_flops(codes: Tensor, queries: Tensor | None = None, group: dist.ProcessGroup | None = None) -> float:
    """`flops` of the global batch, the same number on every process; the mean over leading dimensions."""
    counts, n = _batch_counts(codes, group)
    if queries is None:
        return float((counts * (counts - 1)).sum(-1).mean() / (n * (n - 1)))
    asked, m = _batch_counts(queries, group)
    return float((counts * asked).sum(-1).mean() / (n * m))


def batch_nonzeros(codes: Tensor, group: dist.ProcessGroup | None = None) -> float:
    """Mean non-zeros of a row of the global batch, the same number on every process."""
    counts, n = _batch_counts(codes, group)
    return float(counts.sum(-1).mean() / n)


def _batch_counts(codes: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, float]:
    counts, n = codes.detach().count_nonzero(dim=-2).double(), codes.shape[-2]
    return _all_reduce(counts, n, group) if _distributed() else (counts, n)


def _all_reduce(sums: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, float]:
    """Sums (..., d) and number of rows, of all processes."""
    packed = torch.cat([sums.flatten(), sums.new_tensor([float(rows)])])
    dist.all_reduce(packed, group=group)
    return packed[:-1].view_as(sums), float(packed[-1])


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
