"""A race of a few milliseconds between products on a GPU: what a first product may cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import timing

Call = Callable[[], object]
ROUNDS = 7
SLICE = 100.0  # microseconds of work between two events, about
MOST = 20  # products of one way between two events, at most
HOPELESS = 1.5  # times the best of a first look, from which on nobody looks again
AHEAD, LONGEST = 100_000, 40_000_000  # cycles that the GPU waits at first, per launch, and at most, for all of them
COPIES, COPIED = 8, 1 << 20  # of an operand at most, and their bytes


class Turn(NamedTuple):
    """What a way does between two events, and how many products that is."""

    launches: Sequence[Call]
    products: int


def copies(b: Tensor) -> list[Tensor]:
    """`b` at several addresses, if it is small: where it lies decides between short products that are nearly alike."""
    return [b, *(b.clone() for _ in range(min(COPIES, COPIED // max(1, b.nbytes)) - 1))]


def duel(runners: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, float]:
    """Median microseconds on the GPU of each runner, all of them warm; of the hopeless those of the first look.

    A runner has a call per copy of its operand.
    """
    with torch.cuda.device(device):
        found = _rounds({k: Turn(calls[:1], 1) for k, calls in runners.items()}, 2)
        limit = HOPELESS * min(found.values())
        near = {k: calls for k, calls in runners.items() if found[k] <= limit}
        if len(near) == 1:
            return found
        return found | _rounds(_turns(near, found), ROUNDS)


def _turns(runners: Mapping[str, Sequence[Call]], first: Mapping[str, float]) -> dict[str, Turn]:
    """Short products as CUDA graphs: launched one by one, the host's pace and the gaps between them would be timed."""
    turns = {}
    for key, calls in runners.items():
        products = max(1, min(MOST, round(SLICE / max(first[key], 1))))
        turns[key] = Turn([calls[i % len(calls)] for i in range(products)], products)
    if all(t.products == 1 for t in turns.values()) or any(timing.waits(t.launches[0]) for t in turns.values()):
        return turns
    pool = torch.cuda.graph_pool_handle()
    graphs = {k: Turn([_graph(t.launches, pool)], t.products) for k, t in turns.items()}
    for graph in graphs.values():
        graph.launches[0]()
    return graphs


def _graph(launches: Sequence[Call], pool: Any) -> Call:
    """Unlike with torch.cuda.graph, other threads may use the GPU meanwhile, and torch's cache of memory stays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side(torch.cuda.current_device())):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            for launch in launches:
                launch()
        finally:
            graph.capture_end()
    return graph.replay


@cache
def _side(index: int) -> torch.cuda.Stream:
    """One for all, since torch keeps memory for products per stream."""
    return torch.cuda.Stream(index)


def _rounds(turns: Mapping[str, Turn], rounds: int) -> dict[str, float]:
    """Median microseconds of a product; in a round each way has its turn, in the next one in the opposite order.

    The GPU waits until all of a round is queued, or else the host would be timed: a round that it began before that
    does not count, and it waits longer.
    """
    found: dict[str, list[float]] = {k: [] for k in turns}
    wait, done = AHEAD * sum(len(t.launches) for t in turns.values()), 0
    order = list(turns)
    while done < rounds:
        torch.cuda._sleep(wait)
        marks = [_mark()]
        for key in order:
            for launch in turns[key].launches:
                launch()
            marks.append(_mark())
        late = marks[0].query()
        marks[-1].synchronize()
        if late and wait < LONGEST:
            wait *= 2
            continue
        done += 1
        for key, begin, end in zip(order, marks, marks[1:], strict=False):
            found[key].append(begin.elapsed_time(end) * 1e3 / turns[key].products)
        order.reverse()
    return {k: statistics.median(times) for k, times in found.items()}


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
