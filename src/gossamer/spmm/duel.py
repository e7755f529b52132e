"""A race of a few milliseconds between products on a GPU, without CUDA graphs: what a first product may cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
ROUNDS = 5
SLICE = 100.0  # microseconds of work between two events, about
MOST = 8  # launches of one way between two events, at most
HOPELESS = 1.5  # times the best of a first look, from which on nobody looks again
AHEAD, LONGEST = 100_000, 40_000_000  # cycles that the GPU waits at first, per launch, and at most, for all of them


def duel(runners: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Median microseconds on the GPU of each runner, all of them warm; of the hopeless those of the first look."""
    with torch.cuda.device(device):
        found = _rounds(runners, dict.fromkeys(runners, 1), 2)
        limit = HOPELESS * min(found.values())
        near = {k: r for k, r in runners.items() if found[k] <= limit}
        if len(near) == 1:
            return found
        launches = {k: max(1, min(MOST, round(SLICE / max(found[k], 1)))) for k in near}
        return found | _rounds(near, launches, ROUNDS)


def _rounds(runners: Mapping[str, Call], launches: Mapping[str, int], rounds: int) -> dict[str, float]:
    """Median microseconds of a launch; in a round each runner has its turn.

    The GPU waits until all of a round is queued, or else the host would be timed: a round that it began before that
    does not count, and it waits longer.
    """
    found: dict[str, list[float]] = {k: [] for k in runners}
    wait, done = AHEAD * sum(launches.values()), 0
    while done < rounds:
        torch.cuda._sleep(wait)
        marks = [_mark()]
        for key, run in runners.items():
            for _ in range(launches[key]):
                run()
            marks.append(_mark())
        late = marks[0].query()
        marks[-1].synchronize()
        if late and wait < LONGEST:
            wait *= 2
            continue
        done += 1
        for key, begin, end in zip(runners, marks, marks[1:], strict=False):
            found[key].append(begin.elapsed_time(end) * 1e3 / launches[key])
    return {k: statistics.median(times) for k, times in found.items()}


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
