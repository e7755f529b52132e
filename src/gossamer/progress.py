"""What a compression tells its caller: how far it is, how long it may still take, what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .choose import Choice


@dataclass(frozen=True)
class Progress:
    """`stage`: "check", "choose", "calibrate" (batches) or "fit" (groups); `done` of `total` in it; now at `layer`."""

    stage: str
    done: int
    total: int
    layer: str
    seconds_left: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """`error`: share of the layer's output energy lost, None without statistics; `seconds`: the solver, whole group."""

    name: str
    method: str
    ratio: float
    dense_bytes: int
    stored_bytes: int
    error: float | None
    seconds: float


@dataclass(frozen=True)
class Report:
    """What became of every layer that was compressed, and the choice behind method="auto".

    `left_dense`: bytes, in bf16, of the linear layers of the blocks that the plan leaves as they are.
    """

    layers: tuple[LayerReport, ...]
    choice: Choice | None = None
    left_dense: int = 0

    @property
    def dense_bytes(self) -> int:
        return sum(l.dense_bytes for l in self.layers) + self.left_dense

    @property
    def stored_bytes(self) -> int:
        return sum(l.stored_bytes for l in self.layers) + self.left_dense

    @property
    def ratio(self) -> float:
        """1 - stored / dense bytes, over all linear layers of the blocks, as in the plan."""
        return 1 - self.stored_bytes / max(1, self.dense_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


@dataclass
class Track:
    """One stage: steps `done` of `total`, work `left`, and what the work so far (`spent`) took in `seconds`."""

    done: int
    total: int
    left: float
    spent: float = 0.0
    seconds: float = 0.0


class Clock:
    """Tells the caller how far the run is, and how long it may still take by the speed of what is finished."""

    def __init__(self, notify: Callable[[Progress], object], tracks: dict[str, Track]) -> None:
        self.notify, self.tracks, self.layer, self.at = notify, tracks, "", 0.0

    def begin(self, stage: str, layer: str) -> None:
        self.layer, self.at = layer, time.perf_counter()
        self._tell(stage)

    def advance(self, stage: str, work: float = 1.0) -> None:
        track, now = self.tracks[stage], time.perf_counter()
        track.done, track.left, track.spent = track.done + 1, track.left - work, track.spent + work
        track.seconds, self.at = track.seconds + now - self.at, now
        self._tell(stage)

    def _tell(self, stage: str) -> None:
        track = self.tracks[stage]
        self.notify(Progress(stage, track.done, track.total, self.layer, self._seconds_left()))

    def _seconds_left(self) -> float | None:
        open_tracks = [t for t in self.tracks.values() if t.left > 0]
        if any(t.spent == 0 for t in open_tracks):
            return None
        return sum(t.left * t.seconds / t.spent for t in open_tracks)
