"""explain(): which kernel every layer runs at every size, what it took on this machine, and what dense would take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import dispatch
from . import lock as locks
from .formats import Spec, dtype_name
from .formats.product import Product
from .kernels import Case, reference, registry
from .lock import Lock, Times
from .nn import SparseLinear, sparse_layers


@dataclass(frozen=True)
class Cell:
    """One size: the kernels, microseconds (None if never timed), and those of the best dense product."""

    tokens: int
    kernels: tuple[str, ...]
    microseconds: float | None
    dense: float | None

    @property
    def speedup(self) -> float | None:
        """Over the best dense product; None if either was never timed."""
        return self.dense / self.microseconds if self.microseconds and self.dense else None


@dataclass(frozen=True)
class Row:
    """Layers of one shape that run alike."""

    layers: tuple[str, ...]
    stored: str  # format and shape
    together: int  # up to so many tokens they run in one call with their siblings (q, k and v); 0 if not
    copies: int  # bytes of dense copies and packed layouts beside the stored tensors, all layers together
    held: int  # bytes of all that the layers keep
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Explanation:
    """What `gossamer.explain` and `gossamer.prepare` return; printing it shows a table."""

    dtype: torch.dtype
    rows: tuple[Row, ...]

    @property
    def copies(self) -> int:
        """Bytes taken beside the stored tensors."""
        return sum(row.copies for row in self.rows)

    @property
    def worst(self) -> float | None:
        """The smallest speedup over dense of any row at any size."""
        known = [cell.speedup for row in self.rows for cell in row.cells if cell.speedup]
        return min(known, default=None)

    def __str__(self) -> str:
        lines = [f"x in {dtype_name(self.dtype)}; kernel and speedup over the best dense product per number of tokens"]
        for row in self.rows:
            memory = f"{row.held / 1e6:.1f} MB, {row.copies / 1e6:.1f} MB more than stored"
            lines.append(f"{pattern(row.layers)}  {row.stored}, {memory}")
            lines += [f"    {_range(span)}: {_shown(span)}" for span in _spans(row.cells)]
            if row.together:
                lines.append(f"    up to {row.together} tokens in one call with the layers that read the same input")
        return "\n".join(lines)


def pattern(names: Sequence[str]) -> str:
    """`model.layers.*.mlp.up_proj (30 layers)` for names that differ in numbers, else the names."""
    kinds = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names})
    return ", ".join(kinds) + (f" ({len(names)} layers)" if len(names) > 1 else "")


def _spans(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Runs of sizes with the same kernels."""
    found: list[list[Cell]] = []
    for cell in cells:
        if found and found[-1][0].kernels == cell.kernels:
            found[-1].append(cell)
        else:
            found.append([cell])
    return found


def _range(span: Sequence[Cell]) -> str:
    first, last = span[0].tokens, span[-1].tokens
    return f"{first}" if first == last else f"{first}..{last}"


def _shown(span: Sequence[Cell]) -> str:
    speed = [f"{cell.speedup:.2f}x" for cell in span if cell.speedup]
    return " then ".join(span[0].kernels) + (f"  {' '.join(speed)}" if speed else "  (not timed here)")


def describe(model: nn.Module, dtype: torch.dtype, books: Mapping[torch.device, Lock]) -> Explanation:
    """The explanation for x of `dtype`, with the times of the lock files, one per device."""
    grouped: dict[tuple, list[tuple[str, SparseLinear]]] = {}
    for name, layer in sparse_layers(model).items():
        cells = _cells(layer, dtype, books[layer.device].times)
        together = layer.stack.tokens if layer.stack else 0
        grouped.setdefault((_stored(layer.spec), together, cells), []).append((name, layer))
    rows = [
        Row(
            tuple(n for n, _ in members),
            stored,
            together,
            sum(layer.packed_bytes for _, layer in members),
            sum(layer.held_bytes for _, layer in members),
            cells,
        )
        for (stored, together, cells), members in grouped.items()
    ]
    return Explanation(dtype, tuple(rows))


