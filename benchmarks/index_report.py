"""Clock and lines of bench_index.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from results import append, environment

K, BATCH, PASSES = 10, 20, 5


class Report:
    """Prints and appends lines of one job."""

    def __init__(self, path: Path, job: str) -> None:
        self.path, self.job = path, job

    def line(
        self, summary: str, case: dict, value: float, unit: str, sense: str = "<=", must: float | None = None
    ) -> None:
        case = {"job": self.job} | case
        print(f"{summary} {case}: {value:.4g} {unit}" + ("" if must is None else f" (bar: {sense} {must})"), flush=True)
        line = {"bench": "index", "summary": summary, "case": case, "value": float(f"{value:.5g}"), "sense": sense}
        append(self.path, line | {"must": must, "unit": unit, "n": 1} | environment())

    def us(self, mode: str, threads: int, value: float, must: float | None = None, **more: object) -> None:
        self.line("us_per_query", {"mode": mode, "threads": threads} | more, value, "microseconds", must=must)


def batches(queries: sp.csr_matrix) -> list[sp.csr_matrix]:
    return [queries[i : i + BATCH] for i in range(0, queries.shape[0], BATCH)]


def least(calls: list[Callable[[], object]], passes: int = PASSES) -> float:
    """Seconds for all calls, each its least over the passes; a pass makes every call once."""
    best = np.full(len(calls), np.inf)
    for _ in range(passes):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return float(best.sum())
