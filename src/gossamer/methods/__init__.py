"""Methods: what survives. A method turns weights into formats, given what calibration saw.

A group is a list of weights [out, in] that read the same input, so they share one Gram matrix; q/k/v and gate/up are
groups of three and two, most layers are alone. `ratio` is the compression ratio: 1 - stored bytes / dense bf16 bytes,
with every mask and index counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..formats import Format, dtype_of
from ..registry import Registry
from ..stats import Stats

Shape = tuple[int, int]


class RatioError(ValueError):
    """A ratio that a method cannot reach for some shape; the message names the shape and the reachable range."""


@dataclass(frozen=True)
class Method(ABC):
    """The fields of a subclass are its knobs."""

    name: ClassVar[str]
    needs_stats: ClassVar[bool] = True

    @abstractmethod
    def fit(self, group: Sequence[Tensor], stats: Stats | None, ratio: float) -> list[Format]:
        """One format per weight of the group, `size(...)` bytes together.

        `group`: weights [out, in] of one `in`, any float dtype, on the device to compute on. `stats`: their input.
        """

    def fit_many(
        self, groups: Sequence[Sequence[Tensor]], stats: Sequence[Stats | None], ratio: float
    ) -> list[list[Format]]:
        """`fit` for many groups of the same shapes; a method that gains from solving them at once overrides it."""
        return [self.fit(group, seen, ratio) for group, seen in zip(groups, stats, strict=True)]

    @abstractmethod
    def size(self, shapes: Sequence[Shape], ratio: float) -> list[int]:
        """Stored bytes per weight; a tensor shared in the group counts for the first. RatioError if out of reach."""

    def flops(self, shapes: Sequence[Shape], ratio: float) -> float:
        """Roughly how many operations `fit` takes, for the time that a plan foretells; here, one pass of sorting."""
        return 50.0 * sum(m * k for m, k in shapes)


registry: Registry[Method] = Registry("gossamer.methods", Method)


def create(name: str, **knobs: Any) -> Method:
    """A method by name; TypeError names the knobs that exist."""
    cls = registry[name]
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(knobs) - set(known)):
        raise TypeError(f"method '{name}' has no knob {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    return cls(**knobs)


def check_dtype(method: str, dtype: str) -> None:
    """ValueError unless values can be stored in `dtype` without being scaled first."""
    if not dtype_of(dtype).is_floating_point or dtype_of(dtype).itemsize < 2:
        raise ValueError(f"{method}: dtype is a float of 16 bits or more, not '{dtype}'")


def dense_bytes(shape: Shape) -> int:
    """The yardstick of every ratio: the matrix in bf16."""
    return 2 * shape[0] * shape[1]
