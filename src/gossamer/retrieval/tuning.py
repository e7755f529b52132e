"""How approximate a search may be for a recall: measured on queries, kept with the index."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .rows import Rows, as_rows

if TYPE_CHECKING:
    from .index import Hits, SparseIndex

SAMPLE = 400
MARGIN = 2.33  # standard errors: 99 times in 100 the recall is met on other queries, too
UNSEEN = 0.5  # recall of one more query: few queries lose much, so a sample may hold none of them
LEAST = 0.8  # recalls below are of no use
GROUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
GROUPS_FIRST = (2, 8, 24)
CUTS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.11, 0.13, 0.155, 0.18, 0.215, 0.25, 0.3, 0.35)
SURVIVORS = (1, 2, 4, 8, 16, 32)
TRUSTS = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


class Setting(NamedTuple):
    """recall: of the k best, between 0 and 1, a lower bound from what was measured; seconds: a query took.

    groups: so many groups of like documents are looked at first (see `SparseIndex.group`). cut: contributions below
    this share of the query's largest are skipped; survivors: documents then scored exactly. With 0 survivors the search
    is the exact one, but for trust: bounds on what it leaves out count that much, and below 1 it may miss some of the
    best. With trust 0 it looks at the groups only.
    """

    recall: float
    cut: float
    survivors: int
    seconds: float
    trust: float = 1.0
    groups: int = 0

    @property
    def exact(self) -> bool:
        return self.trust == 1 and self.survivors == 0


def calibrate(index: SparseIndex, queries: Any, k: int, threads: int, margin: float) -> list[Setting]:
    """The settings that no other one beats in both recall and time, fastest first, and the fastest exact one."""
    rows, own = _sample(index) if queries is None else (as_rows(queries, index.dim), None)
    exact = Setting(1.0, 0.0, 0 if index.values else k, 0.0)
    truth = index.search(rows, k, setting=exact, threads=threads).ids
    if own is not None and k > 1:
        truth[truth == own[:, None]] = -1  # that a document finds itself says nothing

    def measure(setting: Setting) -> Setting:
        return _measure(index, rows, truth, setting, threads, margin)

    measured = [measure(exact)]
    if index.groups:
        measured += _by_groups(measure, exact, index.groups)
    for trust in TRUSTS if index.values else ():
        measured.append(measure(exact._replace(trust=trust)))
        if measured[-1].recall < LEAST:
            break
    # Without exact values a score is what was summed: nothing may be left out.
    for cut in CUTS if index.values else CUTS[:1]:
        best = 0.0
        for times in SURVIVORS if index.values else (1,):
            measured.append(measure(Setting(0.0, cut, times * k, 0.0)))
            if measured[-1].recall <= best + 1e-4:
                break
            best = measured[-1].recall
        if best < LEAST:
            break
    return front(measured)


def _by_groups(measure: Callable[[Setting], Setting], exact: Setting, groups: int) -> list[Setting]:
    """Nothing but groups, more and more of them; then a few of them before a search of the rest."""
    measured: list[Setting] = []
    for n in takewhile(lambda n: n <= groups, GROUPS):
        measured.append(measure(exact._replace(trust=0.0, groups=n)))
        if measured[-1].recall > 0.999:
            break
    for n in GROUPS_FIRST:
        for trust in (1.0, *TRUSTS):
            measured.append(measure(exact._replace(trust=trust, groups=n)))
            if measured[-1].recall < LEAST:
                break
    return measured


def front(settings: list[Setting]) -> list[Setting]:
    """Of settings in order of time, those with a higher recall than all before them; the fastest exact one is there."""
    kept: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.seconds, -s.recall)):
        if not kept or setting.recall > kept[-1].recall or (setting.exact and not any(s.exact for s in kept)):
            kept.append(setting)
    return kept


def pick(settings: list[Setting], recall: float) -> Setting:
    """The fastest setting of that recall."""
    return min((s for s in settings if s.recall >= recall), key=lambda s: s.seconds)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true ids [queries, k] that were found; -1 marks places that have none."""
    hits = sum(len(np.intersect1d(f, t[t >= 0])) for f, t in zip(found, truth, strict=True))
    return hits / max(int((truth >= 0).sum()), 1)


def _measure(
    index: SparseIndex, rows: Rows, truth: np.ndarray, setting: Setting, threads: int, margin: float
) -> Setting:
    runs = [timed(index, rows, truth.shape[1], setting, threads) for _ in range(2)]
    seconds = min(seconds for _, seconds in runs)
    if setting.exact:
        return setting._replace(recall=1.0, seconds=seconds)
    own = [recall(f[None], t[None]) for f, t in zip(runs[0][0].ids, truth, strict=True) if (t >= 0).any()]
    return setting._replace(recall=_lower_bound(np.array(own), margin), seconds=seconds)


def _lower_bound(recalls: np.ndarray, margin: float) -> float:
    """Of the mean over other queries; the mean of these without a margin."""
    if margin == 0 or len(recalls) == 0:
        return float(recalls.mean()) if len(recalls) else 1.0
    seen = np.append(recalls, UNSEEN)
    return float(seen.mean() - margin * seen.std(ddof=1) / len(seen) ** 0.5)


def _sample(index: SparseIndex) -> tuple[Rows, np.ndarray]:
    """Documents that stand in for queries, and their ids."""
    ids = np.concatenate([part.living_ids() for part in index._parts])
    chosen = np.random.default_rng(0).choice(ids, min(SAMPLE, len(ids)), replace=False)
    return index.rows(chosen)


def timed(index: SparseIndex, queries: Any, k: int, setting: Setting | None, threads: int) -> tuple[Hits, float]:
    """Hits, and seconds a query."""
    start = time.perf_counter()
    hits = index.search(queries, k, setting=setting, threads=threads)
    return hits, (time.perf_counter() - start) / max(len(hits.ids), 1)
