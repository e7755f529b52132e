"""The matrices of bench_spmm.py: real patterns from a data folder, and generators with fixed seeds; values are normal.

A matrix is (kind, (M, K), rows, cols): the kind names what it stands for. Sizes follow the twins of SMaT's test set.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from gossamer.spmm import Csr

Pattern = tuple[str, tuple[int, int], np.ndarray, np.ndarray]


def csr(pattern: Pattern, device: torch.device) -> Csr:
    """float32, without duplicates."""
    _, shape, rows, cols = pattern
    index = torch.from_numpy(np.stack([rows, cols]).astype(np.int64)).to(device)
    keys = torch.unique(index[0] * shape[1] + index[1])
    generator = torch.Generator().manual_seed(keys.numel() % 2**31)
    values = torch.randn(keys.numel(), generator=generator).to(device)
    index = torch.stack([keys // shape[1], keys % shape[1]])
    return Csr.of(torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False))


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def banded(n: int, half: int) -> Pattern:
    offsets = np.arange(-half, half + 1)
    rows = np.repeat(np.arange(n), len(offsets))
    cols = rows + np.tile(offsets, n)
    keep = (cols >= 0) & (cols < n)
    return "band", (n, n), rows[keep], cols[keep]


def uniform(m: int, k: int, density: float, seed: int = 1) -> Pattern:
    count = round(m * k * density)
    flat = np.unique(_rng(seed).integers(0, m * k, count))
    return "uniform", (m, k), flat // k, flat % k


def rmat(scale: int, edge_factor: int, seed: int = 2, kind: str = "power law") -> Pattern:
    """Graph 500's parameters .57 .19 .19 .05."""
    rng, n = _rng(seed), 1 << scale
    rows, cols = (np.zeros(n * edge_factor, np.int64) for _ in range(2))
    for _ in range(scale):
        quarter = np.searchsorted(np.cumsum([0.57, 0.19, 0.19]), rng.random(len(rows)))
        rows, cols = rows * 2 + quarter // 2, cols * 2 + quarter % 2
    return kind, (n, n), rows, cols


def block_diagonal(n: int, block: int, fill: float, seed: int = 3) -> Pattern:
    """Dense-ish blocks, rows shuffled."""
    rng = _rng(seed)
    rows = np.repeat(np.arange(n), block)
    cols = rows // block * block + np.tile(np.arange(block), n)
    keep = rng.random(len(rows)) < fill
    return "blocks", (n, n), rng.permutation(n)[rows[keep]], cols[keep]


def pruned(m: int, k: int, density: float, seed: int = 4) -> Pattern:
    """A pruned network's layer: the density of rows is log-normal."""
    rng = _rng(seed)
    share = np.minimum(density * rng.lognormal(-0.25, 0.7, m), 0.9)
    mask = rng.random((m, k), dtype=np.float32) < share[:, None]
    rows, cols = np.nonzero(mask)
    return "pruned", (m, k), rows, cols


def hexahedral(sides: tuple[int, int, int], dof: int) -> Pattern:
    """Finite elements on a grid: every node meets its 27 neighbours, with `dof` unknowns each."""
    grid = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).reshape(-1, 3)
    rows, cols = [], []
    for step in np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3):
        to = grid + step
        inside = ((to >= 0) & (to < sides)).all(1)
        rows.append(np.ravel_multi_index(grid[inside].T, sides))
        cols.append(np.ravel_multi_index(to[inside].T, sides))
    return "fem", *_with_dof(len(grid), np.concatenate(rows), np.concatenate(cols), dof)


def shell(nx: int, ny: int, dof: int = 6, seed: int = 5) -> Pattern:
    """A grid of 9 neighbours with `dof` unknowns a node; nodes shuffled within strips of 64."""
    rng = _rng(seed)
    x, y = (v.ravel() for v in np.meshgrid(np.arange(nx), np.arange(ny), indexing="ij"))
    rows, cols = [], []
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            inside = (x + dx >= 0) & (x + dx < nx) & (y + dy >= 0) & (y + dy < ny)
            rows.append((x * ny + y)[inside])
            cols.append(((x + dx) * ny + y + dy)[inside])
    place = np.arange(nx * ny)
    for begin in range(0, len(place), 64):
        place[begin : begin + 64] = begin + rng.permutation(len(place[begin : begin + 64]))
    return "fem", *_with_dof(nx * ny, place[np.concatenate(rows)], place[np.concatenate(cols)], dof)


