"""prepare(): time dense and every eligible kernel on this machine, and let each layer run the fastest at every size.

A layer that no sparse kernel runs faster gets a dense copy and runs dense. What copies may take in memory is bounded;
those that save the most time per byte come first, and without room the best sparse kernel has to do.
On a GPU what a kernel packed takes the place of the stored tensors, once these came back from it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import nn

from . import dispatch, machine
from . import lock as locks
from .explain import Explanation, books, compute_dtype, describe, factor_specs
from .install import install, pack_stack, siblings, stack
from .kernels import Case
from .nn import SparseLinear, sparse_layers
from .packs import Packs, dense_copy, step
from .race import Group, Option, Race

# Tokens timed on a GPU whatever was asked for: kernels made for few serve no prompt, and 2:4 pays at thousands.
PREFILL = (512, 1024, 2048, 4096)
ENDLESS = 2.0**62  # bytes

Progress = Callable[[int, int, str], None]  # done, total, what is being timed


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
    Raises ValueError if the model has no sparse layer or `dense_memory` is no such number, TypeError for other kinds.
    """
    _check(tokens := _listed(tokens), dtype, dense_memory)
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("the model has no sparse layer; fix: gossamer.compress it, or gossamer.load a compressed one")
    sizes = sorted({n for n in tokens if n >= 1})
    if not sizes:
        raise ValueError("no number of tokens to prepare for; fix: give at least one, 1 or more")
    if kernel is None and any(layer.device.type == "cuda" for layer in layers.values()):
        sizes = sorted({*sizes, *PREFILL})
    dtype, opened = dtype or compute_dtype(model), books(model, lock)
    footprint = sum(layer.stored_bytes for layer in layers.values())
    races = {d: Race(sizes, dtype, book, kernel, again, footprint) for d, book in opened.items()}
    shapes, groups = _shapes(layers.values(), dtype), []
    try:
        for i, members in enumerate(shapes):
            if progress:
                what = f"{members[0].spec['format']} {members[0].out_features}x{members[0].in_features}"
                progress(i, len(shapes), what)
            groups.append(races[members[0].device].group(members))
            races[members[0].device].book.save()
        _grant(groups, dense_memory)
        _install(layers, groups, races)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"no memory left to pack layers ({error}); those that are not prepared yet run as they are stored; "
            "fix: make room, or give prepare a smaller dense_memory"
        ) from error
    if progress:
        progress(len(shapes), len(shapes), "")
    dispatch.forget()
    return describe(model, dtype, opened)


def _listed(tokens: Iterable[int]) -> list[int]:
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise TypeError(f"prepare takes numbers of tokens, not {tokens!r}; fix: pass a list, tokens=[1, 16]")
    return list(tokens)


def _check(tokens: list[int], dtype: torch.dtype | None, dense_memory: float | None) -> None:
    if wrong := [n for n in tokens if not isinstance(n, Integral)]:
        raise TypeError(f"prepare takes whole numbers of tokens, not {wrong[0]!r}; fix: tokens=[1, 16]")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"prepare takes a dtype that layers compute in, not {dtype!r}; fix: dtype=torch.bfloat16")
    if dense_memory is not None and not (isinstance(dense_memory, Real) and dense_memory >= 0):
        raise ValueError(f"dense_memory is {dense_memory!r}, no number of bytes; fix: dense_memory=2e9, or 0 for none")


def _install(layers: Mapping[str, SparseLinear], groups: Iterable[Group], races: Mapping[torch.device, Race]) -> None:
    """Every layer gets what was granted to its group, and those that read one input what they share."""
    chosen = {layer: group for group in groups for layer in group.layers}
    kin, done = siblings(layers), set[SparseLinear]()
    for members in kin:
        if all(any(o.replaces for o in chosen[m].options) for m in members):
            done.update(members if pack_stack(members, chosen, races[members[0].device]) else ())
    for layer, group in chosen.items():
        if layer not in done:
            install(layer, group, races[layer.device])
    for members in kin:
        if members[0].device.type == "cpu" and not any(m.released for m in members):
            stack(members, chosen, races[members[0].device])


def _shapes(layers: Iterable[SparseLinear], dtype: torch.dtype) -> list[list[SparseLinear]]:
    found: dict[tuple, list[SparseLinear]] = {}
    for layer in layers:
        kinds = tuple(locks.key(f, layer.device, dtype) for f in factor_specs(layer.spec))
        found.setdefault((layer.device, *kinds), []).append(layer)
    return list(found.values())


def _grant(groups: list[Group], dense_memory: float | None) -> None:
    """Give out copies, most time saved per byte first; a group that the rest is not enough for is split."""
    if dense_memory is None:
        room = {d: machine.free_memory(d) / 2 for d in {g.layers[0].device for g in groups}}
    else:
        room = dict.fromkeys((g.layers[0].device for g in groups), min(float(dense_memory), ENDLESS))
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


def run_dense(model: nn.Module, kernel: str = "vendor", dtype: torch.dtype | None = None) -> None:
    """Let every SparseLinear run a dense copy by the kernel of this name: what `gossamer bench` compares with.

    Numbers of tokens that the kernel does not take are decoded and multiplied. KernelError if the kernel cannot run
    one token here. `layer.unprepare()` or `prepare` undo it.
    """
    dtype = dtype or compute_dtype(model)
    for layer in sparse_layers(model).values():
        layer.unprepare()
        a = layer.format
        copy, operands = dense_copy(a, dtype), list(layer.parts())
        stored = len(operands)
        cases = [Case(copy.spec(), layer.device, dtype, n) for n in dispatch.BUCKETS]
        taken = [c.tokens for c in cases if dispatch.required(kernel, cases[0]).refuses(c) is None]
        ways = [(taken[-1], (step(kernel, Packs(copy, dtype), operands),))]
        if taken[-1] < dispatch.BUCKETS[-1]:
            ways.append((dispatch.BUCKETS[-1], (step(dispatch.ORACLE, Packs(a, dtype), operands),)))
        layer.use(dtype, ways, operands[stored:])
