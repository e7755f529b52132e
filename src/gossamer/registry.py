"""One folder is one registry: a file `formats/bitmask.py` is the format named `bitmask`.

Files are imported on first use. Packages outside the tree register through the entry-point groups
`gossamer.formats` and `gossamer.methods`; a file of ours wins over an entry point of the same name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to the classes of one folder.

    `package` is the folder's dotted name, `base` the class that every entry derives from.
    """

    def __init__(self, package: str, base: type[T]) -> None:
        self.package, self.base = package, base
        self.noun = package.rpartition(".")[2].removesuffix("s")

    @cached_property
    def _files(self) -> set[str]:
        path = importlib.import_module(self.package).__path__
        return {m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")}

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self.package)}

    def names(self) -> list[str]:
        """Everything that can be looked up, sorted; imports nothing."""
        return sorted(self._files | set(self._plugins))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._plugins

    def __getitem__(self, name: str) -> type[T]:
        if name in self._files:
            return self._in_module(name)
        if name in self._plugins:
            return self._checked(name, self._plugins[name].load())
        raise KeyError(f"unknown {self.noun} '{name}'; there are: {', '.join(self.names())}")

    def _in_module(self, name: str) -> type[T]:
        module = importlib.import_module(f"{self.package}.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, self.base) and getattr(value, "name", None) == name:
                return value
        raise TypeError(f"{module.__file__} defines no {self.base.__name__} with name = '{name}'")

    def _checked(self, name: str, value: object) -> type[T]:
        if isinstance(value, type) and issubclass(value, self.base):
            return value
        raise TypeError(f"entry point '{name}' in group {self.package} is not a subclass of {self.base.__name__}")
