"""Writing a whole folder so that it is complete or not there: beside its target, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .shards import PICKLES, CheckpointError

SPARE = 1 << 24  # bytes for config, tokenizer and the like
DESCRIPTIONS = ("config.json", "gossamer.json", "README.md")  # of the weights beside them, so never carried over


@contextmanager
def written(target: Path, size: int, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and goes away when it does not.

    `size`: bytes about to be written, checked against the free space before. A target that is not empty must be
    `replaceable`; what it alone holds is carried over, weights and their descriptions excepted.
    """
    target = target.resolve()
    old, new = (target.with_name(f".{target.name}.gossamer-{what}") for what in ("old", "new"))
    if old.exists() and not target.exists():
        os.replace(old, target)  # the process was killed between the two renames below
    check_target(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size + SPARE:
        raise CheckpointError(
            f"no space for {target}: {(size + SPARE) / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "fix: free some, or save to another disk"
        )
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        _sync(new)
        _replace(target, new, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_target(target: Path, replaceable: Callable[[Path], bool]) -> None:
    """CheckpointError unless `target` is free, empty, or `replaceable`."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; fix: give a folder")
    if target.exists() and any(target.iterdir()) and not replaceable(target):
        raise CheckpointError(f"{target} holds something else already; fix: give another folder, or overwrite=True")


def _replace(target: Path, new: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        carry(target, new)
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def carry(source: Path, new: Path) -> None:
    """Copy what only `source` has; never weights and what describes them."""
    for path in source.iterdir():
        stale = path.suffix in (".safetensors", *PICKLES) or path.name.endswith(".index.json")
        if stale or path.name in DESCRIPTIONS or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _sync(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        if path.suffix == ".safetensors":
            path.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
