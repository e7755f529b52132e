"""The index file: a header, blocks of 64-byte aligned bytes, and JSON that describes them.

    magic 8 | version u32 | 0 u32 | bytes of: file u64, JSON's place u64, JSON u64 | checksum of: JSON u64, header u64

The JSON lists each block's offset, bytes and checksum, and holds what else the index knows. A file is written beside
its place and moved there whole, so that readers of the old one keep theirs and never see half of the new.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .native import aligned, require

MAGIC, VERSION = b"GOSSIDX\n", 3  # 2: groups, short ids; 3: short rows, packed ids
_HEADER = struct.Struct("<8sIIQQQQ")
_PIECE = 1 << 24


class IndexFileError(ValueError):
    """The file is not an index, is damaged, or is of a newer version."""


def checksum(block: np.ndarray, threads: int = 1) -> int:
    return require().checksum(block.ctypes.data, block.nbytes, threads)


class Writer:
    """Writes the next version of `path`; `commit` puts it in place, leaving without it removes what was written.

    BlockingIOError if another process is writing the same index.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path, self.threads = path, threads
        self.hidden = path.with_name(f".{path.name}.writing")
        self.blocks: list[dict[str, int]] = []
        self.at = 0

    def __enter__(self) -> Writer:
        self.file = _locked(self.hidden)
        try:
            os.ftruncate(self.file, 0)
            self._put(b"\0" * 64)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file >= 0:
            self._abandon()

    def add(self, block: np.ndarray) -> int:
        """Appends bytes; returns the number by which `read` gives them back."""
        self._put(b"\0" * (-self.at % 64))
        self.blocks.append({"offset": self.at, "bytes": block.nbytes, "checksum": checksum(block, self.threads)})
        self._put(block.data)
        return len(self.blocks) - 1

    def commit(self, meta: dict[str, Any]) -> int:
        """Puts the file in its place; returns its checksum, which no other version of it shares."""
        text = json.dumps(meta | {"blocks": self.blocks, "salt": os.urandom(8).hex()}).encode()
        offset = self.at
        self._put(text)
        sums = checksum(np.frombuffer(text, np.uint8))
        header = _HEADER.pack(MAGIC, VERSION, 0, self.at, offset, len(text), sums)
        header += struct.pack("<Q", checksum(np.frombuffer(header, np.uint8)))
        with _disk_full(self.path):
            os.pwrite(self.file, header, 0)
            os.fsync(self.file)
        os.replace(self.hidden, self.path)
        _sync_folder(self.path.parent)
        os.close(self.file)
        self.file = -1
        return sums

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        with _disk_full(self.path):
            while view:
                written = os.write(self.file, view[:_PIECE])
                self.at += written
                view = view[written:]

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.hidden)
        os.close(self.file)
        self.file = -1


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have moved it into place meanwhile: then this is the index itself.
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"another process is writing {path.parent}: wait for it, or save elsewhere"
            ) from None
        except FileNotFoundError:
            pass
        os.close(file)


@contextlib.contextmanager
def _disk_full(path: Path) -> Any:
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fix = f"no room to write {path}; what was there before is untouched: free some space or save elsewhere"
        raise OSError(e.errno, f"{os.strerror(e.errno or 0)}: {fix}") from None


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def identity(path: Path) -> int | None:
    """The checksum of the version at `path`, None if there is none. IndexFileError if it is no index."""
    try:
        with open(path, "rb") as file:
            return _header(path, file.read(64), os.fstat(file.fileno()).st_size)[2]
    except FileNotFoundError:
        return None


def read(path: Path, load: bool, verify: bool, threads: int) -> tuple[dict[str, Any], list[np.ndarray], int]:
    """(what `commit` was given, the blocks, the checksum) of the file at `path`; IndexFileError if it is damaged.

    load: into memory, with huge pages, instead of a read-only map. verify: compare the checksum of every block.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset, length, sums = _header(path, file.read(64), size)
        if load:
            memory = aligned(size)
            file.seek(0)
            if file.readinto(memory.data) != size:
                raise IndexFileError(f"{path} was cut short while it was read: open it again")
        else:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_WILLNEED)
            memory = np.frombuffer(mapped, np.uint8)
    text = memory[offset : offset + length]
    if checksum(text) != sums:
        raise _damaged(path, "description")
    meta = json.loads(text.tobytes())
    blocks = [memory[b["offset"] : b["offset"] + b["bytes"]] for b in meta["blocks"]]
    for number, (block, known) in enumerate(zip(blocks, meta["blocks"], strict=True)):
        if block.nbytes != known["bytes"] or (verify and checksum(block, threads) != known["checksum"]):
            raise _damaged(path, f"block {number}")
    return meta, blocks, sums


def _header(path: Path, raw: bytes, size: int) -> tuple[int, int, int]:
    if len(raw) < _HEADER.size + 8 or raw[:8] != MAGIC:
        raise IndexFileError(f"{path} is not a Gossamer index: give the path that SparseIndex.save wrote")
    _, version, _, total, offset, length, sums = _HEADER.unpack_from(raw)
    if version > VERSION:
        raise IndexFileError(f"{path} is of version {version}, this Gossamer reads up to {VERSION}: upgrade gossamer")
    if checksum(np.frombuffer(raw[: _HEADER.size], np.uint8)) != struct.unpack_from("<Q", raw, _HEADER.size)[0]:
        raise _damaged(path, "header")
    if size != total or offset + length > total:
        raise IndexFileError(f"{path} is truncated: {size} bytes of {total}: restore it or build it again")
    return offset, length, sums


def _damaged(path: Path, what: str) -> IndexFileError:
    return IndexFileError(f"{path} is damaged (checksum of the {what}): restore it from a copy or build it again")
