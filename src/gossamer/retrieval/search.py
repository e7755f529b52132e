"""Searches built on the index: in the manner of sentence-transformers, in two stages, and together with BM25."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .index import Hits, SparseIndex

RANK_CONSTANT = 60  # of reciprocal rank fusion: Cormack, Clarke and Büttcher, SIGIR 2009


def semantic_search_gossamer(
    query_embeddings: Any,
    corpus_embeddings: Any = None,
    corpus_index: SparseIndex | None = None,
    top_k: int = 10,
    output_index: bool = False,
    index_kwargs: dict[str, Any] | None = None,
    search_kwargs: dict[str, Any] | None = None,
) -> tuple[list[list[dict[str, int | float]]], float] | tuple[list[list[dict[str, int | float]]], float, SparseIndex]:
    """Takes the place of sentence_transformers.util.semantic_search_seismic, and needs no decoded tokens.

    The embeddings are what SparseEncoder.encode returns, or any other sparse matrix. Gives ([{"corpus_id", "score"},
    ...] per query, seconds of the search), and the index too if output_index. index_kwargs go to `SparseIndex.build`,
    search_kwargs to `SparseIndex.search` (recall=0.99 is faster than the exact default).
    """
    if corpus_index is None:
        if corpus_embeddings is None:
            raise ValueError("pass corpus_embeddings, or a corpus_index that was built before")
        corpus_index = SparseIndex.build(corpus_embeddings, **(index_kwargs or {}))
    start = time.perf_counter()
    hits = corpus_index.search(query_embeddings, top_k, **(search_kwargs or {}))
    seconds = time.perf_counter() - start
    results = [
        [{"corpus_id": int(i), "score": float(s)} for s, i in zip(scores, ids, strict=True) if i >= 0]
        for scores, ids in zip(*hits, strict=True)
    ]
    return (results, seconds, corpus_index) if output_index else (results, seconds)


def two_stage_search(
    index: SparseIndex,
    queries: Any,
    dense_queries: Any,
    dense_docs: Any,
    k: int = 10,
    *,
    candidates: int = 100,
    recall: float | None = None,
    filter: Any = None,
    threads: int = 0,
) -> Hits:
    """The sparse index finds candidates, the dense embeddings order them by inner product.

    dense_docs: [largest id + 1, D], row i belongs to the document of id i; of a memory map only candidates are read.
    """
    first = index.search(queries, max(k, candidates), recall=recall, filter=filter, threads=threads)
    dense_queries = _dense(dense_queries)
    if len(dense_queries) != len(first.ids):
        raise ValueError(f"{len(dense_queries)} dense queries for {len(first.ids)} sparse ones: give one for each")
    if len(first.ids) and (highest := int(first.ids.max())) >= len(dense_docs):
        raise ValueError(f"there is no dense embedding of id {highest}: dense_docs has {len(dense_docs)} rows")
    scores = np.full(first.ids.shape, -np.inf, np.float32)
    for row, (ids, query) in enumerate(zip(first.ids, dense_queries, strict=True)):
        found = ids >= 0
        scores[row, found] = _dense(dense_docs[ids[found]]) @ query
    return _best(scores, first.ids, k)


def hybrid_search(
    index: SparseIndex,
    queries: Any,
    bm25: Any,
    query_tokens: Any,
    k: int = 10,
    *,
    candidates: int = 100,
    fusion: str = "rank",
    weights: tuple[float, float] = (1.0, 1.0),
    recall: float | None = None,
    threads: int = 0,
) -> Hits:
    """Sparse embeddings and a `bm25s.BM25` index of the same documents (its row i is id i), fused.

    fusion: "rank", reciprocal rank fusion, or "score", the sum of scores scaled to 0..1 per query. weights: of the
    embeddings and of BM25.
    """
    n = max(k, candidates)
    sparse = index.search(queries, n, recall=recall, threads=threads)
    size = bm25.scores["num_docs"]
    ids, scores = bm25.retrieve(query_tokens, k=min(n, size), corpus=np.arange(size), show_progress=False)
    if len(ids) != len(sparse.ids):
        raise ValueError(f"{len(ids)} tokenised queries for {len(sparse.ids)} embeddings: give one for each")
    lexical = Hits(np.where(scores > 0, scores, -np.inf).astype(np.float32), np.where(scores > 0, ids, -1))
    return fuse([sparse, lexical], k, fusion, weights)


def fuse(hits: list[Hits], k: int, fusion: str = "rank", weights: Any = None) -> Hits:
    """The k best by the weighted sum over result lists of 1 / (60 + rank), or of scores scaled to 0..1 per query.

    A list adds nothing to documents that it does not hold.
    """
    if fusion not in ("rank", "score"):
        raise ValueError(f"unknown fusion '{fusion}'; there are: rank, score")
    weights = [1.0] * len(hits) if weights is None else list(weights)
    points = [w * (_by_rank(h) if fusion == "rank" else _by_score(h)) for h, w in zip(hits, weights, strict=True)]
    width = sum(h.ids.shape[1] for h in hits)
    scores = np.full((len(hits[0].ids), width), -np.inf, np.float32)
    ids = np.full(scores.shape, -1, np.int64)
    for row in range(len(scores)):
        named = np.concatenate([h.ids[row] for h in hits])
        earned = np.concatenate([p[row] for p in points])[named >= 0]
        unique, place = np.unique(named[named >= 0], return_inverse=True)
        ids[row, : len(unique)] = unique
        scores[row, : len(unique)] = np.bincount(place, earned, len(unique))
    return _best(scores, ids, k)


def _by_rank(hits: Hits) -> np.ndarray:
    return np.broadcast_to(1 / (RANK_CONSTANT + 1 + np.arange(hits.ids.shape[1])), hits.ids.shape)


def _by_score(hits: Hits) -> np.ndarray:
    found = hits.ids >= 0
    low = np.where(found, hits.scores, np.inf).min(1, keepdims=True, initial=np.inf)
    high = np.where(found, hits.scores, -np.inf).max(1, keepdims=True, initial=-np.inf)
    spread = np.where(high > low, high - low, 1)
    return np.where(found, (np.where(found, hits.scores, 0) - np.where(found, low, 0)) / spread, 0)


def _best(scores: np.ndarray, ids: np.ndarray, k: int) -> Hits:
    """The k best of each row, ties to the lower id, missing ones last."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    short = ((0, 0), (0, k - order.shape[1]))
    return Hits(
        np.pad(np.take_along_axis(scores, order, 1), short, constant_values=-np.inf),
        np.pad(np.take_along_axis(ids, order, 1), short, constant_values=-1),
    )


def _dense(x: Any) -> np.ndarray:
    x = x.detach().cpu().float().numpy() if hasattr(x, "detach") else np.asarray(x, np.float32)
    if x.ndim != 2:
        raise ValueError(f"expected a matrix, one dense embedding a row, got {x.ndim} dimensions")
    return x
