"""How approximate a search may be for a recall: measured on queries, kept with the index."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .rows import Rows, as_rows

if TYPE_CHECKING:
    from .index import Hits, SparseIndex

SAMPLE = 200
CUTS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.11, 0.13, 0.155, 0.18, 0.215, 0.25, 0.3, 0.35)
SURVIVORS = (1, 2, 4, 8, 16, 32)
TRUSTS = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


class Setting(NamedTuple):
    """recall: measured, between 0 and 1, of the k best; cut: contributions below this share of the query's largest are
    skipped; survivors: documents then scored exactly; seconds: a query took. With 0 survivors the search is the exact
    one, but for trust: bounds on what it leaves out count that much, and below 1 it may miss some of the best.
    """

    recall: float
    cut: float
    survivors: int
    seconds: float
    trust: float = 1.0


def calibrate(index: SparseIndex, queries: Any, k: int, threads: int) -> list[Setting]:
    """The settings that no other one beats in both recall and time, fastest first."""
    rows = _sample(index) if queries is None else as_rows(queries, index.dim)
    exact = Setting(1.0, 0.0, 0 if index.values else k, 0.0)
    truth = index.search(rows, k, setting=exact, threads=threads).ids
    measured = [_measure(index, rows, truth, exact, threads)]
    for trust in TRUSTS if index.values else ():
        measured.append(_measure(index, rows, truth, exact._replace(trust=trust), threads))
        if measured[-1].recall < 0.8:
            break
    # Without exact values a score is what was summed: nothing may be left out.
    for cut in CUTS if index.values else CUTS[:1]:
        best = 0.0
        for times in SURVIVORS if index.values else (1,):
            setting = _measure(index, rows, truth, Setting(0.0, cut, times * k, 0.0), threads)
            measured.append(setting)
            if setting.recall <= best + 1e-4:
                break
            best = setting.recall
        if best < 0.8:
            break
    return front(measured)


def front(settings: list[Setting]) -> list[Setting]:
    """Of settings in order of time, those with a higher recall than all before them; the exact one is the last."""
    kept: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.seconds, -s.recall)):
        if not kept or setting.recall > kept[-1].recall:
            kept.append(setting)
    return kept


def pick(settings: list[Setting], recall: float) -> Setting:
    """The fastest setting of that recall."""
    return min((s for s in settings if s.recall >= recall), key=lambda s: s.seconds)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true ids [queries, k] that were found; -1 marks places that have none."""
    hits = sum(len(np.intersect1d(f, t[t >= 0])) for f, t in zip(found, truth, strict=True))
    return hits / max(int((truth >= 0).sum()), 1)


def _measure(index: SparseIndex, rows: Rows, truth: np.ndarray, setting: Setting, threads: int) -> Setting:
    runs = [timed(index, rows, truth.shape[1], setting, threads) for _ in range(2)]
    return setting._replace(recall=recall(runs[0][0].ids, truth), seconds=min(seconds for _, seconds in runs))


def _sample(index: SparseIndex) -> Rows:
    """Documents that stand in for queries."""
    ids = np.concatenate([part.living_ids() for part in index._parts])
    chosen = np.random.default_rng(0).choice(ids, min(SAMPLE, len(ids)), replace=False)
    return index.rows(chosen)[0]


def timed(index: SparseIndex, queries: Any, k: int, setting: Setting | None, threads: int) -> tuple[Hits, float]:
    """Hits, and seconds a query."""
    start = time.perf_counter()
    hits = index.search(queries, k, setting=setting, threads=threads)
    return hits, (time.perf_counter() - start) / max(len(hits.ids), 1)
