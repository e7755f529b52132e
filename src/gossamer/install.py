"""Handing layers what `prepare` chose for them: packing, stacking, and letting go of what can be made again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from . import dispatch
from .dispatch import Step, Way
from .explain import inner_dtype
from .formats import Format, dtype_of
from .formats.bitmask import Bitmask
from .formats.dense import Dense
from .formats.product import Product
from .kernels import Kernel, Packed, registry
from .nn import SparseLinear
from .packs import Packs, dense_copy, exact, layout_of, step
from .race import SMALL, Entry, Group, Option, Race
from .stack import MOST_TOKENS, Stack, stacked, views

# Layers that alone run dense share a sparse call only if it takes this much less time, as its parts are cut, and this
# much less memory: in a model weights come from further away than when timed, so that bytes count for more than calls.
DENSE_APART = 0.85
KIN = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


def install(layer: SparseLinear, group: Group, race: Race, ready: Mapping[object, Packed] | None = None) -> None:
    """Pack what the layer's choices need, unless it is `ready`, and hand both to it.

    Where the stored tensors come back from that, and no choice reads them, the layer lets go of them. An error on the
    way leaves the layer as it was, but not prepared.
    """
    layer.unprepare()
    chosen = [(n, group.best(n)) for n in race.sizes]
    parts = layer.parts()
    operands, packs = list[Tensor](parts), Packs(layer.format, race.dtype, ready)
    made: dict[tuple, Way] = {}
    for _, option in chosen:
        if (place := (option.kernels, option.whole)) not in made:
            made[place] = _way(option, packs, operands)
    source = _source(list(made.values()), packs, operands, len(parts))
    ways = [(n, made[o.kernels, o.whole]) for n, o in chosen]
    merged = [(n, way) for i, (n, way) in enumerate(ways) if i + 1 == len(ways) or ways[i + 1][1] is not way]
    if source is not None:
        merged = [(n, tuple(s.moved(len(parts)) for s in way)) for n, way in merged]
    layer.use(race.dtype, merged, operands[len(parts) :], source)


def _way(option: Option, packs: Packs, operands: list[Tensor]) -> Way:
    a, dtype = packs.a, packs.dtype
    if isinstance(a, Product) and not option.whole:
        inner = inner_dtype(a.spec(), dtype, operands[0].device)
        factors = zip(option.kernels, (a.right, a.left), strict=True)
        return tuple(step(name, Packs(factor, inner), operands) for name, factor in factors)
    target = Packs(dense_copy(a, dtype), dtype) if option.whole else packs
    return (step(option.kernels[0], target, operands),)


def _source(ways: Sequence[Way], packs: Packs, operands: Sequence[Tensor], stored: int) -> Step | None:
    """The step that the stored tensors come back from, among operands without them; None where they are needed."""
    steps = [s for way in ways for s in way]
    if isinstance(packs.a, Product) or any(i < stored for s in steps for i in s.at):
        return None
    for s in steps:
        copied = Dense.name in registry[s.kernel].formats
        source = registry[s.kernel] if copied else packs.source(registry[s.kernel])
        if source is not None:
            found = Step(source.name, s.at, s.meta)
            if not copied or exact(found.unpack(operands), packs.a):
                return found.moved(stored)
    return None


def siblings(layers: Mapping[str, SparseLinear]) -> list[list[SparseLinear]]:
    """Layers that by their names read one input, stored so that they can be one matrix."""
    found: dict[tuple, list[SparseLinear]] = {}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        kin = next((names for names in KIN if own in names), None)
        if kin and layer.spec["format"] == Bitmask.name and layer.device.type in MOST_TOKENS:
            alike = (layer.spec["dtype"], layer.in_features, layer.bias is None, layer.device)
            found.setdefault((parent, kin, *alike), []).append(layer)
    return [members for members in found.values() if len(members) > 1]


def stack(members: list[SparseLinear], chosen: Mapping[SparseLinear, Group], race: Race) -> None:
    """Stack the layers for the numbers of tokens up to which one call beats theirs, if it does for any."""
    race = race.upto(MOST_TOKENS[members[0].device.type])
    if not race.sizes:
        return
    parts = [layer.format for layer in members]
    whole = stacked(parts)  # type: ignore[arg-type]
    (options,) = race.options(Entry([whole], race.dtype, {whole.weight.data_ptr(), whole.mask.data_ptr()}))
    room = SMALL * (whole.shape[0] + 1)
    ways = _better_together([o for o in options if o.nbytes <= room], race.sizes, members, chosen)
    race.book.save()
    if not ways:
        return
    operands, packs = list(whole.tensors().values()), Packs(whole, race.dtype)
    steps = {o.kernels: (step(o.kernels[0], packs, operands),) for _, o in ways}
    made = _made_stack(members, race.dtype, [(n, steps[o.kernels]) for n, o in ways], whole, operands)
    for place, (layer, tensors) in enumerate(zip(members, views(whole, parts), strict=True)):  # type: ignore[arg-type]
        layer.join(made, place, tensors)


def pack_stack(members: list[SparseLinear], chosen: Mapping[SparseLinear, Group], race: Race) -> bool:
    """Pack the layers as one matrix if one call beats theirs for any number of tokens; did it?

    What a layer packs by itself are then rows of that matrix's layout, so that nothing is there twice.
    """
    few, keep = race.upto(MOST_TOKENS[members[0].device.type]), dict[str, Packed]()
    if not few.sizes:
        return False
    whole = stacked([layer.format for layer in members])  # type: ignore[arg-type]
    (options,) = few.options(Entry([whole], race.dtype, set(), replace=True, keep=keep))
    ways = _better_together([o for o in options if o.replaces], few.sizes, members, chosen)
    race.book.save()
    if not ways:
        return False
    kernel = registry[ways[0][1].kernels[0]]
    packs = Packs(whole, race.dtype, {layout_of(kernel): keep[kernel.name]})
    cuts = _cut(packs, kernel, [m.out_features for m in members])
    if cuts is None:
        return False
    operands: list[Tensor] = []
    steps = {o.kernels: (step(o.kernels[0], packs, operands),) for _, o in ways}
    made = _made_stack(members, race.dtype, [(n, steps[o.kernels]) for n, o in ways], whole, operands)
    for place, (layer, cut) in enumerate(zip(members, cuts, strict=True)):
        install(layer, chosen[layer], race, {layout_of(kernel): cut})
        layer.join(made, place)
    return True


def _cut(packs: Packs, kernel: type[Kernel], rows: Sequence[int]) -> list[Packed] | None:
    """What the kernel packed, cut into these many rows each; None if it cannot be."""
    source, ends = packs.source(kernel), list(accumulate(rows))
    if source is None:
        return None
    found = [source.rows(packs.of(kernel), end - m, end) for m, end in zip(rows, ends, strict=True)]
    cuts = [cut for cut in found if cut is not None]
    return cuts if len(cuts) == len(rows) else None


def _better_together(
    options: list[Option], sizes: Sequence[int], members: list[SparseLinear], chosen: Mapping[SparseLinear, Group]
) -> list[tuple[int, Option]]:
    """The best option for all in one call, up to the number of tokens where it loses to calls of their own."""
    ways = []
    lighter = sum(m.stored_bytes for m in members) <= DENSE_APART * sum(_dense_bytes(m) for m in members)
    for n in sizes:
        best = min(options, key=lambda o: o.times.get(n, math.inf), default=None)
        apart = [chosen[m].best(n) for m in members]
        on_cpu_dense = members[0].device.type == "cpu" and all(o.whole for o in apart)
        limit = sum(o.cost(n) for o in apart) * (DENSE_APART if on_cpu_dense else 1.0)
        if best is None or best.times.get(n, math.inf) > limit or (on_cpu_dense and not lighter):
            break
        ways.append((n, best))
    return ways


def _dense_bytes(layer: SparseLinear) -> int:
    return layer.out_features * layer.in_features * dtype_of(layer.spec["dtype"]).itemsize


def _made_stack(
    members: list[SparseLinear], dtype: torch.dtype, ways: dispatch.Ways, whole: Format, operands: list[Tensor]
) -> Stack:
    biases: list[Tensor] = [m.bias for m in members if m.bias is not None]
    bias = torch.cat(biases) if biases else None
    return Stack([m.out_features for m in members], dtype, ways, whole, operands, bias)
