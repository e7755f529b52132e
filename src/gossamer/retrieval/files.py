"""Embeddings and ids from NumPy's files, an embedding's as scipy.sparse.save_npz writes it; needs no scipy."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .rows import Rows, as_rows

# Of np.load, whose own words advise to allow pickles.
_DAMAGED = (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def read_rows(path: Path) -> Rows:
    """ValueError if the file holds no compressed rows."""
    fix = "write it by scipy.sparse.save_npz(path, matrix.tocsr())"
    try:
        with np.load(path, allow_pickle=False) as opened:
            file = dict(opened)
    except _DAMAGED:
        raise ValueError(f"{path} is no .npz file, or a damaged one: {fix}") from None
    missing = {"indptr", "indices", "data", "shape"} - set(file)
    if missing or bytes(np.asarray(file["format"]).item() if "format" in file else b"csr") != b"csr":
        raise ValueError(f"{path} holds no CSR matrix: {fix}")
    return as_rows((file["indptr"], file["indices"], file["data"]), int(file["shape"][1]))


def read_ids(path: Path) -> np.ndarray:
    """ValueError if the file holds no array."""
    try:
        found = np.load(path, allow_pickle=False)
    except _DAMAGED:
        found = None
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} is no .npy file, or a damaged one: write it by numpy.save(path, ids)")
    return found
