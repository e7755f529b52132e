"""How to serve an encoder on this machine: instances x cores x batch, for the most sentences a second in time.

Every instance is a process with cores of its own; all map the same weights. Source: arXiv 2306.16601, section 4.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..formats.bitmask import pack_bits
from ..formats.bsr_int8 import BsrInt8
from .files import is_encoder, load
from .module import Encoder
from .parts import EncoderError, Linear

WAYS = ("sparse", "dense int8", "torch bf16", "torch fp32")
BATCHES = (1, 2, 4, 8)
HOPELESS = 1.5  # times the limit: larger batches are not tried then
START = 120  # seconds that an instance may take to load


@dataclass(frozen=True)
class Point:
    """One way to serve, and what it gave: latencies in milliseconds, over all instances."""

    way: str
    instances: int
    cores: int  # of each instance
    batch: int
    sentences_per_second: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Report:
    """What `tune` found; `limit` in milliseconds."""

    points: tuple[Point, ...]
    tokens: int
    limit: float | None
    percentile: int

    def within(self, point: Point) -> bool:
        return self.limit is None or (point.p99 if self.percentile == 99 else point.p50) <= self.limit

    def best(self, way: str) -> Point | None:
        """The most sentences a second within the limit; None if nothing is."""
        able = [p for p in self.points if p.way == way and self.within(p)]
        return max(able, key=lambda p: p.sentences_per_second, default=None)

    def ratio(self, way: str) -> float | None:
        """The best of "sparse" over the best of `way`; None where one of them has none."""
        ours, other = self.best("sparse"), self.best(way)
        return ours.sentences_per_second / other.sentences_per_second if ours and other else None


def tune(
    folder: str | Path,
    tokens: int = 128,
    limit: float | None = None,
    *,
    percentile: int = 99,
    batches: Sequence[int] = BATCHES,
    ways: Sequence[str] = WAYS,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Every split of this process's cores into equal instances, every batch size, every way; `seconds` for each.

    "dense int8" is the same encoder with its zeros stored and multiplied, "torch" a transformers model of its shape.
    `percentile` 50 or 99 of the latencies must be at most `limit` ms. EncoderError for what is no encoder's folder,
    ways and percentiles that there are not, and sentences longer than the model takes.
    """
    _check(Path(folder), tokens, percentile, batches, ways)
    cpus = sorted(_cpus())
    points = []
    for way in ways:
        for instances in (n for n in range(1, len(cpus) + 1) if len(cpus) % n == 0):
            cores = len(cpus) // instances
            progress(f"{way}: {instances} x {cores} cores")
            with _instances(str(folder), way, [cpus[i * cores : (i + 1) * cores] for i in range(instances)]) as ask:
                for batch in batches:
                    points.append(_point(way, cores, batch, ask((batch, tokens, seconds))))
                    if limit is not None and points[-1].p50 > HOPELESS * limit:
                        break
    return Report(tuple(points), tokens, limit, percentile)


def _check(folder: Path, tokens: int, percentile: int, batches: Sequence[int], ways: Sequence[str]) -> None:
    if not is_encoder(folder):
        raise EncoderError(
            f"{folder} holds no encoder; fix: gossamer.encoder.convert(model, tokenizer).save('{folder}') first"
        )
    if unknown := [way for way in ways if way not in WAYS]:
        raise EncoderError(f"there is no way '{unknown[0]}'; fix: choose from {', '.join(WAYS)}")
    if percentile not in (50, 99):
        raise EncoderError(f"the percentile is 50 or 99, not {percentile}")
    if not batches or min(batches) < 1:
        raise EncoderError(f"batches are 1 and more, not {list(batches)}")
    longest = load(folder).parts.longest
    if not 1 <= tokens <= longest:
        raise EncoderError(f"sentences have 1 to {longest} tokens in this model, not {tokens}")


def _cpus() -> set[int]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return affinity(0) if affinity else set(range(os.cpu_count() or 1))


def _point(way: str, cores: int, batch: int, latencies: list[list[float]]) -> Point:
    # Each instance for itself, because one may have stopped a call earlier than another.
    rate = sum(batch * len(own) / sum(own) for own in latencies)
    all_of_them = torch.tensor([x for own in latencies for x in own], dtype=torch.float64) * 1e3
    p50, p99 = (float(all_of_them.quantile(q)) for q in (0.5, 0.99))
    return Point(way, len(latencies), cores, batch, rate, p50, p99)


@contextmanager
def _instances(folder: str, way: str, cpus: list[list[int]]) -> Iterator[Callable[[Any], list[Any]]]:
    """What sends a request to all instances at once, and gives their answers."""
    spawned = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for own in cpus:
        here, there = spawned.Pipe()
        process = spawned.Process(target=_serve, args=(there, folder, way, own), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)

    def ask(request: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send(request)
        return [_answer(pipe) for pipe in pipes]

    try:
        for pipe in pipes:
            _answer(pipe)  # ready
        yield ask
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _answer(pipe: Any) -> Any:
    if not pipe.poll(START):
        raise EncoderError(
            f"an instance gave no answer for {START} seconds; fix: look at the machine's load and memory"
        )
    try:
        return pipe.recv()
    except EOFError:
        raise EncoderError("an instance died; fix: see its message above, and give it more memory") from None


def _serve(pipe: Any, folder: str, way: str, cpus: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(cpus))
    torch.set_num_threads(len(cpus))
    run, words = _runner(folder, way)
    pipe.send("ready")
    while True:
        batch, tokens, seconds = pipe.recv()
        ids = torch.randint(words, (batch, tokens), generator=torch.Generator().manual_seed(0))
        pipe.send(_latencies(lambda ids=ids: run(ids), seconds))


def _latencies(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, after two that do not count."""
    found: list[float] = []
    for _ in range(2):
        run()
    stop = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def _runner(folder: str, way: str) -> tuple[Callable[[torch.Tensor], object], int]:
    """(what runs ids, how many words there are)."""
    encoder = load(folder)
    words = encoder.parts.words.shape[0]
    if way == "sparse":
        return encoder, words
    if way == "dense int8":
        return filled(encoder), words
    from transformers import AutoModel

    model = AutoModel.from_config(encoder.config).eval()
    model = model.to(torch.bfloat16) if way == "torch bf16" else model
    return torch.inference_mode()(lambda ids: model(ids)), words


def filled(encoder: Encoder) -> Encoder:
    """The same with all zeros stored, in blocks of 4x4: dense int8."""
    layers = []
    for layer in encoder.parts.int8():
        dense = {name: _filled(linear) for name, linear in layer.linears().items()}
        layers.append(replace(layer, **dense))
    return Encoder(replace(encoder.parts, layers=tuple(layers)), encoder.config, encoder.pooler_parts)


def _filled(linear: Linear) -> Linear:
    a = linear.weight
    (m, k), scale = a.shape, a.scale.clamp_min(torch.finfo(torch.float32).tiny)
    q = (a.decode(torch.float32) / scale.unsqueeze(1)).round_().to(torch.int8)
    tiles = q.view(m // 4, 4, k // 4, 4).transpose(1, 2).reshape(-1, 4, 4).contiguous()
    mask = pack_bits(torch.ones(m // 4, k // 4, dtype=torch.bool))
    return replace(linear, weight=BsrInt8(a.shape, tiles, mask, a.scale, 4, a.dtype))
