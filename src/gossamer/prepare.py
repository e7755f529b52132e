"""prepare(): time dense and every eligible kernel on this machine, and let each layer run the fastest at every size.

A layer that no sparse kernel runs faster gets a dense copy and runs dense. What copies may take in memory is bounded;
those that save the most time per byte come first, and without room the best sparse kernel has to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import dispatch, formats, machine, native, timing
from . import lock as locks
from .dispatch import Step, Way
from .explain import Explanation, books, compute_dtype, dense_spec, describe, factor_specs, inner_dtype
from .formats import Format, dtype_of
from .formats.bitmask import Bitmask
from .formats.dense import Dense
from .formats.product import Product
from .kernels import Case, Kernel, Packed, registry
from .lock import Lock
from .nn import SparseLinear, sparse_layers
from .stack import MOST_TOKENS, Stack, stacked, views

SAMPLE_LAYERS, SAMPLE_BYTES = 30, 256 << 20  # at most so many layers of one shape are timed, in dense float32 bytes
SWEEP_BYTES = 64 << 20  # more than a cache of one core or one GPU holds
WORTH = 1.02  # a copy must gain this much somewhere
EDGE = 0.95  # timings are noisy: a sparse kernel must be this much ahead of a dense copy that is there
SMALL = 16  # bytes a row of every factor: offsets and scales do not count as a copy

KIN = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))

Progress = Callable[[int, int, str], None]  # done, total, what is being timed


@dataclass(frozen=True)
class Option:
    """One way to run a group of layers: kernels for the factors (`whole`: for a dense copy), and its price."""

    kernels: tuple[str, ...]
    whole: bool
    nbytes: int
    times: dict[int, float]  # tokens -> microseconds

    def cost(self, tokens: int) -> float:
        """What it is chosen by: its time, for a dense copy a little less, without a time infinite."""
        return self.times.get(tokens, math.inf) * (EDGE if self.whole else 1.0)


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


# Not in inference mode, whose tensors could never be changed in place or trained through again.
@torch.inference_mode(False)
@torch.no_grad()
def prepare(
    model: nn.Module,
    *,
    tokens: Iterable[int] = dispatch.BUCKETS,
    dtype: torch.dtype | None = None,
    dense_memory: float | None = None,
    kernel: str | None = None,
    lock: Path | str | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Explanation:
    """Choose, for every SparseLinear of `model`, the fastest kernel per number of tokens; in place.

    `tokens`: the numbers of rows of x that are timed. `dtype`: that of x, by default what the model computes in.
    `dense_memory`: bytes that dense copies may take in all, by default half of what is free. `kernel`: use this one
    wherever its format is; KernelError if it cannot. `lock`: the file that keeps the timings, by default one per
    machine in the cache folder; `again` measures anew. Call it again after the model moved or changed its dtype.
    Raises ValueError if the model has no sparse layer.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("the model has no sparse layer; fix: gossamer.compress it, or gossamer.load a compressed one")
    sizes = sorted({n for n in tokens if n >= 1})
    if not sizes:
        raise ValueError("no number of tokens to prepare for; fix: give at least one, 1 or more")
    dtype, opened = dtype or compute_dtype(model), books(model, lock)
    shapes, groups = _shapes(layers.values(), dtype), []
    footprint = sum(_stored_bytes(layer) for layer in layers.values())
    for i, members in enumerate(shapes):
        if progress:
            progress(i, len(shapes), f"{members[0].spec['format']} {members[0].out_features}x{members[0].in_features}")
        race = _Race(sizes, dtype, opened[members[0].device], kernel, again, footprint)
        groups.append(race.group(members))
        race.book.save()
    _grant(groups, dense_memory)
    chosen = {}
    for group in groups:
        for layer in group.layers:
            _install(layer, group, sizes, dtype)
            chosen[layer] = group
    for members in _siblings(layers):
        race = _Race([n for n in sizes if n <= MOST_TOKENS], dtype, opened[members[0].device], kernel, again, footprint)
        _stack(members, chosen, race)
    if progress:
        progress(len(shapes), len(shapes), "")
    dispatch.forget()
    return describe(model, dtype, opened)


