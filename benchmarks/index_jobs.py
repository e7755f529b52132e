"""The synthetic jobs of bench_index.py, made once and cached as compressed-row .npz files.

The research notes (issue 10) describe theirs in one line each and their generator is not in this tree. The literal jobs
follow those lines; every choice they leave open is made in several ways, each under a name of its own, and all are
reported: none is picked by its result.

B: "1M x 1024, 16/32/63 nnz, uniform columns, planted 50-doc clusters, unit norm, F = .25/.99/3.9"; U32 "the same
without clusters". F 3.9 and .99 are 63.2 and 31.8 columns of 64 and 32: what is left where clusters have distinct
columns and documents draw a fifth of theirs anew. So the literal B16, B32 and B64 keep 0.8 of their cluster's columns;
values are half-normal, those of kept columns near the cluster's. Variants, whose clusters may draw a column twice:
    flat32    values nearly alike, half of the columns kept
    free32    0.8 kept, but every document has values of its own
    T16, T32, T64   0.7 kept; until November 2026 called B16, B32, B64 ("first generator" in the results)
    W16, W32, W64   0.5 kept; afterwards called B16, B32, B64 (no variant in the results)
A: "200k docs x 30,522, 119 nnz/doc, 40/query, zipf + topics, F .78, max df .22": texts of two topics over a Zipf
background. AT: texts of one topic and less background, so that a topic's texts are near one another.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp


class Clusters(NamedTuple):
    nnz: int
    kept: float
    values: str = "near"
    distinct: bool = False


UNIFORM = {
    "B16": Clusters(16, 0.8, distinct=True),
    "B32": Clusters(32, 0.8, distinct=True),
    "B64": Clusters(64, 0.8, distinct=True),
    "U32": Clusters(32, 0.0),
    "T16": Clusters(16, 0.7),
    "T32": Clusters(32, 0.7),
    "T64": Clusters(64, 0.7),
    "W16": Clusters(16, 0.5),
    "W32": Clusters(32, 0.5),
    "W64": Clusters(64, 0.5),
    "flat32": Clusters(32, 0.5, "flat"),
    "free32": Clusters(32, 0.8, "free"),
}


class Texts(NamedTuple):
    topics: int
    own: int  # of 128 terms


TEXTS = {"A": Texts(2, 64), "AT": Texts(1, 96)}
CLUSTER = 50
VOCABULARY, TOPICS, TOPIC_TERMS = 30_522, 2_000, 150


def load(name: str, folder: Path, queries: int = 500) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Documents and queries of a job by name, or of PATH.npz beside PATH_q.npz."""
    path = Path(name) if name.endswith(".npz") else folder / f"{name}.npz"
    asked = path.with_name(path.stem + "_q.npz")
    if not path.exists() or not asked.exists():
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        if name in TEXTS:
            docs, asks = vocabulary(200_000, queries, rng, TEXTS[name])
        else:
            docs, asks = uniform(1_000_000, queries, UNIFORM[name], rng)
        sp.save_npz(path, docs, compressed=False)
        sp.save_npz(asked, asks, compressed=False)
    return sp.load_npz(path), sp.load_npz(asked)


def uniform(
    n: int, queries: int, kind: Clusters, rng: np.random.Generator, d: int = 1024
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Members of n / 50 clusters in random order: each keeps a share of its centre's columns; unit norm."""
    centres, nnz = n // CLUSTER, kind.nnz
    if kind.distinct:
        dims = rng.random((centres, d), dtype=np.float32).argpartition(nnz)[:, :nnz].astype(np.int32)
    else:
        dims = rng.integers(0, d, (centres, nnz), dtype=np.int32)
    values = np.abs(rng.standard_normal((centres, nnz), dtype=np.float32)) + np.float32(0.1)

    def members(of: np.ndarray) -> sp.csr_matrix:
        parts = []
        for some in np.array_split(of, max(1, len(of) // 100_000)):
            own = rng.random((len(some), nnz), dtype=np.float32) < kind.kept
            columns = np.where(own, dims[some], rng.integers(0, d, (len(some), nnz), dtype=np.int32))
            noise = rng.standard_normal((len(some), nnz), dtype=np.float32)
            parts.append(_rows(columns, weigh(kind.values, own, values[some], noise), d))
        return sp.vstack(parts, format="csr", dtype=np.float32)

    return members(rng.permutation(np.arange(n) % centres)), members(rng.integers(0, centres, queries))


def weigh(values: str, own: np.ndarray, centre: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Kept values near their centre's, values of each document's own, or all nearly alike; the noise is normal."""
    if values == "near":
        weights = np.where(own, centre * np.abs(1 + np.float32(0.3) * noise), np.abs(noise)) + np.float32(1e-3)
    elif values == "free":
        weights = np.abs(noise) + np.float32(1e-3)
    else:
        weights = 1 + np.float32(0.1) * np.abs(noise)
    return weights.astype(np.float32)


def vocabulary(n: int, queries: int, rng: np.random.Generator, kind: Texts) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Terms of some topics beside terms of a Zipf background; frequent terms weigh less, as an encoder learns it."""
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

    return (
        texts(rng.integers(0, TOPICS, (n, kind.topics)), kind.own, 128 - kind.own),
        texts(rng.integers(0, TOPICS, (queries, kind.topics)), 38, 5),
    )


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
