"""A race of a few milliseconds between products on a GPU, without CUDA graphs: what a first product may cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
ROUNDS = 5
SLICE = 1e-4  # seconds of work between two events, about
MOST = 8  # launches of one way between two events, at most
HOPELESS = 1.5  # times the best of a first look, from which on nobody looks again
AHEAD = 60_000  # cycles of waiting per launch: what queues up behind them does not wait for the host


def duel(runners: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Median microseconds on the GPU of each runner, all of them warm; of the hopeless those of the first look."""
    with torch.cuda.device(device):
        found = {k: t * 1e6 for k, t in _rounds(runners, dict.fromkeys(runners, 1), 2).items()}
        limit = HOPELESS * min(found.values())
        near = {k: r for k, r in runners.items() if found[k] <= limit}
        if len(near) == 1:
            return found
        launches = {k: max(1, min(MOST, round(SLICE * 1e6 / max(found[k], 1)))) for k in near}
        return found | {k: t * 1e6 for k, t in _rounds(near, launches, ROUNDS).items()}


def _rounds(runners: Mapping[str, Call], launches: Mapping[str, int], rounds: int) -> dict[str, float]:
    """Median seconds of a launch; in a round each runner has its turn."""
    found: dict[str, list[float]] = {k: [] for k in runners}
    for _ in range(rounds):
        torch.cuda._sleep(AHEAD * sum(launches.values()))
        marks = [_mark()]
        for key, run in runners.items():
            for _ in range(launches[key]):
                run()
            marks.append(_mark())
        marks[-1].synchronize()
        for key, begin, end in zip(runners, marks, marks[1:], strict=False):
            found[key].append(begin.elapsed_time(end) / 1e3 / launches[key])
    return {k: statistics.median(times) for k, times in found.items()}


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
