"""Which kernel runs a stored matrix for this many tokens: the one place that decides. Nothing is timed here.

A layer that was prepared carries its choices in its layout string: per bucket of tokens a *way*, one step or (for a
product) two, each a kernel, the tensors it packed and its constants. They are constants to torch.compile, too.
A prepared layer may have let go of its stored tensors: then the layout says which step's operands they come back from.
A layer that was not prepared takes what the lock file of this machine says about its shape, else the prediction that a
kernel made for its format is faster than decoding; only kernels whose `pack` is nearly free come into question.
GOSSAMER_KERNEL names a kernel for all matrices of the formats it runs; it is read when a layer first runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from . import formats, lock
from .formats import Format, Spec, dtype_name, dtype_of
from .formats.dense import Dense
from .formats.product import Product
from .kernels import Case, Kernel, KernelError, reference, registry
from .once import say

# Kernels are timed for these numbers of tokens; one in between goes with the next, one beyond with the last.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
ORACLE = "reference"


@dataclass(frozen=True)
class Step:
    """One kernel of a way: its name, the operands that are its tensors, its constants."""

    kernel: str
    at: tuple[int, ...]
    meta: dict[str, Any]

    @cached_property
    def _run(self) -> Callable[..., Tensor]:
        return registry[self.kernel].run

    def run(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return self._run(x, [parts[i] for i in self.at], self.meta, bias)

    def bind(self, parts: Sequence[Tensor], bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], bool]:
        kernel = registry[self.kernel]
        return kernel.bind([parts[i] for i in self.at], self.meta, bias), kernel.transparent

    def unpack(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The matrix, dense, if the kernel's operands hold it exactly."""
        return registry[self.kernel].unpack([parts[i] for i in self.at], self.meta)

    def moved(self, by: int) -> Step:
        """The same among operands that begin `by` later."""
        return Step(self.kernel, tuple(i - by for i in self.at), self.meta)


Way = tuple[Step, ...]
Ways = Sequence[tuple[int, Way]]  # (up to so many tokens, the way), ascending
# (up to so many elements of x, a function of x, is it a `transparent` kernel's), ascending
Bound = list[tuple[float, Callable[[Tensor], Tensor], bool]]


def to_layout(spec: Spec, dtype: torch.dtype | None = None, ways: Ways = (), source: Step | None = None) -> str:
    """What the ops need to know of a layer: its spec, and its choices if there are any.

    `source`: the step whose operands hold the matrix, of a layer without its stored tensors.
    """
    if dtype is None:
        return json.dumps(spec, separators=(",", ":"), sort_keys=True)
    steps = [[upto, [_plain(s) for s in way]] for upto, way in ways]
    found = {"spec": spec, "dtype": dtype_name(dtype), "ways": steps}
    if source is not None:
        found["source"] = _plain(source)
    return json.dumps(found, separators=(",", ":"), sort_keys=True)


def _plain(step: Step) -> list[Any]:
    return [step.kernel, step.at, step.meta]


def _step(plain: Sequence[Any]) -> Step:
    kernel, at, meta = plain
    return Step(kernel, tuple(at), meta)


