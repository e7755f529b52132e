"""cuBLASLt asked for all that its heuristic proposes, not for the first alone, which is what torch takes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gossamer import driver

NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
MOST = 16  # proposals
WORKSPACE = 32 << 20  # bytes, what torch gives it on Hopper
# Enumerators of cublasLt.h and library_types.h.
FLOAT_SUMS, FLOAT32, BFLOAT16 = 68, 0, 14
TRANSPOSE_A, MAX_WORKSPACE, TRANSPOSED = 3, 1, 1


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasLtError(RuntimeError):
    """cuBLASLt is missing or refused a product."""


@cache
def library() -> ctypes.CDLL:
    found = driver.vendor_library(NAMES, ["cu13", "cublas"])
    if found is None:
        raise CublasLtError("cuBLASLt does not load; fix: a CUDA build of torch brings it")
    return found


def call(name: str, *args: Any) -> None:
    if status := getattr(library(), f"cublasLt{name}")(*args):
        raise CublasLtError(f"cublasLt{name}: status {status}")


def made(name: str, *args: Any) -> ctypes.c_void_p:
    """What `cublasLt<name>` makes; it lives as long as the process."""
    found = ctypes.c_void_p()
    call(name, ctypes.byref(found), *args)
    return found


@cache
def handle() -> ctypes.c_void_p:
    torch.cuda.current_stream().synchronize()  # so that the device's context is there
    return made("Create")


@cache
def workspace() -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")


def _set(name: str, thing: ctypes.c_void_p, attribute: int, value: Any) -> None:
    call(name, thing, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


class Product:
    """y [n, m] = x [n, k] W^T, W [m, k], in bfloat16: the ways that cuBLASLt proposes, the likeliest first."""

    def __init__(self, m: int, n: int, k: int) -> None:
        self._product = made("MatmulDescCreate", FLOAT_SUMS, FLOAT32)
        _set("MatmulDescSetAttribute", self._product, TRANSPOSE_A, ctypes.c_int(TRANSPOSED))
        size = ctypes.c_uint64
        sizes = ((k, m), (k, n), (m, n))  # of columns that follow each other
        self._w, self._x, self._y = (
            made("MatrixLayoutCreate", BFLOAT16, size(rows), size(columns), ctypes.c_int64(rows))
            for rows, columns in sizes
        )
        wanted = made("MatmulPreferenceCreate")
        _set("MatmulPreferenceSetAttribute", wanted, MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE))
        found, count = (Proposal * MOST)(), ctypes.c_int()
        operands = self._w, self._x, self._y, self._y
        call("MatmulAlgoGetHeuristic", handle(), self._product, *operands, wanted, MOST, found, ctypes.byref(count))
        self.proposals = [p for p in found[: count.value] if p.status == 0]
        self._numbers = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def run(self, proposal: Proposal, x: Tensor, w: Tensor, y: Tensor) -> None:
        """On torch's current stream; all three contiguous."""
        alpha, beta = map(ctypes.byref, self._numbers)
        places = [ctypes.c_void_p(t.data_ptr()) for t in (w, x, y)]
        space = ctypes.c_void_p(workspace().data_ptr()), ctypes.c_size_t(WORKSPACE)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        operands = places[0], self._w, places[1], self._x, beta, places[2], self._y, places[2], self._y
        call("Matmul", handle(), self._product, alpha, *operands, ctypes.byref(proposal.algorithm), *space, stream)

    def calls(self, x: Tensor, weights: Sequence[Tensor], y: Tensor) -> dict[str, list[partial[None]]]:
        """Of each proposal that gives the right product, by name, a call for every weight."""
        expected = x @ weights[0].t()
        found = {}
        for number, proposal in enumerate(self.proposals):
            y.fill_(torch.nan)
            try:
                self.run(proposal, x, weights[0], y)
            except CublasLtError:
                continue
            if float((y - expected).float().norm()) < 1e-2 * float(expected.float().norm()):
                found[f"cublaslt, proposal {number}"] = [partial(self.run, proposal, x, w, y) for w in weights]
        return found


@cache
def product(m: int, n: int, k: int) -> Product:
    return Product(m, n, k)
