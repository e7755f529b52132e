"""How bench_nm24_gemm.py times calls on one GPU: in a graph, without one, in turns, and the host alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COLD_BYTES = 150 << 20
ROUNDS = 40  # of 50 calls, of which the host's time is taken
CALLS, TURNS = 20, 9  # of layers that take turns: at least so many calls a round, so many rounds
Call = Callable[[], object]


def graphed(calls: Sequence[Call], repeats: int = 5) -> tuple[float, float]:
    """Median microseconds a call, and interquartile range / median; all calls in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return timed(graph.replay, len(calls), repeats)


def eager(calls: Sequence[Call], repeats: int = 5) -> tuple[float, float]:
    """The same without a graph, waiting before every round: what the host costs shows where it is the longer."""
    for call in calls:
        call()

    def run() -> None:
        for call in calls:
            call()

    return timed(run, len(calls), repeats)


def timed(run: Call, count: int, repeats: int) -> tuple[float, float]:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def copies(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    size = sum(t.numel() * t.element_size() for t in tensors)
    return [tuple(t.clone() for t in tensors) for _ in range(max(2, -(-COLD_BYTES // size)))]


def in_a_row(calls: Sequence[Call]) -> tuple[Call, int]:
    """What makes at least CALLS calls, and how many it makes."""
    rounds = -(-CALLS // len(calls))

    def run() -> None:
        for call in [*calls] * rounds:
            call()

    run()
    return run, rounds * len(calls)


def captured(calls: Sequence[Call]) -> tuple[Call, int]:
    run, count = in_a_row(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, count


def in_turns(ours: tuple[Call, int], dense: tuple[Call, int], turns: int = TURNS) -> list[tuple[float, float]]:
    """Of both, median microseconds a call, and interquartile range / median."""
    times: list[list[float]] = [[], []]
    for _ in range(turns):
        for found, (run, count) in zip(times, (ours, dense), strict=True):
            found.append(timed(run, count, 2)[0])
    return [(q[1], (q[2] - q[0]) / q[1]) for q in (statistics.quantiles(t, n=4) for t in times)]


def host_us(call: Call) -> tuple[float, float]:
    """Median microseconds of the host's until a call returns, and interquartile range / median; few enough wait."""
    rounds = []
    for turn in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(50):
            call()
        if turn:
            rounds.append((time.perf_counter() - begin) / 50 * 1e6)
    low, median, high = statistics.quantiles(rounds, n=4)
    return median, (high - low) / median
