"""The compiled core of the index."""

from __future__ import annotations

from types import ModuleType

import numpy as np

_built: ModuleType | None
_failure: ImportError | None = None
try:
    from gossamer import _retrieval as _built
except ImportError as error:
    # Without its traceback, which would keep alive whatever the importer held.
    _built, _failure = None, error.with_traceback(None)


def require() -> ModuleType:
    """The compiled core, or an ImportError that names the fix."""
    if _built is None:
        raise ImportError(
            "Gossamer's compiled index (gossamer._retrieval) is missing: it needs a C++17 compiler (g++ >= 11); "
            "build it with `pip install .` in the repository"
        ) from _failure
    return _built


def aligned(size: int) -> np.ndarray:
    """`size` bytes from a multiple of 64 on; numpy asks for huge pages where they are many."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
