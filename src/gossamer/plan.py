"""The plan: which layer gets which method, at which ratio, and what it will cost. Plain data, made before any work."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from . import layers as finder
from . import methods
from .methods import Method, RatioError, Shape, dense_bytes
from .work import write_json

VERSION = 1
PROCESS = 256 << 20  # bytes that Python, torch and transformers take before any model is there
DENSE, AUTO = "dense", "auto"
SIZED_AS = "sparsegpt"  # what "auto" is sized as: every sparse method fills the same budget


class PlanError(ValueError):
    """A plan that cannot be made, read, or applied to a model."""


@dataclass(frozen=True)
class Rule:
    """What the layers whose full name matches `pattern` (fnmatch) get instead; of several rules the last one wins.

    `method` "dense" leaves a layer alone. `knobs` replace the method's when the rule names one, else they add to them.
    """

    pattern: str
    method: str | None = None
    ratio: float | None = None
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer. `group` is the first of the layers that read the same input; bytes are of the weight alone."""

    name: str
    shape: Shape
    group: str
    method: str
    ratio: float
    knobs: dict[str, Any]
    dense_bytes: int
    stored_bytes: int

    @property
    def block(self) -> str:
        """The layer's name up to the number of its block."""
        found = re.match(r".*?\.\d+(?=\.)", self.name)
        return found.group() if found else ""


