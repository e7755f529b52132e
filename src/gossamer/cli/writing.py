"""Files that a command is asked to write: errors name them, not the hidden ones beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Refuses a folder that is not there at once; OSErrors about `path` or its temporary names are about `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to; fix: make it first")
    try:
        yield
    except OSError as e:
        if path.name not in Path(str(e.filename)).name:
            raise
        raise OSError(f"{path} cannot be written ({e.strerror}); fix: name a place that can be written to") from None
