"""The synthetic jobs of bench_index.py, made once and cached as compressed-row .npz files.

A: 200k documents x 30,522 dimensions as a sparse encoder over a vocabulary makes them: Zipf columns, two topics, about
120 non-zeros a document and 40 a query. B16, B32, B64: 1M documents x 1,024 evenly used columns, half-normal values,
unit norm, clusters of 50 whose members keep half of their centre's columns, on which Seismic's recall over time is what
the research notes found on theirs (B32: 0.93 at 0.6 ms, 0.98 at 3.6 ms). T32, T64: tight clusters, they keep 0.7.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

UNIFORM = {"B16": (16, 0.5), "B32": (32, 0.5), "B64": (64, 0.5), "T32": (32, 0.7), "T64": (64, 0.7)}
CLUSTER = 50
VOCABULARY, TOPICS, TOPIC_TERMS = 30_522, 2_000, 150


def load(name: str, folder: Path, queries: int = 500) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Documents and queries of a job by name, or of PATH.npz beside PATH_q.npz."""
    path = Path(name) if name.endswith(".npz") else folder / f"{name}.npz"
    asked = path.with_name(path.stem + "_q.npz")
    if not path.exists() or not asked.exists():
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        if name == "A":
            docs, asks = vocabulary(200_000, queries, rng)
        else:
            docs, asks = uniform(1_000_000, queries, UNIFORM[name][0], rng, UNIFORM[name][1])
        sp.save_npz(path, docs, compressed=False)
        sp.save_npz(asked, asks, compressed=False)
    return sp.load_npz(path), sp.load_npz(asked)


def uniform(
    n: int, queries: int, nnz: int, rng: np.random.Generator, kept: float = 0.5, d: int = 1024
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Members of n / 50 clusters in random order: each keeps that share of its centre's columns; unit norm."""
    centres = n // CLUSTER
    dims = rng.integers(0, d, (centres, nnz), dtype=np.int32)
    values = np.abs(rng.standard_normal((centres, nnz), dtype=np.float32)) + np.float32(0.1)

    def members(of: np.ndarray) -> sp.csr_matrix:
        parts = []
        for some in np.array_split(of, max(1, len(of) // 100_000)):
            own = rng.random((len(some), nnz), dtype=np.float32) < kept
            columns = np.where(own, dims[some], rng.integers(0, d, (len(some), nnz), dtype=np.int32))
            noise = rng.standard_normal((len(some), nnz), dtype=np.float32)
            weights = np.where(own, values[some] * np.abs(1 + 0.3 * noise), np.abs(noise)) + np.float32(1e-3)
            parts.append(_rows(columns, weights, d))
        return sp.vstack(parts, format="csr", dtype=np.float32)

    return members(rng.permutation(np.arange(n) % centres)), members(rng.integers(0, centres, queries))


def vocabulary(n: int, queries: int, rng: np.random.Generator) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Terms of two topics beside terms of a Zipf background; frequent terms weigh less, as an encoder learns it."""
    rank = np.arange(1, VOCABULARY + 1)
    background = 1 / (rank + 70.0) ** 0.95
    cumulative = np.cumsum(background / background.sum())
    topics = (
        np.searchsorted(cumulative, rng.random((TOPICS, TOPIC_TERMS)) ** 0.7).astype(np.int32).clip(0, VOCABULARY - 1)
    )
    strength = rng.gamma(2.0, 0.5, (TOPICS, TOPIC_TERMS)).astype(np.float32)
    rarity = (np.log(rank + 20.0) / np.log(VOCABULARY)).astype(np.float32)

    def texts(of: np.ndarray, own: int, other: int) -> sp.csr_matrix:
        parts = []
        for some in np.array_split(of, max(1, len(of) // 20_000)):
            pick = rng.integers(0, TOPIC_TERMS, (len(some), own))
            topic = np.repeat(some, own // some.shape[1], axis=1)
            weight = strength[topic, pick] * rng.gamma(3.0, 1 / 3, pick.shape)
            from_topic = topics[topic, pick]
            noise = np.searchsorted(cumulative, rng.random((len(some), other))).clip(0, VOCABULARY - 1).astype(np.int32)
            columns = np.concatenate([from_topic, noise], 1)
            weights = np.concatenate([weight, rng.gamma(1.5, 0.3, noise.shape)], 1).astype(np.float32)
            parts.append(_rows(columns, weights * rarity[columns] + np.float32(1e-3), VOCABULARY, unit=False))
        return sp.vstack(parts, format="csr", dtype=np.float32)

    return texts(rng.integers(0, TOPICS, (n, 2)), 64, 64), texts(rng.integers(0, TOPICS, (queries, 2)), 38, 5)


def _rows(columns: np.ndarray, weights: np.ndarray, d: int, unit: bool = True) -> sp.csr_matrix:
    """Rows of fixed width to CSR: columns sorted, the larger of two equal columns kept."""
    key = columns.astype(np.int64) << 32 | weights.astype(np.float32).view(np.int32)
    key.sort(axis=1)
    columns, weights = (key >> 32).astype(np.int32), key.astype(np.int32).view(np.float32)
    last = np.ones(columns.shape, bool)
    last[:, :-1] = columns[:, :-1] != columns[:, 1:]
    if unit:
        weights = weights / np.sqrt((weights**2 * last).sum(1, keepdims=True))
    indptr = np.concatenate([[0], np.cumsum(last.sum(1))])
    return sp.csr_matrix((weights[last], columns[last], indptr), shape=(len(columns), d), dtype=np.float32)
