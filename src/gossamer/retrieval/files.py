"""Embeddings from a .npz file as scipy.sparse.save_npz writes it; needs no scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .rows import Rows, as_rows


def read_rows(path: Path) -> Rows:
    """ValueError if the file holds no compressed rows."""
    with np.load(path, allow_pickle=False) as file:
        missing = {"indptr", "indices", "data", "shape"} - set(file)
        if missing or bytes(np.asarray(file["format"]).item() if "format" in file else b"csr") != b"csr":
            raise ValueError(f"{path} holds no CSR matrix: write it by scipy.sparse.save_npz(path, matrix.tocsr())")
        return as_rows((file["indptr"], file["indices"], file["data"]), int(file["shape"][1]))