def _shapes(layers: Iterable[SparseLinear], dtype: torch.dtype) -> list[list[SparseLinear]]:
    found: dict[tuple, list[SparseLinear]] = {}
    for layer in layers:
        kinds = tuple(locks.key(f, layer.device, dtype) for f in factor_specs(layer.spec))
        found.setdefault((layer.device, *kinds), []).append(layer)
    return list(found.values())


@dataclass(frozen=True)
class _Race:
    """Times the ways to run layers of one shape, but for those that the book knows."""

    sizes: Sequence[int]
    dtype: torch.dtype
    book: Lock
    kernel: str | None
    again: bool
    footprint: int  # bytes of the whole model's sparse layers

    def group(self, layers: list[SparseLinear]) -> Group:
        found = [layer.format for layer in layers[: _sampled(layers[0])]]
        spec = layers[0].spec
        stored = {t.data_ptr() for f in found for t in f.tensors().values()}
        inner = inner_dtype(spec, self.dtype, layers[0].device)
        if isinstance(found[0], Product):
            rights, lefts = (self.options([getattr(f, n) for f in found], inner, stored) for n in ("right", "left"))
            options = [_chained(right, left, self.sizes) for right in rights for left in lefts]
        else:
            options = self.options(found, inner, stored)
        if self.kernel and any(f["format"] in registry[self.kernel].formats for f in factor_specs(spec)):
            options = [o for o in options if self.kernel in o.kernels]
        elif spec["format"] != Dense.name:
            options += self.options(found, self.dtype, set(), whole=True)
        room = SMALL * sum(f["shape"][0] + 1 for f in factor_specs(spec))
        free = [o for o in options if o.nbytes <= room]
        return Group(layers, options, free or options[:1])

    def options(
        self, found: Sequence[Format], dtype: torch.dtype, stored: set[int], whole: bool = False
    ) -> list[Option]:
        """One per kernel. `stored`: addresses of the tensors that are there anyhow; `whole`: as dense copies."""
        spec, device = found[0].spec(), next(iter(found[0].tensors().values())).device
        spec = dense_spec(spec, dtype) if whole else spec
        able = {n: self._able(Case(spec, device, dtype, n), whole) for n in self.sizes}
        names = {k.name: k for kernels in able.values() for k in kernels}
        place = locks.key(spec, device, dtype)
        missing = {
            n: kernels
            for n, kernels in able.items()
            if self.again or {k.name for k in kernels} - self.book.times.get(place, {}).get(n, {}).keys()
        }
        sample = _cold(found, self.footprint) if missing else found[:1]
        matrices = [_copy(f, dtype) for f in sample] if whole else sample
        packs = {name: [settled(k, a, dtype) for a in matrices] for name, k in names.items()}
        for n, kernels in missing.items():
            x = torch.randn(n, spec["shape"][1], device=device).to(dtype)
            runners = {k.name: [partial(_call, k, x, p) for p in packs[k.name]] for k in kernels}
            self.book.merge(place, n, timing.race(runners, device))
        times = self.book.times[place]
        return [
            Option((name,), whole, _added(packs[name][0], stored), {n: times[n][name] for n in able if k in able[n]})
            for name, k in names.items()
        ]

    def _able(self, case: Case, whole: bool) -> list[type[Kernel]]:
        if self.kernel and case.spec["format"] in registry[self.kernel].formats:
            return [dispatch.required(self.kernel, case)]
        # A dense copy that is decoded again for each product is nobody's choice.
        return [k for k in dispatch.eligible(case) if not (whole and k.name == dispatch.ORACLE)]


def _stored_bytes(layer: SparseLinear) -> int:
    return sum(t.numel() * t.element_size() for t in layer.parts())


def settled(kernel: type[Kernel], a: Format, dtype: torch.dtype) -> Packed:
    """Packed, and on the CPU moved onto huge pages: dense copies, too, or the comparison would flatter us."""
    packed = kernel.pack(a, dtype)
    if native.available():
        for tensor in packed.tensors:
            if tensor.device.type == "cpu":
                native.move_to_huge_pages(tensor)
    return packed


