"""cuSPARSE's product of a sparse and a dense matrix through ctypes: every algorithm, descriptors and workspaces kept.

torch chooses the algorithm by itself, and a product costs it several allocations. The library is the one that torch
brings. Call it from inside an op: torch.compile cannot trace it.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import driver

NAMES = ("libcusparse.so.12", "libcusparse.so.13", "cusparse64_12.dll")
ALG1, ALG2, ALG3, BLOCKED_ELL, BSR = 4, 6, 12, 13, 14  # cusparseSpMMAlg_t; rows of a CSR matrix in three ways
CSR = (ALG1, ALG2, ALG3)
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
INT32, ROW_ORDER, FLOAT = 2, 2, 0
FIX = "fix: import a CUDA build of torch, which brings it, or pip install nvidia-cusparse"
_lock = threading.Lock()  # a handle has one stream, a plan one B


class CusparseError(RuntimeError):
    """cuSPARSE is missing or refused a product; the message says what to do."""


@cache
def library() -> ctypes.CDLL:
    """CusparseError if it does not load."""
    if found := driver.vendor_library(NAMES, ["cu13", "cusparse"]):
        return found
    raise CusparseError(f"cuSPARSE does not load; {FIX}")


def refusal(device: torch.device) -> str | None:
    """Why there is no cuSPARSE on this device (it completes "it needs ..."), or None if there is."""
    if device.type != "cuda" or not driver.present():
        return "an NVIDIA GPU"
    return _refusal()


@cache
def _refusal() -> str | None:
    try:
        library()
    except CusparseError as error:
        return str(error)
    return None


def call(entry: str, *args: object) -> None:
    """CusparseError with the library's status unless it is 0."""
    if status := getattr(library(), entry)(*args):
        raise CusparseError(f"{entry}: status {status}; fix: choose another kernel for this matrix")


@cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        call("cusparseCreate", ctypes.byref(handle))
    return handle


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(s) for s in numbers]


class Sparse:
    """A sparse matrix as cuSPARSE knows it: a descriptor, and the tensors it points at. `shape` as it multiplies."""

    def __init__(self, create: str, shape: tuple[int, int], tensors: tuple[Tensor, ...], *args: object) -> None:
        self.shape, self.tensors, self.handle = shape, tensors, ctypes.c_void_p()
        call(create, ctypes.byref(self.handle), *args)

    def __del__(self) -> None:
        if self.handle:
            library().cusparseDestroySpMat(self.handle)


def csr(shape: tuple[int, int], pointers: Tensor, cols: Tensor, values: Tensor) -> Sparse:
    """`pointers`, `cols` int32."""
    arrays = address(pointers), address(cols), address(values)
    args = *sizes(*shape, len(values)), *arrays, INT32, INT32, 0, TYPES[values.dtype]
    return Sparse("cusparseCreateCsr", shape, (pointers, cols, values), *args)


def blocked_ell(columns: int, table: Tensor, values: Tensor) -> Sparse:
    """`table` int32 [H, most]: columns of blocks, -1 for none; `values` [H, size, most, size]; of so many columns."""
    high, size, most, _ = values.shape
    arrays = address(table), address(values)
    args = *sizes(high * size, columns, size, most * size), *arrays, INT32, 0, TYPES[values.dtype]
    return Sparse("cusparseCreateBlockedEll", (high * size, columns), (table, values), *args)


class Plan:
    """C = A B by one algorithm for B like `b` (a [K, N] with rows end to end), prepared; float32 accumulation.

    CusparseError while a CUDA graph is captured, where cuSPARSE cannot prepare.
    """

    def __init__(self, a: Sparse, b: Tensor, algorithm: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise CusparseError(f"no plan for {b.shape[1]} columns yet; fix: make one such product before capturing it")
        self.a, self.algorithm, self._parts = a, algorithm, (ctypes.c_float(1), ctypes.c_float(0))
        self._b, self._c = Dense(b), Dense(b.new_empty(a.shape[0], b.shape[1]))
        size = ctypes.c_size_t()
        call("cusparseSpMM_bufferSize", _handle(b.get_device()), *self._args(), ctypes.byref(size))
        self._room = torch.empty(max(16, size.value), dtype=torch.uint8, device=b.device)
        if algorithm in CSR:
            with _lock, torch.cuda.device(b.device):
                handle = _on_stream(b)
                call("cusparseSpMM_preprocess", handle, *self._args(), address(self._room))

    def _args(self) -> tuple[Any, ...]:
        one, zero = map(ctypes.byref, self._parts)
        return 0, 0, one, self.a.handle, self._b.handle, zero, self._c.handle, FLOAT, self.algorithm

    def run(self, b: Tensor, c: Tensor) -> None:
        """Fills C [M, N], contiguous; B as the plan was made for."""
        with _lock, torch.cuda.device(b.device):
            handle = _on_stream(b)
            call("cusparseDnMatSetValues", self._b.handle, address(b))
            call("cusparseDnMatSetValues", self._c.handle, address(c))
            call("cusparseSpMM", handle, *self._args(), address(self._room))


class Dense:
    """A dense matrix, row after row, as cuSPARSE knows it."""

    def __init__(self, x: Tensor) -> None:
        self.handle = ctypes.c_void_p()
        args = *sizes(*x.shape, max(x.stride(0), x.shape[1])), address(x), TYPES[x.dtype], ROW_ORDER
        call("cusparseCreateDnMat", ctypes.byref(self.handle), *args)

    def __del__(self) -> None:
        if self.handle:
            library().cusparseDestroyDnMat(self.handle)


def _on_stream(x: Tensor) -> ctypes.c_void_p:
    """The handle of x's device, on torch's current stream there."""
    handle = _handle(x.get_device())
    call("cusparseSetStream", handle, ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream))
    return handle
