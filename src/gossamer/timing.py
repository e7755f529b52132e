"""How long a call takes: medians of interleaved sweeps, so that a busy moment hits every candidate alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def race(runners: Mapping[str, Sequence[Call]], device: torch.device, seconds: float = 0.06) -> dict[str, float]:
    """Median microseconds per call of every runner; each has one call per set of inputs, and a sweep makes them all.

    At least 5 sweeps each, more (up to 50) until all together took `seconds` per runner.
    """
    for calls in runners.values():
        _sweep(calls, device)
    found: dict[str, list[float]] = {name: [] for name in runners}
    spent, sweeps = 0.0, 0
    while sweeps < 5 or (spent < seconds * len(runners) and sweeps < 50):
        for name, calls in runners.items():
            took = _sweep(calls, device)
            found[name].append(took / len(calls) * 1e6)
            spent += took
        sweeps += 1
    return {name: statistics.median(values) for name, values in found.items()}


def _sweep(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds for all calls, one after the other."""
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Behind a wait on the GPU the launches queue up, so that the GPU's time is seen and not the host's.
    torch.cuda._sleep(20_000 * len(calls))
    begin.record(torch.cuda.current_stream(device))
    for call in calls:
        call()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