def _cold(found: Sequence[Format], footprint: int) -> list[Format]:
    """Copies added, so that a sweep over a shape with few layers runs from as far away as in the whole model."""
    size = sum(f.nbytes for f in found)
    more = max(0, math.ceil(min(footprint, SWEEP_BYTES) / max(1, size)) - 1)
    cloned = [formats.from_spec(f.spec(), {n: t.clone() for n, t in f.tensors().items()}) for f in [*found] * more]
    return [*found, *cloned]


def _sampled(layer: SparseLinear) -> int:
    return max(1, min(SAMPLE_LAYERS, SAMPLE_BYTES // max(1, 4 * layer.out_features * layer.in_features)))


def _copy(a: Format, dtype: torch.dtype) -> Dense:
    kind = dtype_of(dense_spec(a.spec(), dtype)["dtype"])
    return Dense(a.shape, a.decode(kind).contiguous())


def _chained(right: Option, left: Option, sizes: Sequence[int]) -> Option:
    both = {n: right.times[n] + left.times[n] for n in sizes if n in right.times and n in left.times}
    return Option((*right.kernels, *left.kernels), False, right.nbytes + left.nbytes, both)


def _call(kernel: type[Kernel], x: Tensor, packed: Packed) -> Tensor:
    return kernel.run(x, packed.tensors, packed.meta, None)


def _added(packed: Packed, stored: set[int]) -> int:
    return sum(t.numel() * t.element_size() for t in packed.tensors if t.data_ptr() not in stored)


def _grant(groups: list[Group], dense_memory: float | None) -> None:
    """Give out copies, most time saved per byte first; a group that the rest is not enough for is split."""
    if dense_memory is None:
        room = {d: machine.free_memory(d) / 2 for d in {g.layers[0].device for g in groups}}
    else:
        room = dict.fromkeys((g.layers[0].device for g in groups), float(dense_memory))
    while found := [(gain / o.nbytes, g, o) for g in groups for o in _open(g) if (gain := g.gain(o)) > 0]:
        _, group, option = max(found, key=lambda entry: entry[0])
        device = group.layers[0].device
        fit = min(len(group.layers), int(room[device] // option.nbytes))
        if fit < len(group.layers):
            rest = Group(group.layers[fit:], group.options, list(group.granted), [*group.refused, option])
            groups.append(rest)
            group.layers = group.layers[:fit]
        if not group.layers:
            groups.remove(group)
            continue
        group.granted.append(option)
        room[device] -= fit * option.nbytes


def _open(group: Group) -> list[Option]:
    return [o for o in group.options if o not in group.granted and o not in group.refused and o.times]


def _install(layer: SparseLinear, group: Group, sizes: Sequence[int], dtype: torch.dtype) -> None:
    """Pack what the layer's choices need and hand both to it."""
    layer.unprepare()
    chosen = [(n, group.best(n)) for n in sizes]
    a, parts = layer.format, layer.parts()
    operands: list[Tensor] = list(parts)
    made: dict[tuple, Way] = {}
    for _, option in chosen:
        if (place := (option.kernels, option.whole)) not in made:
            made[place] = _way(option, a, operands, dtype)
    ways = [(n, made[o.kernels, o.whole]) for n, o in chosen]
    merged = [(n, way) for i, (n, way) in enumerate(ways) if i + 1 == len(ways) or ways[i + 1][1] is not way]
    layer.use(dtype, merged, operands[len(parts) :])


def _way(option: Option, a: Format, operands: list[Tensor], dtype: torch.dtype) -> Way:
    if isinstance(a, Product) and not option.whole:
        inner = inner_dtype(a.spec(), dtype, operands[0].device)
        factors = zip(option.kernels, (a.right, a.left), strict=True)
        return tuple(_step(name, factor, operands, inner) for name, factor in factors)
    target = _copy(a, dtype) if option.whole else a
    return (_step(option.kernels[0], target, operands, dtype),)


def _step(name: str, a: Format, operands: list[Tensor], dtype: torch.dtype) -> Step:
    packed = settled(registry[name], a, dtype)
    at = [_place(t, operands) for t in packed.tensors]
    return Step(name, tuple(at), packed.meta)


def _place(tensor: Tensor, operands: list[Tensor]) -> int:
    """Where the tensor is among the operands; appended if it is new."""
    for i, known in enumerate(operands):
        if (
            known.data_ptr() == tensor.data_ptr()
            and known.shape == tensor.shape
            and known.dtype == tensor.dtype
            and known.stride() == tensor.stride()
        ):
            return i
    operands.append(tensor)
    return len(operands) - 1


def _siblings(layers: Mapping[str, SparseLinear]) -> list[list[SparseLinear]]:
    """Layers that by their names read one input, stored so that they can be one matrix."""
    found: dict[tuple, list[SparseLinear]] = {}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        kin = next((names for names in KIN if own in names), None)
        # On a GPU the kernel that a stack would need has a layout of its own, which views cannot share.
        if kin and layer.spec["format"] == Bitmask.name and layer.device.type == "cpu":
            alike = (layer.spec["dtype"], layer.in_features, layer.bias is None)
            found.setdefault((parent, kin, *alike), []).append(layer)
    return [members for members in found.values() if len(members) > 1]


def _stack(members: list[SparseLinear], chosen: Mapping[SparseLinear, Group], race: _Race) -> None:
    """Stack the layers for the numbers of tokens up to which one call beats theirs, if it does for any."""
    if not race.sizes:
        return
    parts = [layer.format for layer in members]
    whole = stacked(parts)  # type: ignore[arg-type]
    options = race.options([whole], race.dtype, {whole.weight.data_ptr(), whole.mask.data_ptr()})
    room = SMALL * (whole.shape[0] + 1)
    able = [o for o in options if o.nbytes <= room]
    ways = []
    for n in race.sizes:
        best = min(able, key=lambda o: o.times.get(n, math.inf), default=None)
        if best is None or best.times.get(n, math.inf) > sum(chosen[m].best(n).times[n] for m in members):
            break
        ways.append((n, best))
    race.book.save()
    if not ways:
        return
    operands = list(whole.tensors().values())
    steps = {o.kernels: (_step(o.kernels[0], whole, operands, race.dtype),) for _, o in ways}
    biases: list[Tensor] = [m.bias for m in members if m.bias is not None]
    bias = torch.cat(biases) if biases else None
    rows = [m.out_features for m in members]
    made = Stack(rows, race.dtype, [(n, steps[o.kernels]) for n, o in ways], whole, operands, bias)
    for place, (layer, tensors) in enumerate(zip(members, views(whole, parts), strict=True)):  # type: ignore[arg-type]
        layer.join(made, place, tensors)


def run_dense(model: nn.Module, kernel: str = "vendor", dtype: torch.dtype | None = None) -> None:
    """Let every SparseLinear run a dense copy by the kernel of this name: what `gossamer bench` compares with.

    Numbers of tokens that the kernel does not take are decoded and multiplied. KernelError if the kernel cannot run
    one token here. `layer.unprepare()` or `prepare` undo it.
    """
    dtype = dtype or compute_dtype(model)
    for layer in sparse_layers(model).values():
        copy, operands = _copy(layer.format, dtype), list(layer.parts())
        stored = len(operands)
        cases = [Case(copy.spec(), layer.device, dtype, n) for n in dispatch.BUCKETS]
        taken = [c.tokens for c in cases if dispatch.required(kernel, cases[0]).refuses(c) is None]
        ways = [(taken[-1], (_step(kernel, copy, operands, dtype),))]
        if taken[-1] < dispatch.BUCKETS[-1]:
            ways.append((dispatch.BUCKETS[-1], (_step(dispatch.ORACLE, layer.format, operands, dtype),)))
        layer.use(dtype, ways, operands[stored:])
