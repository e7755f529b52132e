"""`cospadi`: weight = codes x dictionary, fitted to what calibration saw (CoSpaDi, arXiv 2509.22075).

For y = x W^T with C C^T the Gram of x, find codes S [out, k] with s entries a row and atoms B [k, in] that minimise
||(W - S B) C||_F (section 3, eq. 6, transposed). Stored: S as a bitmask (or 2:4), B dense; every mask bit is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import patterns
from ..formats import Format, dtype_of
from ..formats.bitmask import Bitmask
from ..formats.dense import Dense
from ..formats.nm24 import NM
from ..formats.product import Product
from ..stats import Stats
from . import Method, RatioError, Shape, _dictionary, _ksvd, dense_bytes

Pair = tuple[Tensor, Tensor]  # root of a Gram and its inverse


@dataclass(frozen=True)
class CoSpaDi(Method):
    """`rho` = k / s, atoms per non-zero of a code (2:4 codes have 2). `share`: one dictionary per group.

    `codes`: "bitmask" or "nm24". `solver`: "fast" (`_dictionary`) or "ksvd" (the paper's, `_ksvd`).
    `iterations`: alternations, None for the solver's own (30 fast, 60 ksvd).
    """

    rho: float = 2.5
    share: bool = True
    codes: str = "bitmask"
    solver: str = "fast"
    iterations: int | None = None
    procrustes: int = 10
    steps: int = 3
    dtype: str = "bfloat16"

    name: ClassVar[str] = "cospadi"

    def __post_init__(self) -> None:
        if self.codes not in ("bitmask", "nm24"):
            raise ValueError(f"cospadi: codes is 'bitmask' or 'nm24', not '{self.codes}'")
        if self.solver not in ("fast", "ksvd"):
            raise ValueError(f"cospadi: solver is 'fast' or 'ksvd', not '{self.solver}'")
        if self.rho < 1:
            raise ValueError(f"cospadi: rho = k / s is at least 1, not {self.rho}")
        if self.codes == "nm24" and self.solver == "ksvd":
            raise ValueError("cospadi: solver='ksvd' finds free supports only; use codes='bitmask'")

    @property
    def shares(self) -> bool:  # type: ignore[override]
        return self.share

    def size(self, shapes: Sequence[Shape], ratio: float) -> list[int]:
        if not self.share:
            return [sum(self._bytes((shape,), *self._atoms((shape,), ratio))) for shape in shapes]
        dictionary, *codes = self._bytes(shapes, *self._atoms(shapes, ratio))
        return [dictionary + codes[0], *codes[1:]]

    def fit(self, group: Sequence[Tensor], stats: Stats | None, ratio: float) -> list[Format]:
        return self.fit_many([group], [stats], ratio)[0]

    def fit_many(
        self, groups: Sequence[Sequence[Tensor]], stats: Sequence[Stats | None], ratio: float
    ) -> list[list[Format]]:
        roots = [seen.root() for seen in stats if seen is not None]
        if len(roots) < len(groups):
            raise ValueError("cospadi needs calibration statistics")
        if self.share:
            return self._fit(groups, roots, ratio)
        # Each place in the group is a problem of its own, with one shape across the groups.
        places = [self._fit([[w] for w in place], roots, ratio) for place in zip(*groups, strict=True)]
        return [[found[0] for found in group] for group in zip(*places, strict=True)]

    def _fit(self, groups: Sequence[Sequence[Tensor]], roots: list[Pair], ratio: float) -> list[list[Format]]:
        """One dictionary per group."""
        k, s = self._atoms([(w.shape[0], w.shape[1]) for w in groups[0]], ratio)
        scaled = [_balanced([w.double() @ r for w in g]) for g, (r, _) in zip(groups, roots, strict=True)]
        codes, atoms = self.solve(torch.stack([a.float() for a, _ in scaled]), k, s)
        solved = zip(groups, codes, atoms, scaled, roots, strict=True)
        return [self._store(g, c.double() / size, b.double() @ back) for g, c, b, (_, size), (_, back) in solved]

    def _store(self, group: Sequence[Tensor], codes: Tensor, atoms: Tensor) -> list[Format]:
        right = Dense.encode(atoms.to(dtype_of(self.dtype)))
        rows = codes.to(dtype_of(self.dtype)).split([w.shape[0] for w in group])
        return [Product.of(self._encode(r), right) for r in rows]

    def solve(self, a: Tensor, k: int, s: int) -> tuple[Tensor, Tensor]:
        """(codes [b, M, k], atoms [b, k, K]) for a batch of whitened weights [b, M, K] of one shape."""
        if self.solver == "ksvd":
            return _ksvd.learn(a, k, s, self.iterations or 60)
        return _dictionary.learn(a, k, self._select(s), self.iterations or 30, self.procrustes, self.steps)

    def _select(self, s: int) -> _dictionary.Select:
        if self.codes == "nm24":
            return lambda scores: patterns.nm(scores, 2, 4)
        return lambda scores: patterns.top_per_row(scores, s)

    def _encode(self, codes: Tensor) -> Format:
        return NM.encode(codes) if self.codes == "nm24" else Bitmask.encode(codes)

    def _atoms(self, shapes: Sequence[Shape], ratio: float) -> tuple[int, int]:
        """(k, s): the largest dictionary at this rho that fits the budget, then the codes that fill it."""
        budget = int((1 - ratio) * sum(map(dense_bytes, shapes)))
        rows, width = sum(m for m, _ in shapes), shapes[0][1]
        rho, grain = (2.0, 4) if self.codes == "nm24" else (self.rho, 1)
        item = dtype_of(self.dtype).itemsize
        k = int(budget / (item * width + rows * (item / rho + 1 / 8))) // grain * grain + grain
        while k > 0 and (s := self._entries(shapes, k, budget)) < k / rho - 1e-9:
            k -= grain
        if k < grain or s < 1:
            raise RatioError(f"cospadi: ratio {ratio} is out of reach for {list(shapes)}; ask for a smaller one")
        return k, s

    def _entries(self, shapes: Sequence[Shape], k: int, budget: int) -> int:
        """Entries per code that the budget leaves beside k atoms; 2:4 codes have k/2 if that fits at all."""
        if self.codes == "nm24":
            return k // 2 if sum(self._bytes(shapes, k, k // 2)) <= budget else 0
        left = budget - sum(self._bytes(shapes, k, 0))
        return min(k, left // (dtype_of(self.dtype).itemsize * sum(m for m, _ in shapes)))

    def _bytes(self, shapes: Sequence[Shape], k: int, s: int) -> list[int]:
        """Stored bytes: the dictionary, then each matrix's codes."""
        item = dtype_of(self.dtype).itemsize
        if self.codes == "nm24":
            codes = [NM.size((m, k), itemsize=item) for m, _ in shapes]
        else:
            codes = [Bitmask.size((m, k), m * s, item) for m, _ in shapes]
        return [k * shapes[0][1] * item, *codes]


def _balanced(whitened: list[Tensor]) -> Pair:
    """The matrices of a group on top of each other, each scaled by ||.||^-1/2, and the scale [rows, 1].

    Half way between equal absolute and equal relative errors. In absolute terms v, a hundred times smaller than q, would
    be left to what the dictionary learns for q: on SmolLM2 at ratio 0.3 this halving of exponents takes 5 % off the gap.
    """
    scales = [w.norm().clamp_min(1e-300).rsqrt() for w in whitened]
    rows = torch.cat([s.expand(w.shape[0], 1) for s, w in zip(scales, whitened, strict=True)])
    return torch.cat(whitened) * rows, rows
