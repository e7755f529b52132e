"""cuSPARSE's sparse products through ctypes: every algorithm, prepared, as a call that CUDA graphs may capture."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from gossamer.spmm import Csr

CSR_ALGORITHMS = {"alg1": 4, "alg2": 6, "alg3": 12}
BLOCKED_ELL, BSR = 13, 14
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
INT32, ROW_ORDER, FLOAT = 2, 2, 0


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(s) for s in sizes]


class CusparseError(RuntimeError):
    """cuSPARSE refused; the number is its status."""


@cache
def _library() -> ctypes.CDLL:
    for name in ("libcusparse.so.12", "libcusparse.so.13", "libcusparse.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ImportError("libcusparse does not load; fix: import a CUDA build of torch first, or set LD_LIBRARY_PATH")


def _call(entry: str, *args: object) -> None:
    if status := getattr(_library(), entry)(*args):
        raise CusparseError(f"{entry}: status {status}")


@cache
def _handle() -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call("cusparseCreate", ctypes.byref(handle))
    return handle


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _csr(a: Csr, keep: list) -> ctypes.c_void_p:
    pointers = a.pointers.to(torch.int32)
    keep += [pointers, a.cols, a.values]
    made = ctypes.c_void_p()
    size = _sizes(a.shape[0], a.shape[1], a.nnz)
    arrays = _address(pointers), _address(a.cols), _address(a.values)
    _call("cusparseCreateCsr", ctypes.byref(made), *size, *arrays, INT32, INT32, 0, TYPES[a.dtype])
    return made


def _blocks(a: Csr, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block row and column of every block that holds an entry, and the blocks, dense."""
    wide = -(-a.shape[1] // size)
    keys, index = torch.unique(a.rows // size * wide + a.cols // size, return_inverse=True)
    blocks = torch.zeros(len(keys), size, size, dtype=a.dtype, device=a.device)
    blocks[index, a.rows % size, a.cols.long() % size] = a.values
    return keys // wide, keys % wide, blocks


def _bsr(a: Csr, size: int, keep: list) -> ctypes.c_void_p:
    rows, cols, blocks = _blocks(a, size)
    high, wide = -(-a.shape[0] // size), -(-a.shape[1] // size)
    pointers = torch.zeros(high + 1, dtype=torch.int32, device=a.device)
    pointers[1:] = torch.bincount(rows, minlength=high).cumsum(0)
    keep += [pointers, cols := cols.to(torch.int32), blocks]
    made = ctypes.c_void_p()
    shape = _sizes(high, wide, len(cols), size, size)
    arrays = _address(pointers), _address(cols), _address(blocks)
    _call("cusparseCreateBsr", ctypes.byref(made), *shape, *arrays, INT32, INT32, 0, TYPES[a.dtype], ROW_ORDER)
    return made


def _blocked_ell(a: Csr, size: int, keep: list) -> ctypes.c_void_p:
    rows, cols, blocks = _blocks(a, size)
    high = -(-a.shape[0] // size)
    counts = torch.bincount(rows, minlength=high)
    most = int(counts.max())
    place = torch.arange(len(rows), device=a.device) - (counts.cumsum(0) - counts)[rows]
    table = torch.full((high, most), -1, dtype=torch.int32, device=a.device)
    table[rows, place] = cols.to(torch.int32)
    values = torch.zeros(high, size, most, size, dtype=a.dtype, device=a.device)
    values[rows, :, place] = blocks
    keep += [table, values]
    made = ctypes.c_void_p()
    shape = _sizes(high * size, -(-a.shape[1] // size) * size, size, most * size)
    arrays = _address(table), _address(values)
    _call("cusparseCreateBlockedEll", ctypes.byref(made), *shape, *arrays, INT32, 0, TYPES[a.dtype])
    return made


def _dense(x: Tensor) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    size = _sizes(x.shape[0], x.shape[1], x.stride(0))
    _call("cusparseCreateDnMat", ctypes.byref(made), *size, _address(x), TYPES[x.dtype], ROW_ORDER)
    return made


def product(a: Csr, b: Tensor, algorithm: int, block: int = 16) -> tuple[Callable[[], None], Tensor]:
    """A call that computes C = A B and C, [M, N] (rows rounded up to blocks); float32 accumulation, prepared."""
    keep: list = [a, b]
    if algorithm == BSR:
        left = _bsr(a, block, keep)
    else:
        left = _blocked_ell(a, block, keep) if algorithm == BLOCKED_ELL else _csr(a, keep)
    rows = a.shape[0] if algorithm in CSR_ALGORITHMS.values() else -(-a.shape[0] // block) * block
    c = torch.zeros(rows, b.shape[1], dtype=b.dtype, device=b.device)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    keep += [c, one, zero]
    args = 0, 0, ctypes.byref(one), left, _dense(b), ctypes.byref(zero), _dense(c), FLOAT, algorithm
    size = ctypes.c_size_t()
    _call("cusparseSpMM_bufferSize", _handle(), *args, ctypes.byref(size))
    buffer = torch.empty(max(16, size.value), dtype=torch.uint8, device=b.device)
    keep.append(buffer)
    if algorithm in CSR_ALGORITHMS.values():
        _call("cusparseSpMM_preprocess", _handle(), *args, _address(buffer))

    def run(keep: list = keep) -> None:
        _call("cusparseSetStream", _handle(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        _call("cusparseSpMM", _handle(), *args, _address(buffer))

    return run, c
