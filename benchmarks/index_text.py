"""bm25s on the texts behind the real codes: another kind of search, so only its time, size and build are compared."""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import ir_data
import ir_embed
from index_report import BATCH, K, Report, least

if TYPE_CHECKING:
    import bm25s


def measure(data: Path, queries: int, report: Report) -> None:
    """Word counts of the passages that `bench_retrieval.py codes` encodes, asked with the first of its queries.

    Once with bm25s's numpy backend, and with its numba backend where numba is installed; one thread.
    """
    if find_spec("bm25s") is None:
        raise SystemExit("bm25s is not installed; fix: pip install bm25s")
    import bm25s

    texts, asked = ir_data.passages(data, ir_embed.PASSAGES), ir_data.heldout_queries(data)[:queries]
    start = time.perf_counter()
    tokens = bm25s.tokenize(texts, show_progress=False)
    case = {"mode": "bm25s", "documents": len(texts), "version": bm25s.__version__}
    report.line("build_seconds", case | {"of": "words"}, time.perf_counter() - start, "seconds")
    for backend in ("numpy", "numba") if find_spec("numba") else ("numpy",):
        index = bm25s.BM25(backend=backend)
        start = time.perf_counter()
        index.index(tokens, show_progress=False)
        report.line("build_seconds", case | {"of": f"{backend} index"}, time.perf_counter() - start, "seconds")
        search(index, asked, report, {"documents": len(texts), "backend": backend})
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    report.line("index_bytes", case, size, "bytes")


def search(index: bm25s.BM25, asked: list[str], report: Report, case: dict) -> None:
    """Of words tokenised beforehand, as codes are made beforehand for us, and of text tokenised in the call."""
    import bm25s

    def words(some: list[str]) -> list[list[str]]:
        return bm25s.tokenize(some, return_ids=False, show_progress=False)

    def find(some: list[list[str]]) -> object:
        return index.retrieve(some, k=K, show_progress=False, n_threads=0)  # 0: one, this one

    batched = [words(asked[i : i + BATCH]) for i in range(0, len(asked), BATCH)]
    single = [words([text]) for text in asked]
    ways = {
        "bm25s, words": [lambda w=w: find(w) for w in batched],
        "bm25s, words, one query a call": [lambda w=w: find(w) for w in single],
        "bm25s, text, one query a call": [lambda t=text: find(words([t])) for text in asked],
    }
    for mode, calls in ways.items():
        report.us(mode, 1, least(calls, 3) / len(asked) * 1e6, **case)
