"""How long a call takes: medians of interleaved sweeps, so that a busy moment hits every candidate alike."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
LAUNCHES = 20  # at least, of one graph: replaying it then costs little beside its work


def race(runners: Mapping[str, Sequence[Call]], device: torch.device, seconds: float = 0.06) -> dict[str, float]:
    """Median microseconds per call of every runner; each has one call per set of inputs, and a sweep makes them all.

    At least 5 sweeps each, more (up to 50) until all together took `seconds` per runner. On a GPU a sweep is a CUDA
    graph, so that the GPU's time is seen and not the host's.
    """
    sweeps = {name: _sweep_of(calls, device) for name, calls in runners.items()}
    found: dict[str, list[float]] = {name: [] for name in runners}
    spent, count = 0.0, 0
    while count < 5 or (spent < seconds * len(runners) and count < 50):
        for name, sweep in sweeps.items():
            took, calls = sweep()
            found[name].append(took / calls * 1e6)
            spent += took
        count += 1
    return {name: statistics.median(values) for name, values in found.items()}


def _sweep_of(calls: Sequence[Call], device: torch.device) -> Callable[[], tuple[float, int]]:
    """What makes all calls, one after the other, and gives (seconds, calls); warmed up."""
    if device.type != "cuda":
        _sweep(calls)
        return lambda: (_sweep(calls), len(calls))
    _each(calls)
    if waits(calls[0]):
        return lambda: (_timed(lambda: _each(calls), device, len(calls)), len(calls))
    rounds = -(-LAUNCHES // len(calls))
    replay = _captured([*calls] * rounds, device)
    replay()
    return lambda: (_timed(replay, device, 1), rounds * len(calls))


def _sweep(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    _each(calls)
    return time.perf_counter() - start


def _each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def waits(call: Call) -> bool:
    """Does it wait for the GPU? Then it cannot be captured, and trying would spoil torch's random numbers for good."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _captured(calls: Sequence[Call], device: torch.device) -> Call:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _each(calls)
    return graph.replay


def _timed(work: Call, device: torch.device, launches: int) -> float:
    """Seconds on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    # Behind a wait on the GPU the launches queue up.
    torch.cuda._sleep(20_000 * launches)
    begin.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