def _with_dof(nodes: int, rows: np.ndarray, cols: np.ndarray, dof: int) -> tuple:
    i, j = (v.ravel() for v in np.meshgrid(np.arange(dof), np.arange(dof), indexing="ij"))
    full = (rows[:, None] * dof + i).ravel(), (cols[:, None] * dof + j).ravel()
    return (nodes * dof, nodes * dof), *full


def wilson_dirac(side: int) -> Pattern:
    """A 4-dimensional periodic lattice of 12 unknowns: 3 within a site, 36 = 8 neighbours x half of 9 colours: 39."""
    shape = side, side, side, side
    sites = np.arange(side**4)
    at = np.stack(np.unravel_index(sites, shape))
    rows, cols = [], []
    own = np.arange(12)
    for c in range(3):  # the site itself
        rows.append((sites[:, None] * 12 + own).ravel())
        cols.append((sites[:, None] * 12 + own // 3 * 3 + c).ravel())
    for axis in range(4):
        for step in (-1, 1):
            to = at.copy()
            to[axis] = (to[axis] + step) % side
            near = np.asarray(np.ravel_multi_index(tuple(to), shape))
            spin = 3 - axis if step > 0 else axis
            for extra, to_spin in enumerate((spin, (spin + 2) % 4)):
                for c in range(3 if extra == 0 else (2 if axis % 2 else 1)):
                    rows.append((sites[:, None] * 12 + own).ravel())
                    cols.append((near[:, None] * 12 + (own // 3 * 3 + to_spin * 3) % 12 + c).ravel())
    return "lattice", (side**4 * 12, side**4 * 12), np.concatenate(rows), np.concatenate(cols)


def geometric(n: int, degree: float, empty: float, seed: int = 6) -> Pattern:
    """A random geometric graph in a cube, numbered along a coarse grid; a share of its rows is empty."""
    rng = _rng(seed)
    side = round((n / 8) ** (1 / 3))
    points = rng.random((n, 3))
    cell = np.ravel_multi_index(tuple((points * side).astype(int).clip(0, side - 1).T), (side,) * 3)
    points, cell = points[np.argsort(cell)], np.sort(cell)
    radius2 = (degree / n / (4 / 3 * np.pi)) ** (2 / 3)
    starts = np.searchsorted(cell, np.arange(side**3 + 1))
    rows, cols = [], []
    at = np.stack(np.unravel_index(cell, (side,) * 3), 1)
    for step in np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3):
        to = at + step
        ok = ((to >= 0) & (to < side)).all(1)
        near = np.ravel_multi_index(tuple(to[ok].T), (side,) * 3)
        who, counts = np.flatnonzero(ok), starts[near + 1] - starts[near]
        a = np.repeat(who, counts)
        b = np.repeat(starts[near] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        close = ((points[a] - points[b]) ** 2).sum(1) < radius2
        rows.append(a[close])
        cols.append(b[close])
    rows, cols = np.concatenate(rows), np.concatenate(cols)
    alive = rng.random(n) >= empty
    keep = alive[rows] & alive[cols]
    return "geometric", (n, n), rows[keep], cols[keep]


def circuit(n: int, degree: float, hub: int, seed: int = 7) -> Pattern:
    """Near neighbours and a few far ones; one row and one column of `hub` entries."""
    rng = _rng(seed)
    count = int(n * degree / 2)
    rows = rng.integers(0, n, count)
    far = rng.random(count) < 0.2
    cols = np.where(far, rng.integers(0, n, count), (rows + rng.integers(1, 20, count)) % n)
    spokes = rng.choice(n, hub, replace=False)
    own = np.arange(n)
    all_rows = np.concatenate([rows, cols, own, np.full(hub, n // 2)])
    return "circuit", (n, n), all_rows, np.concatenate([cols, rows, own, spokes])


def cliques(n: int, size: int, long_rows: int, seed: int = 8) -> Pattern:
    """Overlapping cliques of `size` along the diagonal, and rows of up to 3/4 n entries."""
    rng = _rng(seed)
    starts = rng.integers(0, n - size, n * 3 // 2 // size)
    own = np.arange(size)
    rows = (starts[:, None, None] + own[:, None] + 0 * own).ravel()
    cols = (starts[:, None, None] + 0 * own[:, None] + own).ravel()
    more = [rng.choice(n, int(n * rng.uniform(0.1, 0.75)), replace=False) for _ in range(long_rows)]
    where = [np.full(len(m), i) for m, i in zip(more, rng.choice(n, long_rows, replace=False), strict=True)]
    return "cliques", (n, n), np.concatenate([rows, *where]), np.concatenate([cols, *more])


GENERATED: dict[str, Callable[[], Pattern]] = {
    "band64_16k": lambda: banded(16384, 64),
    "band512_16k": lambda: banded(16384, 512),
    "rmat16_ef16": lambda: rmat(16, 16),
    "blockdiag64_shuffled": lambda: block_diagonal(16384, 64, 0.6),
    "uniform99_16k": lambda: uniform(16384, 16384, 0.01),
    "uniform99.9_16k": lambda: uniform(16384, 16384, 0.001),
    "dnn90_4k": lambda: pruned(4096, 4096, 0.1),
    "dnn95_4k": lambda: pruned(4096, 4096, 0.05),
    "fem_hex_9x9x257": lambda: hexahedral((9, 9, 257), 3),
    "wilson_dirac_8^4": lambda: wilson_dirac(8),
    "shell_6dof": lambda: shell(153, 153),
    "geometric_18%_empty": lambda: geometric(121192, 29, 0.18),
    "circuit_hub": lambda: circuit(116835, 4.2, 114000),
    "cliques_12_long": lambda: cliques(66463, 130, 12),
    "rmat18_ef4": lambda: rmat(18, 4),
}

DLMC = {
    "dlmc_tr90_ffn1": "transformer/magnitude_pruning/0.9/body_encoder_layer_0_ffn_conv1_fully_connected",
    "dlmc_tr95_ffn1": "transformer/magnitude_pruning/0.95/body_encoder_layer_0_ffn_conv1_fully_connected",
    "dlmc_tr90_q": "transformer/magnitude_pruning/0.9/body_encoder_layer_0_self_attention_multihead_attention_q_"
    "fully_connected",
    "dlmc_rn50_90": "rn50/magnitude_pruning/0.9/bottleneck_2_block_group4_2_1",
    "dlmc_rn50_95": "rn50/magnitude_pruning/0.95/bottleneck_2_block_group4_2_1",
    "dlmc_rn50_90_final": "rn50/magnitude_pruning/0.9/final_dense",
}


def real(folder: Path) -> Iterator[tuple[str, Callable[[], Pattern]]]:
    """The real ones that `folder` has; see its README.md."""
    for name in ("copter2", "NotreDame_www"):
        if (path := folder / "matrices" / f"{name}.npz").exists():
            yield name, lambda path=path, name=name: _delta_coded(path, "mesh" if name == "copter2" else "web")
    if (path := folder / "matrices" / "bcsstk17.mtx.xz").exists():
        yield "bcsstk17", lambda path=path: _market(path, "fem")
    for name in ("cora", "citeseer", "pubmed"):
        if (path := folder / "graphs" / f"{name}.npz").exists():
            yield name, lambda path=path: _graph(path)
    if (path := folder / "dlmc" / "dlmc_masks.npz.xz").exists():
        masks = np.load(io.BytesIO(lzma.decompress(path.read_bytes())))
        for name, key in DLMC.items():
            yield name, lambda key=key, masks=masks: _mask(masks, key)


def _delta_coded(path: Path, kind: str) -> Pattern:
    found = np.load(path)
    m, k = map(int, found["shape"])
    return kind, (m, k), np.repeat(np.arange(m), found["len"]), np.cumsum(found["dcol"].astype(np.int64))


def _market(path: Path, kind: str) -> Pattern:
    lines = [x for x in lzma.decompress(path.read_bytes()).decode().splitlines() if not x.startswith("%")]
    m, k, _ = map(int, lines[0].split())
    i, j = np.array([x.split()[:2] for x in lines[1:]], dtype=np.int64).T - 1
    off = i != j
    return kind, (m, k), np.concatenate([i, j[off]]), np.concatenate([j, i[off]])


def _graph(path: Path) -> Pattern:
    found = np.load(path)
    n = len(found["adj_indptr"]) - 1
    return "citations", (n, n), np.repeat(np.arange(n), np.diff(found["adj_indptr"])), found["adj_indices"]


def _mask(masks: np.lib.npyio.NpzFile, key: str) -> Pattern:
    m, k = map(int, masks[f"{key}.shape"])
    rows, cols = np.nonzero(np.unpackbits(masks[key])[: m * k].reshape(m, k))
    return "dlmc", (m, k), rows, cols


def patterns(folder: Path) -> dict[str, Callable[[], Pattern]]:
    return dict(real(folder)) | GENERATED
