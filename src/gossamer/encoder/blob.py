"""Arrays in one file that every process maps: read-only, in memory once, safe against being replaced.

A JSON header, padded to a page, then the arrays, each at a multiple of 64 bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = b"gossamer blob 1\n"
PAGE, LINE = 4096, 64


class BlobError(ValueError):
    """A file that is not what it says."""


def write(path: Path, arrays: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Written beside `path` and renamed: who has the old file mapped keeps it. OSError where that is not allowed."""
    places, at = {}, 0
    for name, t in arrays.items():
        places[name] = {"at": at, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        at += -(-t.nbytes // LINE) * LINE
    header = json.dumps({"about": about, "arrays": places, "size": at}).encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(bytes(-file.tell() % PAGE))
            for t in arrays.values():
                raw = t.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(raw.data)
                file.write(bytes(-t.nbytes % LINE))
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(arrays, about); the arrays are views of the mapped file. BlobError, FileNotFoundError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(MAGIC) + 8)
        if len(start) < len(MAGIC) + 8 or not start.startswith(MAGIC):
            raise BlobError(f"{path} is none of Gossamer's files; fix: delete it, it is made again")
        length = int.from_bytes(start[len(MAGIC) :], "little")
        try:
            header = json.loads(file.read(min(length, size)))
        except ValueError:
            raise BlobError(f"the header of {path} is damaged; fix: delete it, it is made again") from None
        body = -(-(len(start) + length) // PAGE) * PAGE
        if size != body + header["size"]:
            raise BlobError(f"{path} has {size} bytes, not {body + header['size']}; fix: delete it, it is made again")
        # By descriptor, so that it is the file whose header was read. Copy on write, and nothing ever writes.
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    return {name: _view(mapped, body, **place) for name, place in header["arrays"].items()}, header["about"]


def _view(mapped: Tensor, body: int, at: int, shape: list[int], dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=kind)
    return mapped[body + at : body + at + count * kind.itemsize].view(kind).view(shape)