@dataclass(frozen=True)
class Plan:
    """Every linear layer of every block, in the order in which they run; `meta` says what the plan was made for."""

    layers: tuple[LayerPlan, ...]
    meta: dict[str, Any]

    @property
    def dense_bytes(self) -> int:
        return sum(l.dense_bytes for l in self.layers)

    @property
    def stored_bytes(self) -> int:
        return sum(l.stored_bytes for l in self.layers)

    @property
    def ratio(self) -> float:
        """1 - stored / dense bf16 bytes, over all layers of the plan, dense ones included."""
        return 1 - self.stored_bytes / self.dense_bytes

    @property
    def automatic(self) -> bool:
        """Whether a method is still to be chosen for some layer."""
        return any(l.method == AUTO for l in self.layers)

    def jobs(self) -> list[list[LayerPlan]]:
        """The layers to fit together: same input, same method, same ratio, same knobs. Dense layers are in none."""
        return _jobs([l for l in self.layers if l.method != DENSE])

    def resolve(self, method: str) -> Plan:
        """This plan with `method`, as it is by default, wherever it says "auto"."""
        chosen = [replace(l, method=method, knobs={}) if l.method == AUTO else l for l in self.layers]
        return replace(self, layers=_sized(chosen))

    def rows(self) -> list[dict[str, Any]]:
        """One row for all layers that differ in their block number alone: layer, count, shape, method, ratio, bytes."""
        rows: dict[str, dict[str, Any]] = {}
        for l in self.layers:
            pattern = re.sub(r"\.\d+\.", ".*.", l.name, count=1)
            key = json.dumps([pattern, l.shape, l.method, l.ratio, l.knobs], sort_keys=True)
            fresh = {"layer": pattern, "count": 0, "shape": l.shape, "method": l.method, "ratio": l.ratio}
            row = rows.setdefault(key, fresh | {"dense_bytes": 0, "stored_bytes": 0})
            row["count"] += 1
            row["dense_bytes"] += l.dense_bytes
            row["stored_bytes"] += l.stored_bytes
        return list(rows.values())

    def peak_memory(self, tokens: int = 2048) -> int:
        """Bytes, estimated: Python and torch, the model and its results (a checkpoint that is mapped into memory gives
        nothing back), one block's Grams, and a batch of `tokens` through the block or the solver's copies.
        """
        item = self.meta["itemsize"]
        block = max((list(b) for _, b in groupby(self.layers, lambda l: l.block)), key=_gram_bytes, default=[])
        activations = tokens * sum(sum(l.shape) * item + l.shape[1] * 4 for l in block)
        # A solver holds the Gram, its root and inverse, in float64, and a few float32 copies of the group's weights.
        solver = max((24 * j[0].shape[1] ** 2 + 16 * sum(_size(l) for l in j) for j in _jobs(block)), default=0)
        return PROCESS + self.meta["model_bytes"] + self.stored_bytes + _gram_bytes(block) + max(activations, solver)

    def seconds(self, tokens: int = 256 * 1024, rate: float | None = None) -> float:
        """A rough estimate of the time `compress` takes with `tokens` of calibration.

        `rate` is in operations per second; by default this machine's, taken from one float32 GEMM.
        """
        fits = sum(job_flops(j) for j in self.jobs())
        calibration = calibration_flops(self, tokens) if any(create(j[0]).needs_stats for j in self.jobs()) else 0
        return (fits + calibration) / (rate or gemm_rate())

    def to_json(self) -> dict[str, Any]:
        return {"gossamer_plan": VERSION, "meta": self.meta, "layers": [asdict(l) for l in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; PlanError for what is no plan, or a newer one."""
        if not isinstance(data, Mapping):
            raise PlanError("this JSON is no Gossamer plan; fix: make one with `gossamer plan`")
        version = data.get("gossamer_plan")
        if not isinstance(version, int):
            raise PlanError("this JSON is no Gossamer plan; fix: make one with `gossamer plan`")
        if version > VERSION:
            raise PlanError(
                f"plan version {version} is newer than this Gossamer reads ({VERSION}); fix: upgrade gossamer"
            )
        try:
            read = [LayerPlan(**(l | {"shape": (int(l["shape"][0]), int(l["shape"][1]))})) for l in data["layers"]]
            meta = dict(data["meta"])
        except (KeyError, TypeError, IndexError) as e:
            raise PlanError(f"damaged plan ({e}); fix: make it again with `gossamer plan`") from e
        for l in read:  # a plan is there to be edited
            _check_rule(Rule(l.name, l.method, None if l.method == DENSE else l.ratio, l.knobs))
        return cls(_sized(read), meta)

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as e:
            raise PlanError(f"{path} is not JSON ({e}); fix: make it again with `gossamer plan`") from e

    def check(self, model: nn.Module) -> None:
        """PlanError naming the first layer that `model` lacks or has in another shape."""
        for l in self.layers:
            try:
                module = model.get_submodule(l.name)
            except AttributeError:
                raise PlanError(f"{l.name} is in the plan, not in the model; fix: plan for this model") from None
            if not finder.is_linear(module) or finder.shape_of(module) != l.shape:
                raise PlanError(
                    f"{l.name} is not a dense linear layer of shape {l.shape} in this model; fix: plan for it"
                )


def plan(
    model_or_dir: nn.Module | str | Path,
    method: str = AUTO,
    ratio: float = 0.3,
    rules: Sequence[Rule] = (),
    **knobs: Any,
) -> Plan:
    """What to do with every linear layer of a model, or of a checkpoint folder of which only headers are read.

    `ratio` is the compression ratio of every layer, 1 - stored bytes / dense bf16 bytes, in (0, 1). `method` "auto" is
    chosen at compression time, when there are statistics to choose by. `rules` override both per layer; `knobs` are the
    method's. Raises RatioError, KeyError (unknown method), TypeError (unknown knob), PlanError, LayerError.
    """
    if method == AUTO and knobs:
        raise PlanError(f"knobs ({', '.join(knobs)}) belong to a method; fix: name the method")
    model: nn.Module = model_or_dir if isinstance(model_or_dir, nn.Module) else finder.skeleton(model_or_dir)
    base = Rule("*", method, ratio, knobs)
    for rule in (base, *rules):
        _check_rule(rule)
    found = [
        _layer(name, finder.shape_of(model.get_submodule(name)), group[0], base, rules)
        for block in finder.find(model)
        for group in block.groups
        for name in group
    ]
    _check_matches(rules, found)
    return Plan(_sized(found), _meta(model, type(model).__name__ if model is model_or_dir else str(model_or_dir)))


def create(layer: LayerPlan) -> Method:
    """The method of a layer, with its knobs."""
    return methods.create(SIZED_AS if layer.method == AUTO else layer.method, **layer.knobs)


def job_flops(job: Sequence[LayerPlan]) -> float:
    """Operations that fitting these layers takes, roughly."""
    return create(job[0]).flops([l.shape for l in job], job[0].ratio)


def calibration_flops(plan: Plan, tokens: int) -> float:
    """A forward pass through the blocks, and one Gram per distinct input."""
    inputs = {l.group: l.shape[1] for l in plan.layers}
    return 2.0 * tokens * (sum(_size(l) for l in plan.layers) + sum(k * k for k in inputs.values()))


def gemm_rate(size: int = 768) -> float:
    """Operations per second of one float32 GEMM on this CPU."""
    a = torch.ones(size, size)
    torch.mm(a, a)
    start = time.perf_counter()
    for _ in range(3):
        torch.mm(a, a)
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def _check_rule(rule: Rule) -> None:
    if rule.ratio is not None and not 0 < rule.ratio < 1:
        raise RatioError(f"ratio {rule.ratio} for '{rule.pattern}' is not between 0 and 1; 0.3 stores 30 % fewer bytes")
    if rule.method not in (None, DENSE, AUTO):
        methods.create(rule.method, **rule.knobs)


def _check_matches(rules: Sequence[Rule], found: Sequence[LayerPlan]) -> None:
    for rule in rules:
        if not any(fnmatchcase(l.name, rule.pattern) for l in found):
            raise PlanError(f"rule '{rule.pattern}' matches no layer; there are, for one: {found[0].name}")


def _layer(name: str, shape: Shape, group: str, base: Rule, rules: Sequence[Rule]) -> LayerPlan:
    method, ratio, knobs = base.method, base.ratio, base.knobs
    for rule in rules:
        if fnmatchcase(name, rule.pattern):
            knobs = dict(rule.knobs) if rule.method else knobs | rule.knobs
            method, ratio = rule.method or method, rule.ratio or ratio
    assert method is not None and ratio is not None
    return LayerPlan(name, shape, group, method, 0.0 if method == DENSE else ratio, knobs, dense_bytes(shape), 0)


def _jobs(found: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    jobs: dict[str, list[LayerPlan]] = {}
    for l in found:
        key = json.dumps([l.group, l.method, l.ratio, l.knobs], sort_keys=True)
        jobs.setdefault(key, []).append(l)
    return list(jobs.values())


def _sized(found: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """The same layers with their stored bytes filled in; RatioError with the layer's name in front."""
    stored = {l.name: l.dense_bytes for l in found if l.method == DENSE}
    for job in _jobs([l for l in found if l.method != DENSE]):
        try:
            sizes = create(job[0]).size([l.shape for l in job], job[0].ratio)
        except RatioError as e:
            raise RatioError(f"{job[0].name}: {e}") from e
        stored |= {l.name: size for l, size in zip(job, sizes, strict=True)}
    return tuple(replace(l, stored_bytes=stored[l.name]) for l in found)


def _meta(model: nn.Module, source: str) -> dict[str, Any]:
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    return {"model": source, "model_bytes": size, "itemsize": max(p.element_size() for p in parameters)}


def _gram_bytes(block: Sequence[LayerPlan]) -> int:
    inputs = {l.group: l.shape[1] for l in block if l.method != DENSE and create(l).needs_stats}
    return 8 * sum(k * k for k in inputs.values())


def _size(layer: LayerPlan) -> int:
    return layer.shape[0] * layer.shape[1]
