"""`cospadi`: weight = codes x dictionary, fitted to what calibration saw (CoSpaDi, arXiv 2509.22075).

For y = x W^T with C C^T the Gram of x, find codes S [out, k] with s entries a row and atoms B [k, in] that minimise
||(W - S B) C||_F (section 3, eq. 6, transposed). Where a weight has fewer outputs than inputs the dictionary goes on
the other side, W = U S with s entries a column (see `_outer`). Stored: codes as a bitmask (or 2:4), the dictionary
dense; every mask bit is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from . import Method, RatioError, Shape, _dictionary, _ksvd, _outer, check_dtype, dense_bytes


@dataclass(frozen=True)
class CoSpaDi(Method):
    """`rho` = k / s, atoms per non-zero of a code (2:4 codes have 2). `share`: one right factor per group.

    `side`: "short" puts the dictionary on the short side of the weight, "in" on the inputs always, as the paper does.
    `codes`: "bitmask" or "nm24". `solver`: "fast" (`_dictionary`, `_outer`) or "ksvd" (the paper's, `_ksvd`).
    `iterations`: alternations (None: 30; 60 for ksvd). `procrustes` rounds before them (None: 10), conjugate gradient
    `steps` in each (None: 3); both belong to the fast solver. The supports of 2:4 codes settle slowly: 120, 40 and 6.
    """

    rho: float = 3.0
    share: bool = True
    side: str = "short"
    codes: str = "bitmask"
    solver: str = "fast"
    iterations: int | None = None
    procrustes: int | None = None
    steps: int | None = None
    dtype: str = "bfloat16"

    name: ClassVar[str] = "cospadi"

    def __post_init__(self) -> None:
        for knob, known in (("side", ("short", "in")), ("codes", ("bitmask", "nm24")), ("solver", ("fast", "ksvd"))):
            if getattr(self, knob) not in known:
                raise ValueError(f"cospadi: {knob} is {' or '.join(map(repr, known))}, not '{getattr(self, knob)}'")
        check_dtype(self.name, self.dtype)
        if self.rho < 1:
            raise ValueError(f"cospadi: rho = k / s is at least 1, not {self.rho}")
        if self.solver == "ksvd" and (self.codes, self.side) != ("bitmask", "in"):
            raise ValueError("cospadi: solver='ksvd' finds free supports on the inputs; add side='in', codes='bitmask'")

    def size(self, shapes: Sequence[Shape], ratio: float) -> list[int]:
        if not self.share:
            return [sum(self._budget([shape], ratio).sizes()) for shape in shapes]
        return self._budget(shapes, ratio).sizes()

    def flops(self, shapes: Sequence[Shape], ratio: float) -> float:
        jobs = [shapes] if self.share else [[s] for s in shapes]
        return sum(self._flops(self._budget(job, ratio)) for job in jobs)

    def _flops(self, b: _Budget) -> float:
        """The products of one alternation, times 3 for what is not a product; K-SVD's sweep and pursuit by atoms."""
        m, w, k, steps = b.rows, b.width, b.k, self._steps
        if self.solver == "ksvd":
            return self._rounds * (2.0 * m * b.s * (k * k + b.s * b.s) + 40.0 * k * m * w)
        if b.outer:
            return self._rounds * 6.0 * ((2 + steps) * k * w * (w + k) + 3 * m * k * w)
        return self._rounds * 6.0 * ((3 + steps) * m * k * k + 3 * m * k * w + k * k * w)

    def fit(self, group: Sequence[Tensor], stats: Stats | None, ratio: float) -> list[Format]:
        return self.fit_many([group], [stats], ratio)[0]

    def fit_many(
        self, groups: Sequence[Sequence[Tensor]], stats: Sequence[Stats | None], ratio: float
    ) -> list[list[Format]]:
        seen = [s for s in stats if s is not None]
        if len(seen) < len(groups):
            raise ValueError("cospadi needs calibration statistics")
        if self.share:
            return self._fit(groups, seen, ratio)
        # Each place in the group is a problem of its own, with one shape across the groups.
        places = [self._fit([[w] for w in place], seen, ratio) for place in zip(*groups, strict=True)]
        return [[found[0] for found in group] for group in zip(*places, strict=True)]

    def _fit(self, groups: Sequence[Sequence[Tensor]], stats: Sequence[Stats], ratio: float) -> list[list[Format]]:
        """One right factor per group."""
        budget = self._budget([(w.shape[0], w.shape[1]) for w in groups[0]], ratio)
        solve = self._on_outputs if budget.outer else self._on_inputs
        scaled = [_balanced(g, s) for g, s in zip(groups, stats, strict=True)]
        factors = solve([rows for rows, _ in scaled], stats, budget)
        stored = dtype_of(self.dtype)
        found = []
        for group, (_, size), (left, right) in zip(groups, scaled, factors, strict=True):
            shared = budget.right(right.to(stored))
            lefts = (left.double() / size).to(stored).split([w.shape[0] for w in group])
            found.append([Product.of(budget.left(each), shared) for each in lefts])
        return found

    def _on_inputs(self, rows: list[Tensor], stats: Sequence[Stats], budget: _Budget) -> list[Pair]:
        roots = [s.root for s in stats]
        whitened = torch.stack([(w @ root).float() for w, (root, _) in zip(rows, roots, strict=True)])
        codes, atoms = self.solve(whitened, budget.k, budget.s)
        return [(c, b.double() @ inverse) for c, b, (_, inverse) in zip(codes, atoms, roots, strict=True)]

    def solve(self, a: Tensor, k: int, s: int) -> Pair:
        """(codes [b, M, k], atoms [b, k, K]) for a batch of whitened weights [b, M, K] of one shape."""
        if self.solver == "ksvd":
            return _ksvd.learn(a, k, s, self._rounds)
        select = self._select(lambda scores: patterns.top_per_row(scores, s))
        return _dictionary.learn(a, k, select, self._rounds, self._starts, self._steps)

    def _on_outputs(self, rows: list[Tensor], stats: Sequence[Stats], budget: _Budget) -> list[Pair]:
        grams = [s.damped() for s in stats]
        # In units of each input's own size: the Gram has a unit diagonal, and scores compare across columns.
        sizes = [g.diagonal().sqrt() for g in grams]
        w = torch.stack([(r * d).float() for r, d in zip(rows, sizes, strict=True)])
        gram = torch.stack([(g / d / d[:, None]).float() for g, d in zip(grams, sizes, strict=True)])
        select = self._select(lambda scores: patterns.top_per_row(scores.mT, budget.s).mT)
        strides = _outer.PATTERN if self.codes == "nm24" else _outer.FREE
        atoms, codes = _outer.learn(w, gram, budget.k, select, self._rounds, self._steps, strides)
        return [(u, s.double() / d) for u, s, d in zip(atoms, codes, sizes, strict=True)]

    def _select(self, free: _dictionary.Select) -> _dictionary.Select:
        return patterns.nm if self.codes == "nm24" else free

    @property
    def _rounds(self) -> int:
        if self.iterations is not None:
            return self.iterations
        return 60 if self.solver == "ksvd" else 120 if self.codes == "nm24" else 30

    @property
    def _starts(self) -> int:
        return self.procrustes if self.procrustes is not None else 40 if self.codes == "nm24" else 10

    @property
    def _steps(self) -> int:
        return self.steps if self.steps is not None else 6 if self.codes == "nm24" else 3

    def _budget(self, shapes: Sequence[Shape], ratio: float) -> _Budget:
        """The largest dictionary at this rho that fits, then the codes that fill what is left."""
        outer = self.side == "short" and sum(m for m, _ in shapes) < shapes[0][1]
        limit = int((1 - ratio) * sum(map(dense_bytes, shapes)))
        sparse = self.codes == "nm24"
        rho, grain = (2.0, 1 if outer else 4) if sparse else (self.rho, 1)
        empty = _Budget(tuple(shapes), outer, sparse, dtype_of(self.dtype).itemsize, 0, 0)
        for k in range(empty.most(limit, rho) // grain * grain, 0, -grain):
            found = empty.filled(k, limit)
            if found and found.s >= k / rho - 1e-9:
                return found
        raise RatioError(f"cospadi: ratio {ratio} is out of reach for {list(shapes)}; ask for a smaller one")


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Budget:
    """How many atoms (`k`) and entries per code (`s`) the bytes of a group buy, and how the factors are stored."""

    shapes: tuple[Shape, ...]
    outer: bool  # the dictionary is the left factor
    sparse24: bool
    itemsize: int
    k: int
    s: int

    @property
    def rows(self) -> int:
        return sum(m for m, _ in self.shapes)

    @property
    def width(self) -> int:
        return self.shapes[0][1]

    @property
    def codes(self) -> int:
        """How many codes there are: one per output, or per input where the dictionary is on the outputs."""
        return self.width if self.outer else self.rows

    def most(self, limit: int, rho: float) -> int:
        """An upper bound on k; on the outputs there are never more atoms than outputs."""
        length = self.rows if self.outer else self.width
        bound = int(limit / (self.itemsize * length + self.codes * (self.itemsize / rho + 1 / 8))) + 8
        return min(bound, self.rows) if self.outer else bound

    def filled(self, k: int, limit: int) -> _Budget | None:
        """With k atoms and as many entries per code as fit; None if there is no room for one (or for 2:4)."""
        full = _Budget(self.shapes, self.outer, self.sparse24, self.itemsize, k, k // 2 if self.sparse24 else 0)
        left = limit - sum(full.sizes())
        if self.sparse24:
            return full if left >= 0 and full.s else None
        s = min(k, left // (self.itemsize * self.codes))
        return _Budget(self.shapes, self.outer, False, self.itemsize, k, s) if s >= 1 else None

    def sizes(self) -> list[int]:
        """Stored bytes per weight, the right factor counted for the first."""
        if self.outer:
            parts = [m * self.k * self.itemsize for m, _ in self.shapes]
            right = self._sparse((self.k, self.width))
        else:
            parts = [self._sparse((m, self.k)) for m, _ in self.shapes]
            right = self.k * self.width * self.itemsize
        return [right + parts[0], *parts[1:]]

    def _sparse(self, shape: Shape) -> int:
        if self.sparse24:
            return NM.size(shape, itemsize=self.itemsize)
        return Bitmask.size(shape, (shape[1] if self.outer else shape[0]) * self.s, self.itemsize)

    def left(self, a: Tensor) -> Format:
        return Dense.encode(a) if self.outer else self._encode(a)

    def right(self, a: Tensor) -> Format:
        return self._encode(a) if self.outer else Dense.encode(a)

    @property
    def _encode(self) -> Callable[[Tensor], Format]:
        return NM.encode if self.sparse24 else Bitmask.encode


def _balanced(group: Sequence[Tensor], stats: Stats) -> Pair:
    """The weights of a group on top of each other, float64, each scaled by ||W C||^-1/2, and the scale [rows, 1].

    Half way between equal absolute and equal relative errors. In absolute terms v, a hundred times smaller than q,
    would be left to what the dictionary learns for q: on SmolLM2 at ratio 0.3 the halving takes 5 % off the gap.
    """
    gram = stats.damped()
    wide = [w.double() for w in group]
    scales = [((w @ gram) * w).sum().clamp_min(1e-300) ** -0.25 for w in wide]
    rows = torch.cat([s.expand(w.shape[0], 1) for s, w in zip(scales, wide, strict=True)])
    return torch.cat(wide) * rows, rows
