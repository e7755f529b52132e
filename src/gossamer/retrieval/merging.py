"""When parts of an index are joined: rarely enough that a document is rewritten a few times at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .part import Part, concatenated
from .rows import Tidy

MOST_ROWS = 1 << 20  # of a part
SMALL_PARTS = 8

Build = Callable[[Tidy, np.ndarray], Part]


def join_small(parts: Iterable[Part], build: Build) -> list[Part]:
    """Joins the newest small parts once there are many; drops empty ones."""
    parts = [p for p in parts if p.living]
    while (n := _to_join(parts)) > 1:
        parts = [*parts[:-n], joined(parts[-n:], build)]
    return parts


def join_all(parts: Iterable[Part], build: Build) -> list[Part]:
    """As few parts as possible, none with deleted documents."""
    done: list[Part] = []
    waiting: list[Part] = []
    for part in parts:
        if waiting and sum(p.living for p in waiting) + part.living > MOST_ROWS:
            done, waiting = [*done, joined(waiting, build)], []
        waiting.append(part)
    return done + ([joined(waiting, build)] if waiting else [])


def joined(parts: Sequence[Part], build: Build) -> Part:
    if len(parts) == 1 and parts[0].alive is None:
        return parts[0]
    got = [p.rows() for p in parts]
    return build(Tidy.concatenate([rows for rows, _ in got]), concatenated([ids for _, ids in got]))


def without(parts: Iterable[Part], ids: np.ndarray) -> list[Part]:
    found = ((p, p.places(ids)) for p in parts)
    return [p.without(places) if len(places) else p for p, places in found]


def _to_join(parts: Sequence[Part]) -> int:
    """How many of the newest parts: those of a like size, a part twice as large as all after it stays as it is."""
    sizes = [p.living for p in reversed(parts)]
    small = next((i for i, size in enumerate(sizes) if size >= MOST_ROWS // 2), len(sizes))
    if small < SMALL_PARTS:
        return 0
    total, n = 0, 0
    while n < small and (n < 2 or sizes[n] < 2 * total) and total + sizes[n] <= MOST_ROWS:
        total, n = total + sizes[n], n + 1
    return n
