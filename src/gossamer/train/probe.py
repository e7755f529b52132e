"""suggest_decay(): the warm-up probe that finds the strength of masked decay for one model and its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from .choose import Filter
from .fst import FST
from .method import Dense, Method
from .sparsifier import Sparsifier, sparsify

Train = Callable[[nn.Module, Sparsifier, int], object]


@dataclass(frozen=True)
class Probe:
    """`decay`: the suggestion; `mu` there; `tried`: {decay: mu}, all of it; `dense_flip_rate` is what mu divides by."""

    decay: float
    mu: float
    interval: tuple[float, float]
    tried: dict[float, float]
    dense_flip_rate: float

    @property
    def feasible(self) -> bool:
        return self.interval[0] <= self.mu <= self.interval[1]


def suggest_decay(
    build: Callable[[], nn.Module],
    train: Train,
    *,
    method: Method | None = None,
    steps: int = 200,
    interval: tuple[float, float] = (0.6, 0.95),
    bounds: tuple[float, float] = (1e-7, 1e-1),
    tries: int = 8,
    filter: Filter | None = None,
) -> Probe:
    """Short runs from the same start: dense once, then `method` with decays that close in on the middle of `interval`.

    `build()` returns the model with its first weights, the same each time. `train(model, sparsifier, steps)` takes
    that many optimizer steps of the warm-up with the real data and learning rates, after `sparsifier.attach(optimizer)`
    or with its two steps called. mu, the flip rate against dense over the last quarter of the steps, falls as the decay
    grows; FST (2404.01847) takes a decay whose mu lies in `interval`: above, masks dither; below, they freeze too
    early. The logarithm of the decay is bisected; the nearest is returned where none is feasible (`Probe.feasible`).
    """
    method = FST() if method is None else method
    if "decay" not in getattr(method, "__dataclass_fields__", {}):
        raise ValueError(f"{method.name} has no decay to suggest; fix: method=FST() or SRSTE()")
    if steps < 4 or not 0 < bounds[0] < bounds[1] or not 0 < interval[0] < interval[1]:
        raise ValueError(f"steps={steps}, bounds={bounds}, interval={interval}; fix: 4 steps or more, rising positives")
    dense = _flip_rate(build(), train, Dense(), steps, filter)
    if not dense:
        raise ValueError("no mask flipped in the dense run; fix: more steps, or a learning rate that is not zero")

    def measured(decay: float) -> float:
        return _flip_rate(build(), train, _probed(method, decay), steps, filter) / dense

    tried = _bisect(measured, interval, bounds, tries)
    middle = math.sqrt(interval[0] * interval[1])
    best = min(tried, key=lambda d: abs(math.log(max(tried[d], 1e-9) / middle)))
    return Probe(best, tried[best], interval, tried, dense)


def _probed(method: Method, decay: float) -> Method:
    return replace(method, decay=decay, dense_tail=0.0)  # type: ignore[type-var]


def _bisect(
    mu: Callable[[float], float], interval: tuple[float, float], bounds: tuple[float, float], tries: int
) -> dict[float, float]:
    low, high = map(math.log, bounds)
    tried: dict[float, float] = {}
    for _ in range(tries):
        decay = math.exp((low + high) / 2)
        found = tried[decay] = mu(decay)
        if interval[0] <= found <= interval[1]:
            break
        if found > interval[1]:
            low = math.log(decay)
        else:
            high = math.log(decay)
    return tried


def _flip_rate(model: nn.Module, train: Train, method: Method, steps: int, filter: Filter | None) -> float:
    """The mean over the last quarter of the steps."""
    sparse = sparsify(model, method, filter=filter, every=1)
    rates: list[float] = []
    take = sparse.after_step

    def after_step() -> None:
        take()
        if sparse.step > steps - max(1, steps // 4):
            rates.append(sparse.metrics()["flip_rate"])

    sparse.after_step = after_step  # type: ignore[method-assign]
    train(model, sparse, steps)
    if sparse.step != steps:
        raise ValueError(
            f"train() took {sparse.step} steps, not {steps}; fix: sparsifier.attach(optimizer), then take `steps` steps"
        )
    return sum(rates) / len(rates)
