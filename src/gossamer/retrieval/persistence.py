"""An index to its file and back: which blocks its parts are, and what is known beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import storage
from .grouping import Groups
from .part import Part
from .tuning import Setting


class Origin(NamedTuple):
    """The version of a file that an index came from or went to."""

    path: Path
    identity: int


@dataclass(frozen=True)
class Stored:
    """All that a file holds of an index."""

    dim: int
    values: bool
    parts: tuple[Part, ...]
    next_id: int
    settings: dict[int, list[Setting]]


def save(path: Path, index: Stored, origin: Origin | None, overwrite: bool, threads: int) -> Origin:
    """FileExistsError if the file there is another version than the origin, unless overwrite."""
    with storage.Writer(path, threads) as writer:
        if not overwrite:
            _check_origin(path, origin)
        parts = [
            {
                "segment": writer.add(p.block),
                "alive": None if p.alive is None else writer.add(p.alive.view(np.uint8)),
                "groups": None if p.groups is None else p.groups.save(writer.add),
            }
            for p in index.parts
        ]
        meta = {"dim": index.dim, "values": index.values, "next_id": index.next_id, "parts": parts}
        identity = writer.commit(meta | {"settings": {str(k): s for k, s in index.settings.items()}})
    return Origin(path.resolve(), identity)


def load(path: Path, into_memory: bool, verify: bool, threads: int) -> tuple[Stored, Origin]:
    """IndexFileError if the file is damaged or newer than this library."""
    meta, blocks, identity = storage.read(path, into_memory, verify, threads)
    parts = tuple(_part(path, part, blocks, meta) for part in meta["parts"])
    settings = {int(k): [Setting(*s) for s in some] for k, some in meta["settings"].items()}
    stored = Stored(meta["dim"], meta["values"], parts, meta["next_id"], settings)
    return stored, Origin(path.resolve(), identity)


def _part(path: Path, known: dict[str, Any], blocks: list[np.ndarray], meta: dict[str, Any]) -> Part:
    alive = None if known["alive"] is None else blocks[known["alive"]].view(np.uint32)
    groups = known.get("groups")
    try:
        part = Part.view(blocks[known["segment"]], alive)
        if groups is not None:
            centres, starts = blocks[groups["centres"]], blocks[groups["starts"]].view(np.uint32)
            part = replace(part, groups=Groups.view(centres, starts, part.native))
    except ValueError as e:
        raise storage.IndexFileError(f"{path}: {e}") from None
    expected = (meta["dim"], meta["values"], -(-len(part) // 32))
    if expected != (part.native.dim, part.native.exact, expected[2] if alive is None else len(alive)):
        raise storage.IndexFileError(f"{path} is damaged (parts contradict each other): restore it or build it again")
    return part


def _check_origin(path: Path, origin: Origin | None) -> None:
    there = storage.identity(path)
    if there is None or origin == (path.resolve(), there):
        return
    ours = origin is not None and origin.path == path.resolve()
    what = "was saved by another process since this index read it" if ours else "exists already"
    raise FileExistsError(f"{path} {what}: pass overwrite=True to replace it, or save elsewhere")