def explain(model: nn.Module, dtype: torch.dtype | None = None, lock: Path | str | None = None) -> Explanation:
    """Which kernel runs each sparse layer of `model`, and how that compares with dense on this machine.

    Of a model that was not prepared it tells what the lock file or the prediction chooses. `dtype`: that of x, by
    default what the model computes in. `lock`: the file with the timings, by default this machine's.
    """
    return describe(model, dtype or compute_dtype(model), books(model, lock))


def books(model: nn.Module, path: Path | str | None = None) -> dict[torch.device, Lock]:
    """The lock of every device that the model has sparse layers on."""
    return {d: locks.load(d, path) for d in {layer.device for layer in sparse_layers(model).values()}}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in: the dtype of the first floating-point parameter that no sparse layer stores."""
    held = [layer for layer in sparse_layers(model).values() if not layer.released]
    stored = {id(p) for layer in held for p in layer.parts()}
    ours = (p.dtype for p in model.parameters() if id(p) not in stored and p.dtype.is_floating_point)
    return next(ours, torch.get_default_dtype())


def factor_specs(spec: Spec) -> list[Spec]:
    """The matrices that x meets, in order."""
    return [spec["right"], spec["left"]] if spec["format"] == Product.name else [spec]


def dense_spec(spec: Spec, dtype: torch.dtype) -> Spec:
    """Of the dense copy: a single matrix keeps its own dtype, which holds it exactly; a product takes that of x."""
    kind = spec.get("dtype", dtype_name(dtype))
    return {"format": "dense", "version": 1, "shape": spec["shape"], "dtype": kind}


def inner_dtype(spec: Spec, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What x is computed in on its way through the factors of a spec."""
    return reference.wide(torch.empty(0, dtype=dtype, device=device)) if spec["format"] == Product.name else dtype


def _stored(spec: Spec) -> str:
    held = " x ".join(s["format"] for s in (spec.get("left"), spec.get("right")) if s) or spec["format"]
    m, k = spec["shape"]
    # To a twentieth, as in the keys of the lock file.
    density = f" density {round(20 * spec['nnz'] / max(1, m * k)) / 20:.2f}" if "nnz" in spec else ""
    return f"{held} {m}x{k}{density}"


def _cells(layer: SparseLinear, dtype: torch.dtype, times: Times) -> tuple[Cell, ...]:
    sizes = [upto for upto, _ in dispatch.route(layer.layout).ways]
    return tuple(_cell(layer, n, dtype, times) for n in sorted({*dispatch.BUCKETS, *sizes}))


def _cell(layer: SparseLinear, tokens: int, dtype: torch.dtype, times: Times) -> Cell:
    spec, device, route = layer.spec, layer.device, dispatch.route(layer.layout)
    inner = inner_dtype(spec, dtype, device)
    matrices = [(f, inner) for f in factor_specs(spec)]
    if route.dtype == dtype:
        kernels = [step.kernel for step in route.way(tokens)]
    else:
        kernels = [dispatch.choose(Case(f, device, kind, tokens)).name for f, kind in matrices]
    copy = (dense_spec(spec, dtype), dtype)
    if len(kernels) == 1 and _runs_copy(kernels[0], spec):
        matrices = [copy]

    def took(matrix: tuple[Spec, torch.dtype]) -> dict[str, float]:
        return times.get(locks.key(matrix[0], device, matrix[1]), {}).get(tokens, {})

    each = [took(matrix).get(kernel) for matrix, kernel in zip(matrices, kernels, strict=True)]
    dense = {n: t for n, t in took(copy).items() if n != dispatch.ORACLE}
    total = sum(t for t in each if t is not None) if None not in each else None
    return Cell(tokens, tuple(kernels), total, min(dense.values(), default=None))


def _runs_copy(kernel: str, spec: Spec) -> bool:
    return kernel != dispatch.ORACLE and spec["format"] not in registry[kernel].formats
