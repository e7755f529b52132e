"""method="auto": try the sparse methods on a few blocks, keep the one that loses least for the bytes asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from . import formats, methods
from .calibrate import Calibration, Stream, placed
from .layers import Block, block_modules, weight_of
from .methods import RatioError, dense_bytes
from .stats import Stats

CANDIDATES = ("sparsegpt", "wanda", "magnitude", "svd", "cospadi")
CHEAP: dict[str, dict[str, Any]] = {"cospadi": {"iterations": 4}}  # knobs of a trial, where the default takes long
ROUNDING = (8, 6)  # bits of the round-to-nearest rows shown beside
WINDOWS = 16  # calibration windows of a trial


@dataclass(frozen=True)
class Trial:
    """`error`: share of the layers' output energy that is lost, weighted by their size; inf if out of reach."""

    method: str
    error: float
    stored_bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        return 1 - self.stored_bytes / self.dense_bytes


@dataclass(frozen=True)
class Choice:
    """The method chosen, why, and what every candidate did on the same `blocks`; `rounding` is shown, never chosen."""

    method: str
    reason: str
    trials: tuple[Trial, ...]
    rounding: tuple[Trial, ...]
    blocks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        rows = {k: tuple(Trial(**t) for t in data[k]) for k in ("trials", "rounding")}
        return cls(**{**data, **rows, "blocks": tuple(data["blocks"])})


@dataclass(frozen=True)
class _Group:
    """Layers of a sample block that read the same input."""

    weights: list[Tensor]
    stats: Stats


def choose(
    model: nn.Module,
    blocks: Sequence[Block],
    calibration: Calibration,
    ratio: float,
    folder: Path,
    *,
    device: torch.device | str | None = None,
    candidates: Sequence[str] = CANDIDATES,
    tick: Callable[[int, int], object] | None = None,
) -> Choice:
    """Fits every candidate to the first, the middle and the last block at `ratio` and compares what is lost.

    The model stays dense. `folder` holds hidden states meanwhile. RatioError if no candidate reaches the ratio.
    """
    stream = Stream(model, block_modules(model, blocks), Calibration(calibration.ids[:WINDOWS]), folder, device)
    tallies = {name: _Tally() for name in (*candidates, *map(_rounding_name, ROUNDING))}
    samples = sorted({0, len(blocks) // 2, len(blocks) - 1})
    stream.start()
    for i in range(len(blocks)):
        watch = {g[0]: model.get_submodule(g[0]) for g in blocks[i].groups} if i in samples else {}
        with placed(stream.blocks[i], device):
            stats = stream.run(i, watch, onward=i + 1 < len(blocks))
            for names in blocks[i].groups if i in samples else ():
                group = _Group([weight_of(model.get_submodule(n)) for n in names], stats[names[0]])
                _try_all(group, candidates, ratio, tallies)
        stream.drop(i)
        if tick:
            tick(i + 1, len(blocks))
    return _judge(tallies, candidates, ratio, tuple(blocks[i].name for i in samples))


class _Tally:
    """Adds up one candidate's rows."""

    def __init__(self) -> None:
        self.lost, self.stored, self.dense, self.reached = 0.0, 0, 0, True

    def add(self, group: _Group, approximations: Sequence[Tensor], stored: int) -> None:
        for weight, approximation in zip(group.weights, approximations, strict=True):
            size = dense_bytes((weight.shape[0], weight.shape[1]))
            self.lost += size * group.stats.relative_error(weight, approximation)
            self.dense += size
        self.stored += stored

    def trial(self, name: str) -> Trial:
        error = self.lost / self.dense if self.reached and self.dense else math.inf
        return Trial(name, error if math.isfinite(error) else math.inf, self.stored, max(1, self.dense))


def _try_all(group: _Group, candidates: Sequence[str], ratio: float, tallies: Mapping[str, _Tally]) -> None:
    for name in candidates:
        try:
            fitted = methods.create(name, **CHEAP.get(name, {})).fit(group.weights, group.stats, ratio)
        except (RatioError, torch.linalg.LinAlgError):
            tallies[name].reached = False
            continue
        tallies[name].add(group, [f.decode(torch.float32) for f in fitted], formats.nbytes(fitted))
    for bits in ROUNDING:
        stored = sum(w.numel() * bits // 8 + 2 * w.shape[0] for w in group.weights)
        tallies[_rounding_name(bits)].add(group, [rounded(w, bits) for w in group.weights], stored)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest with `bits` per weight and one bf16 scale per output row; float32."""
    top = 2 ** (bits - 1) - 1
    scale = (weight.float().abs().amax(1, keepdim=True) / top).bfloat16().float().clamp_min(1e-30)
    return (weight.float() / scale).round().clamp(-top, top) * scale


def _rounding_name(bits: int) -> str:
    return f"int{bits}"


def _judge(tallies: Mapping[str, _Tally], candidates: Sequence[str], ratio: float, blocks: tuple[str, ...]) -> Choice:
    trials = sorted((tallies[n].trial(n) for n in candidates), key=lambda t: t.error)
    best, rounding = trials[0], tuple(tallies[_rounding_name(b)].trial(_rounding_name(b)) for b in ROUNDING)
    if best.error == math.inf:
        raise RatioError(f"no method reaches ratio {ratio} on {', '.join(blocks)}; fix: ask for a smaller ratio")
    return Choice(best.method, _reason(trials, rounding[0], ratio), tuple(trials), rounding, blocks)


def _reason(trials: Sequence[Trial], int8: Trial, ratio: float) -> str:
    best = trials[0]
    second = f", the next best, {trials[1].method}, {trials[1].error:.3%}" if len(trials) > 1 else ""
    return (
        f"{best.method} loses least of the layers' output energy at ratio {ratio:g}: {best.error:.3%}{second}; "
        f"plain int8 rounding loses {int8.error:.3%} at ratio {int8.ratio:.2f}."
    )
