"""Registers the transformers plug-in the moment transformers is there, and never imports transformers itself.

`import gossamer` before or after `import transformers`: both work, and neither waits for the other.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

log = logging.getLogger("gossamer")

AUTO = "transformers.quantizers.auto"  # the module that holds transformers' table of quantizers


class _Finder(MetaPathFinder):
    """Lets the other finders find `AUTO` and adds one call after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        others = (f for f in sys.meta_path if not isinstance(f, _Finder))
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            _after(spec.loader)
        return spec


def _after(loader: Loader) -> None:
    # On the instance, so that the loader stays what it is for inspect, pickle and importlib.reload.
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _register() -> None:
    # Whatever goes wrong here must not break the user's `import transformers`.
    try:
        plugin = importlib.import_module(".transformers", __package__)
        # Not there yet while the plug-in itself is what imports transformers; it registers at its end.
        getattr(plugin, "register", bool)()
    except Exception as error:
        log.warning(
            "gossamer could not register with transformers (%s): sparse checkpoints will not load; "
            "fix: pip install --upgrade transformers",
            error,
        )


def install() -> None:
    """Register now if transformers is loaded, and whenever it is loaded (again); calling it twice changes nothing."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if AUTO in sys.modules:
        _register()
