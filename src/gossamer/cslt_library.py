"""The library of cuSPARSELt as it is loaded: its functions, its handles, its errors. What it computes is cslt.py's.

It is the one that torch brings (`nvidia-cusparselt`), 0.8 or later.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from typing import Any

import torch

from . import driver

OLDEST = (0, 8)  # its structures have 512 bytes
NAME = "cusparseLt.dll" if os.name == "nt" else "libcusparseLt.so.0"
FIX = "fix: pip install nvidia-cusparselt-cu13 (torch's CUDA wheels bring it)"


class CsltError(RuntimeError):
    """cuSPARSELt is missing or refused a product; the message says what to do."""


class Struct:
    """512 opaque bytes, 16-byte aligned, that the library fills."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(512 + 16)
        self.at = (ctypes.addressof(self.memory) + 15) // 16 * 16

    def fill(self, init: str, destroy: str, handle: int, *args: Any) -> None:
        """Calls `cusparseLt<init>`; what that made is given back by `cusparseLt<destroy>` together with this object."""
        call(init, handle, self.at, *args)
        freed = weakref.finalize(self, _give_back, destroy, self.memory, self.at)
        freed.atexit = False  # a process that ends gives back everything


def _give_back(destroy: str, memory: Any, at: int) -> None:
    """`memory`, where the structure is, lives until then."""
    getattr(library(), f"cusparseLt{destroy}")(at)


@cache
def library() -> ctypes.CDLL:
    """The library, with the arguments of its functions declared. CsltError if it does not load or is too old."""
    found = _load()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, list[Any]] = {
        "GetVersion": [pointer, pointer],
        "Init": [pointer],
        "DenseDescriptorInit": [pointer, pointer, number, number, number, ctypes.c_uint32, ctypes.c_int, ctypes.c_int],
        "MatmulDescriptorInit": [pointer, pointer, ctypes.c_int, ctypes.c_int, *[pointer] * 4, ctypes.c_int],
        "MatmulDescSetAttribute": [pointer, pointer, ctypes.c_int, pointer, ctypes.c_size_t],
        "MatmulAlgSelectionInit": [pointer, pointer, pointer, ctypes.c_int],
        "MatmulAlgSetAttribute": [pointer, pointer, ctypes.c_int, pointer, ctypes.c_size_t],
        "MatmulAlgGetAttribute": [pointer, pointer, ctypes.c_int, pointer, ctypes.c_size_t],
        "MatmulGetWorkspace": [pointer, pointer, pointer],
        "MatmulPlanInit": [pointer] * 4,
        "MatmulPlanDestroy": [pointer],
        "MatmulAlgSelectionDestroy": [pointer],
        "MatDescriptorDestroy": [pointer],
        "Matmul": [*[pointer] * 10, ctypes.c_int32],
        "SpMMACompressedSize2": [pointer] * 4,
        "SpMMACompress2": [pointer, pointer, ctypes.c_int, ctypes.c_int, *[pointer] * 4],
    }
    signatures["StructuredDescriptorInit"] = [*signatures["DenseDescriptorInit"], ctypes.c_int]
    for name, arguments in signatures.items():
        getattr(found, f"cusparseLt{name}").argtypes = arguments
    found.cusparseLtGetErrorString.restype = ctypes.c_char_p
    if (said := _version(found)) < OLDEST:
        raise CsltError(f"cuSPARSELt is {said[0]}.{said[1]}, at least 0.8 is needed; {FIX}")
    return found


def version() -> tuple[int, int]:
    """Major and minor. CsltError if the library does not load."""
    return _version(library())


def _version(found: ctypes.CDLL) -> tuple[int, int]:
    numbers = (ctypes.c_int * 2)()
    for i in range(2):
        found.cusparseLtGetProperty(i, ctypes.byref(numbers, 4 * i))
    return numbers[0], numbers[1]


def _load() -> ctypes.CDLL:
    if found := driver.vendor_library([NAME], ["cusparselt", "cu13", "cu12"]):
        return found
    raise CsltError(f"cuSPARSELt ({NAME}) does not load; {FIX}")


def refusal(device: torch.device) -> str | None:
    """Why there is no cuSPARSELt on this device (it completes "it needs ..."), or None if there is."""
    if device.type != "cuda" or not driver.present():
        return "an NVIDIA GPU"
    return _refusal(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _refusal(index: int) -> str | None:
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "a GPU of compute capability 8.0 (Ampere) or later, with sparse tensor cores"
    try:
        handle(index)
    except CsltError as error:
        return f"a working cuSPARSELt: {error}"
    return None


@cache
def handle(index: int) -> int:
    """The library's handle of one GPU: an address, for good."""
    found = Struct()
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # so that the device's context is there and current
        check(library().cusparseLtInit(found.at), "cusparseLtInit")
    _kept.append(found)
    return found.at


_kept: list[Struct] = []  # what addresses were given out of


def check(status: int, what: str) -> None:
    if status:
        said = (library().cusparseLtGetErrorString(status) or b"unknown").decode()
        raise CsltError(f"{what}: error {status}, {said}; fix: run it dense, or update nvidia-cusparselt")


def call(name: str, *args: Any) -> None:
    if status := getattr(library(), f"cusparseLt{name}")(*args):
        check(status, f"cusparseLt{name}")
