"""The short race, on a GPU that is made up here: what it does when the host is slower than the GPU waits."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from gossamer import timing
from gossamer.spmm import duel


class Gpu:
    """Works off what is queued; `host` microseconds go by on the host with each thing that is queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: float) -> None:
        self.host, self.now, self.free, self.waits, self.launched = host, 0.0, 0.0, [], []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.queue(0)

            def query(self) -> bool:
                return self.at <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        monkeypatch.setattr(timing, "waits", lambda call: call.waits)
        monkeypatch.setattr(duel, "_graph", self.graph)

    def queue(self, took: float) -> float:
        self.now += self.host
        self.free = max(self.free, self.now) + took
        return self.free

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.queue(cycles / 2000)

    def graph(self, launches, pool: object):
        """One launch for the host."""

        def replay() -> None:
            self.launched += [run.name for run in launches]
            self.queue(sum(run.took for run in launches))

        return replay

    def runner(self, name: str, took: float, gap: float = 0.0, waits: bool = False):
        """`gap`: what it takes longer when it is launched by itself."""

        def run() -> None:
            self.launched.append(name)
            self.queue(took + gap)

        run.name, run.took, run.waits = name, took, waits
        return run


@pytest.mark.parametrize("host", [1.0, 10.0, 300.0])
def test_the_host_is_not_timed(monkeypatch: pytest.MonkeyPatch, host: float) -> None:
    gpu = Gpu(monkeypatch, host)
    found = duel.duel({"a": [gpu.runner("a", 10.0)], "b": [gpu.runner("b", 8.0)]}, torch.device("cpu"))
    assert found == pytest.approx({"a": 10.0, "b": 8.0})
    assert (len(set(gpu.waits)) > 2) == (host == 300), "it waited longer without need"


def test_a_host_that_is_always_late_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1e5)
    duel.duel({"a": [gpu.runner("a", 10.0)], "b": [gpu.runner("b", 8.0)]}, torch.device("cpu"))
    assert max(gpu.waits) < 2 * duel.LONGEST and len(gpu.waits) < 40


def test_short_products_are_timed_without_the_gaps_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1.0)
    runners = {"one kernel": [gpu.runner("one", 3.8, gap=0.5)], "two kernels": [gpu.runner("two", 3.4, gap=1.0)]}
    found = duel.duel(runners, torch.device("cpu"))
    assert found == pytest.approx({"one kernel": 3.8, "two kernels": 3.4})


def test_what_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1.0)
    monkeypatch.setattr(duel, "_graph", lambda *args: pytest.fail("captured"))
    runners = {"a": [gpu.runner("a", 10.0, waits=True)], "b": [gpu.runner("b", 8.0)]}
    assert duel.duel(runners, torch.device("cpu")) == pytest.approx({"a": 10.0, "b": 8.0})


def test_small_operands_lie_at_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    b = torch.randn(16, 8)
    found = duel.copies(b)
    assert len({x.data_ptr() for x in found}) == duel.COPIES and all(torch.equal(x, b) for x in found)
    assert len(duel.copies(torch.empty(duel.COPIED // 8))) == 2 and len(duel.copies(torch.empty(duel.COPIED))) == 1
    gpu = Gpu(monkeypatch, 1.0)
    lucky = [gpu.runner("lucky", t) for t in (6.0, 12.0, 12.0, 12.0)]
    found = duel.duel({"lucky": lucky, "even": [gpu.runner("even", 9.0)] * 4}, torch.device("cpu"))
    assert found["lucky"] > found["even"] == pytest.approx(9)


def test_nobody_is_always_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1.0)
    duel.duel({k: [gpu.runner(k, 200.0)] for k in "ab"}, torch.device("cpu"))
    assert "".join(gpu.launched) == "abba" + "abbaabbaabbaab"


def test_the_hopeless_are_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1.0)
    runners = {k: [gpu.runner(k, t)] for k, t in (("slow", 5e3), ("good", 50.0), ("near", 60.0))}
    assert duel.duel(runners, torch.device("cpu")) == pytest.approx({"slow": 5e3, "good": 50.0, "near": 60.0})
    assert gpu.launched.count("slow") == 2 and gpu.launched.count("good") == gpu.launched.count("near")
    assert gpu.launched.count("near") == 2 + 2 * (1 + duel.ROUNDS), "a first look, a warm graph, and races"
    gpu.launched.clear()
    assert duel.duel({"slow": runners["slow"], "good": runners["good"]}, torch.device("cpu"))["slow"] == 5e3
    assert gpu.launched.count("good") == 2, "there was nobody left to race with"


@pytest.mark.gpu
def test_on_a_gpu_that_others_use() -> None:
    """What is captured for a race disturbs no other thread's allocations, and takes little memory for good."""
    a, b = torch.randn(64, 64, device="cuda"), torch.randn(64, 8, device="cuda")
    over, failed = threading.Event(), []

    def other() -> None:
        try:
            while not over.is_set():
                torch.empty(3 << 20, device="cuda")
                torch.cuda.empty_cache()
        except RuntimeError as error:
            failed.append(error)

    runners = {"product": [partial(torch.matmul, a, x) for x in duel.copies(b)], "sum": [lambda: a @ b + 1]}
    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(3):
            found = duel.duel(runners, a.device)
            assert min(found.values()) > 0
    finally:
        over.set()
        thread.join()
    assert not failed
    torch.testing.assert_close(runners["product"][-1](), a @ b)
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        duel.duel(runners, a.device)
    assert torch.cuda.memory_reserved() <= before + (64 << 20)
