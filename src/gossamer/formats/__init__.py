"""Formats: how one matrix A of shape (M, K) is stored.

A format is a frozen dataclass of tensors. `spec()` is the JSON half of what is on disk and fixes the shape and dtype of
every tensor, `tensors()` is the other half; `from_spec(spec, tensors)` puts them together again. The law:
`decode(encode(a)) == a`, exactly, for every `a` that the format can hold.

The first tensor of every format is called `weight`, and its shape differs from (M, K) unless it is the dense matrix: a
loader that does not know Gossamer then stops at a size mismatch instead of filling in random weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..registry import Registry

Spec = dict[str, Any]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class FormatError(ValueError):
    """Stored tensors or a spec that do not make a valid matrix, or a matrix that a format cannot hold."""


@dataclass(frozen=True, eq=False)
class Format(ABC):
    """One stored matrix A of shape (M, K); M = out_features for a weight."""

    shape: tuple[int, int]

    name: ClassVar[str]
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True  # False: it rounds, within the bound that its docstring gives

    @classmethod
    @abstractmethod
    def encode(cls, a: Any) -> Self:
        """Store `a`: a dense, COO or CSR tensor or a scipy sparse matrix, of any strides.

        Zeros that are stored, and -0.0, are zeros; duplicates are summed; NaN and Inf are kept.
        Raises FormatError where the format cannot hold `a`.
        """

    @abstractmethod
    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, dense, in the stored dtype or in `dtype`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name, `weight` first."""

    @abstractmethod
    def spec(self) -> Spec:
        """JSON-able description: `format`, `version`, `shape`, which this one has, and all that `layout` needs."""
        return {"format": self.name, "version": self.version, "shape": list(self.shape)}

    @classmethod
    @abstractmethod
    def layout(cls, spec: Spec) -> Layout:
        """Name -> (shape, dtype) of the tensors of a spec, in the order of `tensors()`."""

    @classmethod
    @abstractmethod
    def build(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of (`spec`, `tensors`); shapes and dtypes are checked by `from_spec` before."""

    @abstractmethod
    def validate(self) -> None:
        """Raise FormatError if the contents are inconsistent (a tampered mask, an index out of range)."""

    @property
    def nbytes(self) -> int:
        """Stored bytes: values, masks, indices, scales."""
        return nbytes([self])

    @property
    def density(self) -> float:
        """Share of entries of A that are not zero."""
        return float((self.decode() != 0).double().mean()) if all(self.shape) else 0.0


registry: Registry[Format] = Registry("gossamer.formats", Format)


def nbytes(formats: Iterable[Format]) -> int:
    """Stored bytes of several matrices; a tensor that some of them share counts once."""
    tensors = {t.data_ptr() or id(t): t for f in formats for t in f.tensors().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def class_of(spec: Spec) -> type[Format]:
    """The class that reads a spec; refuses an unknown format or a newer version by name."""
    cls = registry[spec["format"]]
    if spec["version"] > cls.version:
        raise FormatError(
            f"format '{cls.name}' version {spec['version']} is newer than this Gossamer reads ({cls.version}); "
            "fix: install a newer Gossamer"
        )
    return cls


def layout(spec: Spec) -> Layout:
    """Name -> (shape, dtype) of every tensor that a spec describes."""
    return class_of(spec).layout(spec)


def from_spec(spec: Spec, tensors: Mapping[str, Tensor]) -> Format:
    """The format that a spec and its tensors describe; FormatError where names, shapes or dtypes disagree."""
    for name, (shape, dtype) in layout(spec).items():
        if name not in tensors:
            raise FormatError(f"{spec['format']}: tensor '{name}' is missing")
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise FormatError(
                f"{spec['format']}: tensor '{name}' is {tuple(found.shape)} {found.dtype}, "
                f"its spec says {shape} {dtype}"
            )
    return class_of(spec).build(spec, tensors)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"unknown dtype '{name}'; fix: a name of torch's, such as float32, bfloat16 or float16")
    return found
