"""Matrix Market files, the text format that sparse matrices are exchanged in."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from ..formats import FormatError
from .csr import Csr

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FIELDS = ("real", "integer", "pattern")
SYMMETRIES = ("general", "symmetric", "skew-symmetric")


def read(path: str | Path) -> Csr:
    """A coordinate file, plain or .gz, .bz2, .xz; a pattern gets ones, the other half of a symmetric one is filled in.

    float32 values; for float64 ones pass what scipy.io.mmread gives. FormatError names the entry that is wrong.
    """
    lines = _unpacked(path)
    field, symmetry, lines = _header(lines, path)
    shape, body = _size(lines, path)
    rows, cols, values = _entries(body, shape, field, path)
    if symmetry != "general":
        rows, cols, values = _mirrored(rows, cols, values, -1.0 if symmetry == "skew-symmetric" else 1.0)
    kept = torch.from_numpy(values.astype(np.float32))
    index = torch.from_numpy(np.stack([rows, cols]))
    return Csr.of(torch.sparse_coo_tensor(index, kept, shape[:2], check_invariants=False))


def _unpacked(path: str | Path) -> bytes:
    opener = OPENERS.get(Path(path).suffix, open)
    try:
        with opener(path, "rb") as file:
            return file.read()
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise _wrong(path, f"it does not unpack: {error}") from error


def _wrong(path: str | Path, what: str) -> FormatError:
    return FormatError(f"{path}: {what}; fix: write it again, with scipy.io.mmwrite for one")


def _header(text: bytes, path: str | Path) -> tuple[str, str, bytes]:
    first, _, rest = text.partition(b"\n")
    words = first.decode("latin-1").lower().split()
    if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"]:
        raise _wrong(path, "the first line is not '%%MatrixMarket matrix coordinate FIELD SYMMETRY'")
    if words[2] != "coordinate" or words[3] not in FIELDS or words[4] not in SYMMETRIES:
        kinds = f"coordinate, {' | '.join(FIELDS)}, {' | '.join(SYMMETRIES)}"
        raise _wrong(path, f"'{' '.join(words[2:])}' is not read, only {kinds}")
    return words[3], words[4], rest


def _size(text: bytes, path: str | Path) -> tuple[tuple[int, int, int], bytes]:
    while True:
        line, _, text = text.partition(b"\n")
        if line.strip() and not line.lstrip().startswith(b"%"):
            break
        if not text:
            raise _wrong(path, "it ends before the line of sizes")
    try:
        rows, cols, entries = map(int, line.split())
    except ValueError:
        raise _wrong(path, f"the line of sizes is {line[:80]!r}, not 'ROWS COLUMNS ENTRIES'") from None
    if min(rows, cols, entries) < 0:
        raise _wrong(path, f"a size is negative in {line[:80]!r}")
    return (rows, cols, entries), text


def _entries(
    text: bytes, shape: tuple[int, int, int], field: str, path: str | Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns from 0, values in float64."""
    width = 2 if field == "pattern" else 3
    try:
        table = np.loadtxt(BytesIO(text), comments="%", ndmin=2) if text.strip() else np.empty((0, width))
    except ValueError as error:
        raise _wrong(path, f"an entry is not {width} numbers: {error}") from None
    if len(table) != shape[2] or (len(table) and table.shape[1] != width):
        found = f"{len(table)} lines of {table.shape[1]} numbers"
        raise _wrong(path, f"the header promises {shape[2]} entries of {width} numbers, there are {found}")
    index = table[:, :2].astype(np.int64)
    for axis, name in enumerate(("row", "column")):
        outside = (index[:, axis] < 1) | (index[:, axis] > shape[axis]) | (index[:, axis] != table[:, axis])
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise _wrong(path, f"entry {at + 1} has {name} {table[at, axis]:g}, outside 1 to {shape[axis]}")
    values = np.ones(len(table)) if field == "pattern" else table[:, 2]
    return index[:, 0] - 1, index[:, 1] - 1, values


def _mirrored(
    rows: np.ndarray, cols: np.ndarray, values: np.ndarray, sign: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    off = rows != cols
    return (
        np.concatenate([rows, cols[off]]),
        np.concatenate([cols, rows[off]]),
        np.concatenate([values, sign * values[off]]),
    )
