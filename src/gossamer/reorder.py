"""Orders of a sparse matrix' rows that bring rows with common columns together; near-linear in the entries.

An order is int64 [M]: the row that comes to each place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spmm.csr import Csr

BLOCK = 8  # columns that count as one when rows are compared
HASHES = 4
GROUP = 64  # rows that stay together when groups are sorted
WINDOWS = (8, 16, 32)
WORTH = 0.85  # an order must need at most this share of the rows of B, in windows of 16 rows
_MIX = (0x9E3779B97F4A7C15 - (1 << 64), 0x62B821756295C58D, 0x1B03738712FAD5C9, 0x369DEA0F31A53F85)


def by_signature(a: Csr) -> Tensor:
    """Rows sorted by min-hashes of the blocks of columns they touch (Broder 1997), empty rows last.

    Two rows agree in one hash with the probability of their Jaccard index, the measure that SMaT (2408.11551, section
    IV) clusters by, so that rows of one block or community come to lie together without comparing any pairs.
    """
    blocks = a.cols.long() // BLOCK
    order = torch.arange(a.shape[0], device=a.device)
    for salt in _MIX[:HASHES][::-1]:
        hashes = (blocks + 1) * salt
        hashes = (hashes ^ (hashes >> 29)) * _MIX[0]
        lowest = torch.full((a.shape[0],), torch.iinfo(torch.int64).max, device=a.device)
        lowest.scatter_reduce_(0, a.rows, hashes ^ (hashes >> 32), "amin")
        order = order[torch.argsort(lowest[order], stable=True)]
    return _near_first(a, order)


def _near_first(a: Csr, order: Tensor) -> Tensor:
    """The same groups of rows, sorted by their first columns: neighbours then find B's rows in the caches."""
    first = torch.full((a.shape[0],), a.shape[1], device=a.device)
    first.scatter_reduce_(0, a.rows, a.cols.long(), "amin")
    whole = len(order) // GROUP * GROUP
    groups = order[:whole].view(-1, GROUP)
    near = torch.argsort(first[groups].double().mean(1), stable=True)
    return torch.cat([groups[near].flatten(), order[whole:]])


def by_length(a: Csr) -> Tensor:
    """Rows sorted by how many entries they have, long ones first."""
    return torch.argsort(a.lengths, descending=True, stable=True)


def by_bandwidth(a: Csr) -> Tensor:
    """Reverse Cuthill-McKee of the pattern of A + A^T, on the CPU, through scipy; of a square matrix."""
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee
    except ImportError as error:
        raise ImportError("reverse Cuthill-McKee needs scipy; fix: pip install scipy") from error
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"reverse Cuthill-McKee takes a square matrix, not {a.shape}; fix: use by_signature")
    ones = torch.ones(a.nnz, dtype=torch.int8)
    pattern = csr_array((ones.numpy(), a.cols.cpu().numpy(), a.pointers.cpu().numpy()), shape=a.shape)
    order = reverse_cuthill_mckee((pattern + pattern.T).tocsr(), symmetric_mode=True)
    return torch.from_numpy(order.astype("int64")).to(a.device)


def gathered(a: Csr, order: Tensor | None = None) -> dict[int, tuple[int, int]]:
    """Per height of a window: how many rows of B all windows need, and how many groups of 16 those make."""
    place = a.rows if order is None else torch.empty_like(order).scatter_(0, order, _range(order))[a.rows]
    wide = max(1, a.shape[1])
    keys = place // WINDOWS[0] * wide + a.cols
    found = {}
    for height in WINDOWS:
        if height != WINDOWS[0]:
            keys = keys // wide // 2 * wide + keys % wide
        keys = torch.unique(keys)
        counts = torch.bincount(keys // wide)
        found[height] = len(keys), int((-(-counts // 16)).sum())
    return found


def shared(a: Csr) -> float:
    """Of the entries the share that lie in a column where another row of their window of 8 has one, too."""
    keys = a.rows // WINDOWS[0] * max(1, a.shape[1]) + a.cols
    return (a.nnz - len(torch.unique(keys))) / max(1, a.nnz)


def worthwhile(a: Csr) -> Tensor | None:
    """The order by signature if it saves enough, else None: as the rows are."""
    if a.shape[0] <= WINDOWS[0] or not a.nnz:
        return None
    order = by_signature(a)
    return order if gathered(a, order)[16][0] <= WORTH * gathered(a)[16][0] else None


def _range(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)
