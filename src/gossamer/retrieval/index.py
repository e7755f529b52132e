"""An inverted index over sparse embeddings: maximum inner product, exact to the bit or fast to a recall.

The idea of the paper (2004.05665, section 3): embeddings whose columns are evenly used make a list of the documents of
each column short, and a query reads only its own columns' lists.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import persistence
from .merging import MOST_ROWS, join_all, join_small, without
from .native import require
from .part import Part, concatenated, statistics
from .persistence import Origin, Stored
from .rows import Rows, Tidy, as_filter, as_ids, as_rows
from .tuning import MARGIN, Setting, calibrate, pick

MOST_RESULTS = 1 << 16  # of a query, where there are no more documents: what exceeds those is padding
MOST_VALUES = 1 << 30  # of a part, whose places have 31 bits
QUERIES_AT_ONCE = 2048
CLEARLY = 0.8  # share of the time that grouping must bring a search down to


class Hits(NamedTuple):
    """scores float32 and ids int64, [queries, k], best first; where there were fewer than k, -inf and -1."""

    scores: np.ndarray
    ids: np.ndarray


class SparseIndex:
    """Documents as sparse vectors, searched by inner product.

    Exact search returns what brute force does, to the bit: float32 products summed in ascending order of dimension,
    ties to the lower id, documents that share no dimension with the query included at score 0. Searches may run in any
    number of threads while one adds, deletes or saves: each sees the index as it was when it began.
    """

    def __init__(self, dim: int, *, values: bool = True) -> None:
        """values=False keeps no exact values: half the size, approximate search only."""
        if not 0 < dim < 2**32 - 1:
            raise ValueError(f"dim is {dim}: expected 1 to 2^32 - 2")
        self.dim, self.values = dim, values
        self._parts: tuple[Part, ...] = ()
        self._settings: dict[int, list[Setting]] = {}
        self._next_id = 0
        self._origin: Origin | None = None
        self._lock = threading.RLock()

    @classmethod
    def build(
        cls,
        docs: Any,
        *,
        ids: Any = None,
        dim: int | None = None,
        values: bool = True,
        threads: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> SparseIndex:
        """docs: a sparse matrix (see `as_rows`), or an iterator of them; ids: int64 per document, 0, 1, ... without.

        progress is called with the number of documents indexed so far.
        """
        chunks = docs if isinstance(docs, Iterator) else iter([docs])
        ids = None if ids is None else as_ids(ids)
        index, used = None, 0
        for chunk in chunks:
            rows = as_rows(chunk, dim if index is None else index.dim)
            index = cls(rows.dim, values=values) if index is None else index
            own = None if ids is None else ids[used : used + len(rows)]
            index.add(rows, own, threads=threads, progress=progress and _shifted(progress, used))
            used += len(rows)
        if index is None:
            if dim is None:
                raise ValueError("no documents: pass dim= to make an empty index")
            index = cls(dim, values=values)
        if ids is not None and used != len(ids):
            raise ValueError(f"{len(ids)} ids for {used} documents: give one for each")
        return index

    @classmethod
    def open(cls, path: str | os.PathLike, *, load: bool = False, verify: bool = True, threads: int = 0) -> SparseIndex:
        """Maps a file that `save` wrote. IndexFileError if it is damaged or newer than this library.

        load=True reads it into memory, which searches faster (huge pages); verify=False skips the checksums of the
        blocks, so that opening reads almost nothing. Even then a damaged file cannot crash a search.
        """
        stored, origin = persistence.load(Path(path), load, verify, _threads(threads))
        index = cls(stored.dim, values=stored.values)
        index._parts, index._next_id, index._settings = stored.parts, stored.next_id, stored.settings
        index._origin = origin
        return index

    def save(self, path: str | os.PathLike | None = None, *, overwrite: bool = False, threads: int = 0) -> Path:
        """Writes one file and moves it into place at once; open readers of the old one keep it.

        Without a path: where the index was opened or saved last. FileExistsError if the file there is not the version
        this index came from (another process saved meanwhile), unless overwrite. BlockingIOError if one is saving now.
        """
        with self._lock:
            if path is None and self._origin is None:
                raise ValueError("this index has no file yet: pass a path")
            path = Path(path) if path is not None else self._origin.path  # type: ignore[union-attr]
            stored = Stored(self.dim, self.values, self._parts, self._next_id, self._settings)
            self._origin = persistence.save(path, stored, self._origin, overwrite, _threads(threads))
            return path

    def add(
        self,
        docs: Any,
        ids: Any = None,
        *,
        replace: bool = False,
        threads: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Adds documents and returns their ids, int64. ids: not negative, unique; without, the next free ones.

        ValueError if an id is there already, unless replace, which deletes the old document.
        """
        rows = as_rows(docs, self.dim)
        with self._lock:
            given = ids is not None
            ids = as_ids(ids) if given else np.arange(self._next_id, self._next_id + len(rows))
            if len(ids) != len(rows):
                raise ValueError(f"{len(ids)} ids for {len(rows)} documents: give one for each")
            parts = list(self._parts)
            if given:
                parts = self._freed(parts, ids, replace)
            for begin, end in rows.pieces(MOST_ROWS, MOST_VALUES):
                parts.append(self._build(threads)(rows.tidy(begin, end), ids[begin:end]))
                if progress is not None:
                    progress(end)
            self._put(join_small(parts, self._build(threads)), threads)
            if len(ids):
                self._next_id = max(self._next_id, int(ids.max()) + 1)
        return ids

    def delete(self, ids: Any) -> int:
        """Removes documents; returns how many were there. Their room is freed by `merge` or as the index grows."""
        ids = as_ids(ids, unique=False)
        with self._lock:
            before = len(self)
            self._parts = tuple(without(self._parts, ids))
            return before - len(self)

    def group(self, *, recall: float | None = None, queries: Any = None, threads: int = 0) -> bool:
        """Puts documents that are alike side by side; documents added later are grouped, too.

        Searches of documents that fall into groups get faster, approximate ones most. Takes about a minute a million
        documents, and 5 to 10 bytes a document. recall: only if that makes searches of this recall clearly faster,
        measured on queries, a sample of the documents without. True if the index is grouped now. Forgets what
        `calibrate` measured.
        """
        with self._lock:
            before, parts = self._settings, self._parts
            plain = None if recall is None else pick(self.calibrate(queries, threads=threads), recall)
            self._parts, self._settings = tuple(p.grouped(_threads(threads)) for p in parts), {}
            if plain is not None and recall is not None and len(self):
                grouped = pick(self.calibrate(queries, threads=threads), recall)
                if grouped.seconds > CLEARLY * plain.seconds:
                    self._parts, self._settings = parts, before
            return self.groups > 0

    def merge(self, *, threads: int = 0) -> None:
        """Rewrites the index without its deleted documents, in as few parts as possible."""
        with self._lock:
            self._put(join_all(self._parts, self._build(threads)), threads)

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        recall: float | None = None,
        filter: Any = None,
        threads: int = 0,
        setting: Setting | None = None,
    ) -> Hits:
        """The k best documents of each query. k: up to the number of documents, or 65,536 where there are fewer.

        recall: None is exact; 0.99 finds 99 % of the true k best on average, calibrated once on the documents
        themselves unless `calibrate` was given queries. filter: ids to choose from, or a boolean vector indexed by id.
        threads: 0 is as many as this process may run at once. setting: of the approximate search, by hand.
        """
        most = max(len(self), MOST_RESULTS)
        if not 1 <= k <= most:
            raise ValueError(f"k is {k} of {len(self)} documents: ask for at least one result and at most {most}")
        rows = as_rows(queries, self.dim)
        parts = self._parts
        if recall is None and setting is None and not self.values:
            raise ValueError("this index keeps no exact values: ask for a recall (0.99), or build it with values")
        if setting is None:
            setting = self._exact(k) if recall is None else self._setting(recall, k)
        found = min(k, sum(p.living for p in parts))
        hits = Hits(np.full((len(rows), k), -np.inf, np.float32), np.full((len(rows), k), -1, np.int64))
        allowed = [p.alive if filter is None else p.allowed(as_filter(filter)) for p in parts]
        targets = [p.target(a) for p, a in zip(parts, allowed, strict=True)]
        # A few at a time, so that Ctrl-C is heard.
        for begin in range(0, len(rows), QUERIES_AT_ONCE) if found else ():
            end = min(begin + QUERIES_AT_ONCE, len(rows))
            scores, got = run(targets, rows.tidy(begin, end), found, setting, _threads(threads))
            hits.scores[begin:end, :found], hits.ids[begin:end, :found] = scores, got
        return hits

    def calibrate(self, queries: Any = None, k: int = 10, *, threads: int = 0, margin: float = MARGIN) -> list[Setting]:
        """Measures settings of the approximate search on queries, a sample of the documents without.

        They are kept with the index and used for searches of up to k results. Their recall is what was measured less
        `margin` standard errors, as if one more query had lost half of its results, so that other queries of the kind
        meet it: for 0.99 it takes 200 queries or more, below that only an exact search is sure of it.
        """
        settings = calibrate(self, queries, k, threads, margin)
        with self._lock:
            self._settings = self._settings | {k: settings}
        return settings

    def postings(self, queries: Any) -> np.ndarray:
        """Postings that each query reads, int64: the FLOPs of an exact search, in multiplications."""
        rows = as_rows(queries, self.dim).tidy()
        counts = np.empty(len(rows), np.int64)
        targets = [p.target(None) for p in self._parts]
        require().count_postings(targets, len(rows), *rows.pointers(), counts.ctypes.data)
        return counts

    def stats(self) -> dict[str, Any]:
        """Sizes, and how evenly the columns are used: `evenness` is R_sub of the paper, 1 where all are alike."""
        known = {"groups": self.groups, "exact": self.values, "calibrated_for_k": sorted(self._settings)}
        return statistics(self._parts, self.dim) | known

    def rows(self, ids: Any = None) -> tuple[Rows, np.ndarray]:
        """(documents, their ids), in the order stored; all of them without ids."""
        parts = self._parts
        if ids is not None:
            parts = [Part(p.block, p.native, p.allowed(as_ids(ids))) for p in parts]
        got = [p.rows() for p in parts]
        joined = Tidy.concatenate([rows for rows, _ in got])
        columns = joined.columns.view(np.int32) if self.dim < 2**31 else joined.columns.astype(np.int64)
        return Rows(joined.starts, columns, joined.values, self.dim), concatenated([ids for _, ids in got])

    @property
    def groups(self) -> int:
        """Groups of like documents, 0 before `group`."""
        return sum(p.groups.native.docs for p in self._parts if p.groups is not None)

    def __len__(self) -> int:
        return sum(p.living for p in self._parts)

    def __reduce__(self) -> Any:
        raise TypeError("a SparseIndex is not pickled or copied: save(path) it, and SparseIndex.open(path) elsewhere")

    def __repr__(self) -> str:
        return f"SparseIndex({len(self)} documents, {self.dim} dimensions{'' if self.values else ', no exact values'})"

    def _setting(self, recall: float, k: int) -> Setting:
        if not 0 < recall <= 1:
            raise ValueError(f"recall is {recall}: expected above 0 and up to 1")
        if recall == 1 and self.values:
            return Setting(1.0, 0.0, 0, 0.0)
        known = [n for n in sorted(self._settings) if n >= k]
        if not known and len(self):
            self.calibrate(k=max(k, 10))
            known = [max(k, 10)]
        return pick(self._settings[known[0]], recall) if known else Setting(1.0, 0.0, k, 0.0)

    def _exact(self, k: int) -> Setting | None:
        """The fastest exact way that was measured."""
        known = next((self._settings[n] for n in sorted(self._settings) if n >= k), [])
        return min((s for s in known if s.exact), key=lambda s: s.seconds, default=None)

    def _put(self, parts: list[Part], threads: int) -> None:
        """Takes these parts; once grouped, an index stays so."""
        if any(p.groups is not None for p in self._parts):
            parts = [p.grouped(_threads(threads)) for p in parts]
        self._parts = tuple(parts)

    def _build(self, threads: int) -> Callable[[Tidy, np.ndarray], Part]:
        return lambda rows, ids: Part.build(rows, self.dim, self.values, ids, _threads(threads))

    def _freed(self, parts: list[Part], ids: np.ndarray, replace: bool) -> list[Part]:
        if replace:
            return without(parts, ids)
        for part in parts:
            if len(places := part.places(ids)):
                raise ValueError(f"id {part.ids[places[0]]} is there already: pass replace=True, or delete it first")
        return parts


def run(targets: list, rows: Tidy, k: int, setting: Setting | None, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """scores and ids [rows, k] of queries that are checked already; setting None is exact."""
    scores, ids = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    exact = setting is None or setting.survivors == 0
    survivors, cut, trust, groups = (
        (0, 0.0, 1.0, 0) if setting is None else (max(setting.survivors, k), setting.cut, setting.trust, setting.groups)
    )
    out = (scores.ctypes.data, ids.ctypes.data)
    require().search(targets, len(rows), *rows.pointers(), k, exact, trust, survivors, cut, groups, threads, *out)
    return scores, ids


def _threads(threads: int) -> int:
    if threads < 0:
        raise ValueError(f"threads is {threads}: expected 0 (all) or more")
    return threads or len(os.sched_getaffinity(0))


def _shifted(progress: Callable[[int], object], by: int) -> Callable[[int], object]:
    return lambda done: progress(by + done)
