"""Timing the ways to run layers of one shape: every eligible kernel, and a dense copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from . import dispatch, formats, native, timing
from . import lock as locks
from .explain import dense_spec, factor_specs, inner_dtype
from .formats import Format, Spec
from .formats.dense import Dense
from .formats.product import Product
from .kernels import Case, Kernel, Packed, registry
from .lock import Lock
from .nn import SparseLinear
from .once import say
from .packs import Packs, dense_copy, reversible

SAMPLE_LAYERS, SAMPLE_BYTES = 30, 256 << 20  # at most so many layers of one shape are timed, in dense float32 bytes
SWEEP_BYTES = {"cpu": 64 << 20, "cuda": 200 << 20}  # more than a cache of one core or one GPU holds
WORTH = 1.02  # a copy must gain this much somewhere
EDGE = 0.95  # timings are noisy: a sparse kernel must be this much ahead of a dense copy that is there
PANELS = 0.9  # the same on the CPU where panels are made dense: they gain little or much, and little is mostly noise
SMALL = 16  # bytes a row of every factor: offsets and scales do not count as a copy


@dataclass(frozen=True)
class Option:
    """One way to run a group of layers: kernels for the factors (`whole`: for a dense copy), and its price."""

    kernels: tuple[str, ...]
    whole: bool
    nbytes: int
    times: dict[int, float]  # tokens -> microseconds
    replaces: bool = False  # the stored tensors come back from what it packs
    many: float = EDGE  # in place of EDGE for more than MAX_TOKENS tokens

    def cost(self, tokens: int) -> float:
        """What it is chosen by: its time, for a dense copy a little less, without a time infinite."""
        edge = self.many if tokens > native.MAX_TOKENS else EDGE
        return self.times.get(tokens, math.inf) * (edge if self.whole else 1.0)


@dataclass
class Group:
    """Layers that nothing but their names and numbers tells apart."""

    layers: list[SparseLinear]
    options: list[Option]
    granted: list[Option] = field(default_factory=list)
    refused: list[Option] = field(default_factory=list)

    def best(self, tokens: int) -> Option:
        return min(self.granted, key=lambda o: o.cost(tokens))

    def gain(self, option: Option) -> float:
        """Nepers of time saved over all sizes by having the option, too; 0 if it is not worth having anywhere."""
        ratios = [self.best(n).cost(n) / option.cost(n) for n in option.times]
        return sum(math.log(r) for r in ratios if r > 1) if max(ratios) > WORTH else 0.0


@dataclass(frozen=True)
class Entry:
    """Matrices of one kind that enter a race as they are stored or, `whole`, as dense copies; x is of `dtype`.

    `stored`: addresses of the tensors that are there anyhow. `replace`: what was packed may take their place. `keep`
    gets what was packed of the first.
    """

    found: Sequence[Format]
    dtype: torch.dtype
    stored: set[int]
    whole: bool = False
    replace: bool = False
    keep: dict[str, Packed] | None = None

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.found[0].tensors().values())).device

    @cached_property
    def spec(self) -> Spec:
        return dense_spec(self.found[0].spec(), self.dtype) if self.whole else self.found[0].spec()

    @property
    def place(self) -> str:
        """In the book."""
        return locks.key(self.spec, self.device, self.dtype)

    def case(self, tokens: int) -> Case:
        return Case(self.spec, self.device, self.dtype, tokens)

    def packs(self, sample: Sequence[Format], able: dict[int, list[type[Kernel]]]) -> list[Packs]:
        """What the kernels pack, made now and not while the clock runs; those without memory leave `able`."""
        found = [Packs(dense_copy(f, self.dtype) if self.whole else f, self.dtype) for f in sample]
        kernels = {k.name: k for each in able.values() for k in each}
        made: dict[str, list[Packed]] = {}
        for name, kernel in kernels.items():
            try:
                made[name] = [p.of(kernel) for p in found]
            except torch.OutOfMemoryError:
                if not made and name == [*kernels][-1]:  # nothing is left to run them with
                    raise
                fix = "make room and run gossamer.prepare again"
                say(f"no memory to try out {name}; layers run without it; fix: {fix}")
        able.update({n: [k for k in each if k.name in made] for n, each in able.items()})
        if self.keep is not None:
            self.keep.update({name: each[0] for name, each in made.items()})
        return found


@dataclass(frozen=True)
class Race:
    """Times the ways to run layers of one shape, but for those that the book knows."""

    sizes: Sequence[int]
    dtype: torch.dtype
    book: Lock
    kernel: str | None
    again: bool
    footprint: int  # bytes of the whole model's sparse layers

    def upto(self, tokens: int) -> Race:
        """The same for at most so many tokens."""
        return replace(self, sizes=[n for n in self.sizes if n <= tokens])

    def group(self, layers: list[SparseLinear]) -> Group:
        found = [layer.format for layer in layers[: _sampled(layers[0])]]
        spec = layers[0].spec
        stored = {t.data_ptr() for f in found for t in f.tensors().values()}
        inner = inner_dtype(spec, self.dtype, layers[0].device)
        forced = self.kernel and any(f["format"] in registry[self.kernel].formats for f in factor_specs(spec))
        whole = [] if forced or spec["format"] == Dense.name else [Entry(found, self.dtype, set(), whole=True)]
        if isinstance(found[0], Product):
            factors = [Entry([getattr(f, n) for f in found], inner, stored) for n in ("right", "left")]
            rights, lefts = (self.options(factor)[0] for factor in factors)
            options = [_chained(right, left, self.sizes) for right in rights for left in lefts]
            copies = self.options(*whole)
        else:
            options, *copies = self.options(Entry(found, inner, stored, replace=True), *whole)
        if forced:
            options = [o for o in options if self.kernel in o.kernels]
        options += [o for each in copies for o in each]
        room = SMALL * sum(f["shape"][0] + 1 for f in factor_specs(spec))
        free = [o for o in options if o.replaces or o.nbytes <= room]
        return Group(layers, options, free or options[:1])

    def options(self, *entries: Entry) -> list[list[Option]]:
        """Per entry one option for each kernel. What is missing of one is timed with all, in turns."""
        able = [{n: self._able(e.case(n), e) for n in self.sizes} for e in entries]
        missing = [n for n in self.sizes if any(self._missing(e, n, a[n]) for e, a in zip(entries, able, strict=True))]
        packs = []
        for e, kernels in zip(entries, able, strict=True):
            sample = _cold(e.found, self.footprint) if missing else e.found[:1]
            packs.append(e.packs(sample, kernels))
        for n in missing:
            self._time(n, [(e, a[n], p) for e, a, p in zip(entries, able, packs, strict=True)])
        return [self._timed(e, a, p[0]) for e, a, p in zip(entries, able, packs, strict=True)]

    def _time(self, tokens: int, entered: Sequence[tuple[Entry, Sequence[type[Kernel]], Sequence[Packs]]]) -> None:
        runners: dict[str, list[Callable[[], Tensor]]] = {}
        names: list[dict[str, str]] = []  # per entry, kernel -> runner: one kernel may run both, stored and dense
        for entry, kernels, packs in entered:
            x = torch.randn(tokens, entry.spec["shape"][1], device=entry.device).to(entry.dtype)
            names.append({k.name: k.name + " again" * (k.name in runners) for k in kernels})
            runners |= {names[-1][k.name]: [_call(k, x, p.of(k)) for p in packs] for k in kernels}
        times = timing.race(runners, entered[0][0].device)
        for (entry, _, _), mine in zip(entered, names, strict=True):
            self.book.merge(entry.place, tokens, {name: times[runner] for name, runner in mine.items()})

    def _missing(self, entry: Entry, tokens: int, kernels: Sequence[type[Kernel]]) -> bool:
        known = self.book.times.get(entry.place, {}).get(tokens, {}).keys()
        return self.again or bool({k.name for k in kernels} - known)

    def _timed(self, entry: Entry, able: Mapping[int, Sequence[type[Kernel]]], packs: Packs) -> list[Option]:
        times = self.book.times[entry.place]
        many = PANELS if entry.device.type == "cpu" else EDGE
        return [
            Option(
                (name,),
                entry.whole,
                _added(packs.of(k), entry.stored),
                {n: times[n][name] for n in able if k in able[n]},
                entry.replace and packs.source(k) is not None,
                many,
            )
            for name, k in {k.name: k for kernels in able.values() for k in kernels}.items()
        ]

    def _able(self, case: Case, entry: Entry) -> list[type[Kernel]]:
        if self.kernel and case.spec["format"] in registry[self.kernel].formats:
            return [dispatch.required(self.kernel, case)]
        able = dispatch.eligible(case)
        # A dense copy that is decoded again for each product is nobody's choice, and the oracle needs stored tensors.
        needless = entry.whole or (entry.replace and any(reversible(k) for k in able))
        return [k for k in able if not (needless and k.name == dispatch.ORACLE)]


def _cold(found: Sequence[Format], footprint: int) -> list[Format]:
    """Copies added, so that a sweep over a shape with few layers runs from as far away as in the whole model."""
    size = sum(f.nbytes for f in found)
    device = next(iter(found[0].tensors().values())).device
    more = max(0, math.ceil(min(footprint, SWEEP_BYTES[device.type]) / max(1, size)) - 1)
    cloned = [formats.from_spec(f.spec(), {n: t.clone() for n, t in f.tensors().items()}) for f in [*found] * more]
    return [*found, *cloned]


def _sampled(layer: SparseLinear) -> int:
    return max(1, min(SAMPLE_LAYERS, SAMPLE_BYTES // max(1, 4 * layer.out_features * layer.in_features)))


def _chained(right: Option, left: Option, sizes: Sequence[int]) -> Option:
    both = {n: right.times[n] + left.times[n] for n in sizes if n in right.times and n in left.times}
    return Option((*right.kernels, *left.kernels), False, right.nbytes + left.nbytes, both)


def _call(kernel: type[Kernel], x: Tensor, packed: Packed) -> Callable[[], Tensor]:
    """On the CPU as layers call it; on a GPU the way there does not count, as what is timed is captured in a graph."""
    if x.device.type == "cpu":
        return partial(kernel.bind(packed.tensors, packed.meta, None), x)
    return partial(kernel.run, x, packed.tensors, packed.meta, None)


def _added(packed: Packed, stored: set[int]) -> int:
    return sum(t.numel() * t.element_size() for t in packed.tensors if t.data_ptr() not in stored)
