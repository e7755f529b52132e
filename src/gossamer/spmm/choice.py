"""Which kernel multiplies a matrix: predicted from its pattern (`model`), measured, or both; packed once per choice."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from .. import reorder, timing
from ..cusparse import CusparseError
from . import Csr, KernelError, Packed, Way, duel, memory, model, registry
from .kernels import cusparse

BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # widths of B that are chosen for; between goes with above
MEASURED = 4  # ways that a measurement compares, at least
REACH = 3.0  # and all that are predicted to take at most so many times as long as the best
NEAR = 1.25  # the same for all but the first of ours in a short race, where only the library must not be missed
SECONDS = 0.005  # of timing per way
SHOWN = 4
Race = Callable[[Mapping[str, Sequence[duel.Call]]], dict[str, float]]


def bucket(n: int) -> int:
    return next((b for b in BUCKETS if n <= b), BUCKETS[-1])


class Chooser:
    """Chooses for one matrix, per width of B, and keeps what it packed.

    tf32: may float32 values be rounded? reordering: may rows be put in another order inside? changing: will values
    differ from product to product? Then only kernels that read them where they lie are used. measuring: what happens
    when a width first comes up that this machine has not timed yet? True: all promising ways are timed; False: the
    prediction does; None: on a GPU a short race between the best predicted of ours and of the library. deterministic:
    must two runs agree to the bit?
    """

    def __init__(
        self,
        a: Csr,
        tf32: bool,
        reordering: bool,
        changing: bool,
        measuring: bool | None = None,
        deterministic: bool = True,
    ) -> None:
        self.a, self.tf32, self.reordering, self.changing, self.measuring = a, tf32, reordering, changing, measuring
        self.deterministic = deterministic
        self._ways: dict[int, Way] = {}
        self._times: dict[int, dict[Way, float]] = {}
        self._packed: dict[tuple[int, Way], Packed] = {}

    @cached_property
    def _order(self) -> Tensor | None:
        return reorder.worthwhile(self.a) if self.reordering else None

    @property
    def reordered(self) -> bool:
        """Are rows in another order inside?"""
        return self._windows and self._order is not None

    @cached_property
    def stats(self) -> model.Stats:
        order = self._order if self._windows else None
        gathered = reorder.gathered(self.a, order) if self._windows and self.a.nnz else {}
        blocks = cusparse.blocks_across(self.a) if any("ell" in dict(w.knobs) for w in self.ways) else 0
        return model.Stats.of(self.a, gathered, reorder.shared(self.a) if self._on_gpu else 0.0, blocks)

    @cached_property
    def _windows(self) -> bool:
        """Does any way depend on what rows have in common?"""
        return any("rows" in dict(w.knobs) for w in self.ways)

    @cached_property
    def ways(self) -> list[Way]:
        """All that may run here."""
        able = [registry[name] for name in registry.names()]
        able = [k for k in able if k.refuses(self.a) is None and (k.live or not self.changing)]
        return [w for k in able for w in k.ways(self.a, self.tf32, self.deterministic)]

    def predicted(self, n: int) -> dict[Way, float]:
        """Microseconds, the one to choose first."""
        return model.ranked(self.ways, self.stats, n, self.a.values.element_size())

    def way(self, n: int) -> Way:
        at = bucket(n)
        if at not in self._ways:
            if not self.ways:
                raise KernelError(f"nothing multiplies {self.a.dtype} on {self.a.device}; fix: use precision='fp32'")
            self._ways[at] = self._chosen(at)
        return self._ways[at]

    def _chosen(self, n: int) -> Way:
        if self.measuring:
            return self._fastest(n)
        pick = next(iter(self.predicted(n)))
        if self.measuring is False or len(self.ways) == 1:
            return pick
        for ways in (self._promising(n), self._rivals(n)):
            if len(ways) > 1 and (known := self._recalled(n, ways)):
                return self._pinned(n, known)
        rivals = self._rivals(n)
        if self._on_gpu and len(rivals) > 1:
            with contextlib.suppress(torch.OutOfMemoryError):  # of the operand that they are tried on
                return self._pinned(n, self._timed(n, rivals, self._duel))
        return pick

    @property
    def _on_gpu(self) -> bool:
        return self.a.device.type == "cuda"

    def packed(self, n: int, way: Way) -> Packed:
        key = bucket(n), way
        if key not in self._packed:
            self._check_capture(n)
            known = next((p for (_, w), p in self._packed.items() if w == way), None)
            self._packed[key] = way.own.refit(known, key[0]) if known else self._pack(key[0], way)
        return self._packed[key]

    def _pack(self, n: int, way: Way) -> Packed:
        knobs = dict(way.knobs) | ({"order": self._order} if "rows" in dict(way.knobs) else {})
        return way.own.pack(self.a, n, **knobs)

    def _check_capture(self, n: int) -> None:
        """Packing waits for the GPU, which nothing may do while a CUDA graph is captured."""
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"nothing is packed yet for a B of {n} columns, and a CUDA graph is being captured; fix: make one such "
                f"product, or call prepare({n}), before capturing"
            )

    def multiply(self, b: Tensor, values: Tensor | None = None) -> Tensor:
        """A B, for these values in the place of A's."""
        if bucket(b.shape[1]) not in self._ways:
            self._check_capture(b.shape[1])
        way = self.way(b.shape[1])
        packed = self.packed(b.shape[1], way)
        tensors = packed.tensors if values is None else way.own.revalued(packed.tensors, values)
        return way.own.run(b, tensors, packed.meta)

    def prepare(self, n: int, measure: bool) -> None:
        """Choose and pack for B of n columns; `measure`: by timing all promising ways, or as timed here before."""
        if measure or self.measuring:
            self._ways[bucket(n)] = self._fastest(bucket(n))
        self.packed(n, self.way(n))

    @cached_property
    def _memory(self) -> memory.Memory:
        return memory.Memory(self.a, self.tf32, self.reordering, self.changing)

    def _recalled(self, n: int, ways: Sequence[Way]) -> dict[Way, float] | None:
        """What this machine has measured before, if that was all of these."""
        known = self._memory.recall(n) or {}
        return {w: known[str(w)] for w in ways} if known.keys() >= {str(w) for w in ways} else None

    def _fastest(self, n: int) -> Way:
        ways = self._promising(n)
        if self._times.get(n, {}).keys() >= set(ways):
            return next(iter(self._times[n]))
        return self._pinned(n, self._recalled(n, ways) or self._timed(n, ways, self._race))

    def _pinned(self, n: int, times: dict[Way, float]) -> Way:
        """The fastest; what was packed for the others is dropped."""
        self._times[n] = dict(sorted(times.items(), key=lambda item: item[1]))
        best = next(iter(self._times[n]))
        self._packed = {key: p for key, p in self._packed.items() if key[0] != n or key[1] == best}
        return best

    def _promising(self, n: int) -> list[Way]:
        predicted = self.predicted(n)
        limit = REACH * min(predicted.values())
        return [w for i, (w, us) in enumerate(predicted.items()) if i < MEASURED or us <= limit]

    def _rivals(self, n: int) -> list[Way]:
        """The pick; two of each of our kernels and one of each of the library's, as predicted, where they come near."""
        predicted = self.predicted(n)
        least, found, rivals = min(predicted.values()), Counter[tuple[str, bool]](), list[Way]()
        for way, us in predicted.items():
            library, kind = way.kernel in model.LIBRARY, (way.kernel, "ell" in dict(way.knobs))
            reach = REACH if library or all(w.kernel in model.LIBRARY for w in rivals) else NEAR
            if not rivals or (us <= reach * least and found[kind] < (1 if library else 2)):
                found[kind] += 1
                rivals.append(way)
        return rivals

    def _timed(self, n: int, ways: Sequence[Way], race: Race) -> dict[Way, float]:
        """Microseconds, infinite where the library refuses or memory does not suffice."""
        generator = torch.Generator(self.a.device).manual_seed(0)  # the user's random numbers are not ours to use
        b = torch.randn(self.a.shape[1], n, device=self.a.device, dtype=self.a.dtype, generator=generator)
        operands, runners = duel.copies(b), {}
        for way in ways:
            with contextlib.suppress(CusparseError, torch.OutOfMemoryError):
                packed = self.packed(n, way)
                calls = [partial(way.own.run, x, packed.tensors, packed.meta) for x in operands]
                calls[0]()
                runners[str(way)] = calls
        found = {str(w): math.inf for w in ways} | (race(runners) if runners else {})
        self._memory.remember(n, found)
        return {w: found[str(w)] for w in ways}

    def _race(self, runners: Mapping[str, Sequence[duel.Call]]) -> dict[str, float]:
        return timing.race(runners, self.a.device, SECONDS)

    def _duel(self, runners: Mapping[str, Sequence[duel.Call]]) -> dict[str, float]:
        return duel.duel(runners, self.a.device)

    def explain(self, widths: Sequence[int]) -> str:
        lines = [str(self.stats)]
        if self._windows:
            lines.append("rows are put in another order inside" if self.reordered else "rows stay as they are")
        for n in widths:
            way, measured = self.way(n), self._times.get(bucket(n), {})
            times = measured or self.predicted(bucket(n))
            said = ", ".join(f"{w} {us:.1f}" for w, us in list(times.items())[:SHOWN])
            lines.append(f"N = {n}: {way}; {'measured' if measured else 'predicted'} us: {said}")
        return "\n".join(lines)