class Route:
    """A layout string, read."""

    def __init__(self, layout: str) -> None:
        found = json.loads(layout)
        self.spec: Spec = found.get("spec", found)
        self.source = _step(found["source"]) if "source" in found else None
        self.names = () if self.source else tuple(formats.layout(self.spec))
        self.dtype = dtype_of(found["dtype"]) if "ways" in found else None
        self.ways: Ways = [(upto, tuple(_step(s) for s in way)) for upto, way in found.get("ways", ())]
        self.width: int = self.spec["shape"][1]
        self._chosen: dict[tuple[str, torch.device, torch.dtype, int], type[Kernel]] = {}

    def assemble(self, parts: Sequence[Tensor]) -> Format:
        """The stored matrix, or as a dense one what holds it; what was packed beside it is left out."""
        if self.source:
            dense = self.source.unpack(parts)
            assert dense is not None
            return Dense((dense.shape[0], dense.shape[1]), dense)
        return formats.from_spec(self.spec, dict(zip(self.names, parts, strict=False)))

    def linear(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """x A^T + bias in the dtype of x. ValueError if x has no features or another number of them."""
        shape = x.shape
        if not shape or shape[-1] != self.width:
            found = f"{shape[-1]} features in its last dimension" if shape else "no dimensions"
            raise ValueError(f"gossamer::linear: x has {found}; fix: pass the {self.width} that the weight takes")
        tokens = x.numel() // self.width if self.width else math.prod(shape[:-1])
        if x.dtype == self.dtype:
            way = self.way(tokens)
            if len(way) == 1:
                return way[0].run(x, parts, bias)
            right, left = way
            wide = right.run(x.to(reference.wide(x)), parts, None)
            return left.run(wide, parts, bias).to(x.dtype)
        a = self.assemble(parts)
        # Where the oracle would not round between two factors, neither do we.
        wide = x.to(reference.wide(x)) if isinstance(a, Product) or x.dtype == torch.float16 else x
        for name, factor, last in _factors(a):
            wide = self._run(name, wide, factor, tokens, bias if last else None)
        return wide.to(x.dtype)

    def bind(self, parts: Sequence[Tensor], bias: Tensor | None) -> Bound:
        """What `linear` does with x of the dtype prepared for, up to the first way of two steps."""
        one = list(takewhile(lambda way: len(way[1]) == 1, self.ways))
        bound: Bound = [(upto * self.width, *way[0].bind(parts, bias)) for upto, way in one]
        if bound and len(one) == len(self.ways):
            bound[-1] = math.inf, *bound[-1][1:]
        return bound

    def runs_on(self, device: torch.device) -> bool:
        """Are all kernels of the choices for this kind of device, and what they packed for it, too?"""
        found = [(registry[s.kernel], s.meta) for _, way in self.ways for s in way]
        return all(k.device in ("any", device.type) and k.fits(meta, device) for k, meta in found)

    def way(self, tokens: int) -> Way:
        for upto, way in self.ways:
            if tokens <= upto:
                return way
        return self.ways[-1][1]

    def _run(self, name: str, x: Tensor, a: Format, tokens: int, bias: Tensor | None) -> Tensor:
        place = (name, x.device, x.dtype, bucket(tokens))
        kernel = self._chosen.get(place) or self._chosen.setdefault(
            place, choose(Case(a.spec(), x.device, x.dtype, tokens))
        )
        try:
            packed = kernel.pack(a, x.dtype)
            return kernel.run(x, packed.tensors, packed.meta, bias)
        except KernelError as error:
            if _forced(a.name):
                raise
            say(f"{kernel.name} failed ({error}); {ORACLE} runs instead")
            self._chosen[place] = registry[ORACLE]
            return reference.linear(x, a, bias)


@cache
def route(layout: str) -> Route:
    return Route(layout)


def _factors(a: Format) -> Iterator[tuple[str, Format, bool]]:
    """(name, factor, is it the last) in the order in which x meets them."""
    if isinstance(a, Product):
        yield "right", a.right, False
        yield "left", a.left, True
    else:
        yield "", a, True


def bucket(tokens: int) -> int:
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def eligible(case: Case) -> list[type[Kernel]]:
    """Every kernel that takes the format as it is stored and can run the case, the oracle last."""
    found = [registry[name] for name in registry if name != ORACLE]
    fit = [k for k in found if case.spec["format"] in k.formats and k.device in ("any", case.device.type)]
    return [k for k in fit if k.refuses(case) is None] + [registry[ORACLE]]


def choose(case: Case) -> type[Kernel]:
    """The kernel of a layer that was not prepared."""
    if name := _forced(case.spec["format"]):
        return required(name, case)
    known = {k.name: k for k in eligible(case) if k.immediate(case)}
    times = _lock(case.device).times.get(lock.key(case.spec, case.device, case.dtype), {})
    measured = {n: t for n, t in times.get(bucket(case.tokens), {}).items() if n in known}
    # Without a measurement the first in the list: a kernel made for the format, else the oracle.
    return known[min(measured, key=measured.__getitem__) if measured else next(iter(known))]


def required(name: str, case: Case) -> type[Kernel]:
    """The kernel of this name; KernelError if it cannot run the case, KeyError if there is none."""
    kernel = registry[name]
    reason = f"x on {kernel.device}" if kernel.device not in ("any", case.device.type) else kernel.refuses(case)
    if reason:
        fix = "name another, or for prepare other numbers of tokens"
        raise KernelError(f"kernel '{name}' was asked for by name but it needs {reason}; fix: {fix}")
    return kernel


def _forced(format_name: str) -> str | None:
    """What GOSSAMER_KERNEL asks for, where that kernel runs this format; KeyError if it names nothing."""
    name = os.environ.get("GOSSAMER_KERNEL")
    return name if name and (name == ORACLE or format_name in registry[name].formats) else None


@cache
def _lock(device: torch.device) -> lock.Lock:
    return lock.load(device, os.environ.get("GOSSAMER_LOCK"))


def forget() -> None:
    """Read the lock file and GOSSAMER_KERNEL again; prepared layers keep their choices."""
    route.cache_clear()
    _lock.cache_clear()
