"""The short race, on a GPU that is made up here: what it does when the host is slower than the GPU waits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

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

    def queue(self, took: float) -> float:
        self.now += self.host
        self.free = max(self.free, self.now) + took
        return self.free

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.queue(cycles / 2000)

    def runner(self, name: str, took: float):
        def run() -> None:
            self.launched.append(name)
            self.queue(took)

        return run


@pytest.mark.parametrize("host", [1.0, 10.0, 300.0])
def test_the_host_is_not_timed(monkeypatch: pytest.MonkeyPatch, host: float) -> None:
    gpu = Gpu(monkeypatch, host)
    found = duel.duel({"a": gpu.runner("a", 10.0), "b": gpu.runner("b", 8.0)}, torch.device("cpu"))
    assert found == pytest.approx({"a": 10.0, "b": 8.0})
    assert (len(set(gpu.waits)) > 2) == (host == 300), "it waited longer without need"


def test_a_host_that_is_always_late_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1e5)
    duel.duel({"a": gpu.runner("a", 10.0), "b": gpu.runner("b", 8.0)}, torch.device("cpu"))
    assert max(gpu.waits) < 2 * duel.LONGEST and len(gpu.waits) < 40


def test_the_hopeless_are_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1.0)
    runners = {k: gpu.runner(k, t) for k, t in (("slow", 5e3), ("good", 50.0), ("near", 60.0))}
    assert duel.duel(runners, torch.device("cpu")) == pytest.approx({"slow": 5e3, "good": 50.0, "near": 60.0})
    assert gpu.launched.count("slow") == 2 and gpu.launched.count("good") == gpu.launched.count("near") == 12
    gpu.launched.clear()
    assert duel.duel({"slow": runners["slow"], "good": runners["good"]}, torch.device("cpu"))["slow"] == 5e3
    assert gpu.launched.count("good") == 2, "there was nobody left to race with"
