"""The CUDA driver, as far as `cuda.core` does not reach or costs too much, and how NVIDIA's libraries are found."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from . import native

NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not touched the GPU yet
STATIC_SHARED = 48 << 10  # bytes of shared memory that a block gets without asking
_STRUCT = {"T": "128s"}  # kinds of arguments that `struct` does not have


class LaunchError(RuntimeError):
    """The driver refused a kernel or the GPU is gone; the message says what to do."""


@cache
def present() -> bool:
    """Whether torch reaches an NVIDIA GPU: its build is for CUDA (not for ROCm), and there is a driver."""
    return torch.version.cuda is not None and torch.cuda.is_available()


@cache
def library() -> ctypes.CDLL:
    """The CUDA driver."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise LaunchError(f"the CUDA driver does not load: {error}; fix: install the NVIDIA driver") from error


def vendor_library(names: Sequence[str], parts: Sequence[str]) -> ctypes.CDLL | None:
    """A library of NVIDIA's by the first of its file names that loads; `parts`: folders of its wheels.

    torch, where it is a CUDA build, has it in memory already; its name suffices then.
    """
    sites = {Path(torch.__file__).parents[1], *(Path(p) for p in sys.path if p)}
    folders = [site / "nvidia" / part / "lib" for site in sorted(sites) for part in parts]
    for place in [*names, *(str(f / name) for f in folders for name in names if (f / name).exists())]:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


@cache
def launcher() -> Callable[..., int]:
    """(function, kinds, stream, shared, grid, block, *values) -> error. Costs less than cuda.core's way."""
    entry = library().cuLaunchKernel
    if native.available():
        return partial(native.require().cuda_launch, ctypes.cast(entry, ctypes.c_void_p).value)
    return partial(_launch, entry)


def _launch(
    entry: Any, function: int, kinds: str, stream: int, shared: int, grid: tuple, block: tuple, *values: float | bytes
) -> int:
    """What native/launch.h does, for an installation without native code."""
    packed = [struct.pack(_STRUCT.get(kind, kind), value) for kind, value in zip(kinds, values, strict=True)]
    buffers = [ctypes.create_string_buffer(p, len(p)) for p in packed]
    table = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
    numbers = map(ctypes.c_uint, (*grid, *block, shared))
    return entry(ctypes.c_void_p(function), *numbers, ctypes.c_void_p(stream), table, None)


def enter(device: int) -> None:
    """Make the context that torch uses on this device current in this thread."""
    from cuda.bindings import driver as cuda  # type: ignore[attr-defined]

    torch.cuda.init()
    checked(cuda.cuCtxSetCurrent(_context(device)), f"GPU {device}")


@cache
def _context(device: int) -> Any:
    from cuda.bindings import driver as cuda  # type: ignore[attr-defined]

    return checked(cuda.cuDevicePrimaryCtxRetain(device), f"GPU {device}")


def uncaptured(find: Callable[[int], int], device: int) -> int:
    """`find(device)`, allowed to load code while this thread captures a CUDA graph."""
    from cuda.bindings import driver as cuda  # type: ignore[attr-defined]

    relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(cuda.cuThreadExchangeStreamCaptureMode(relaxed), "capture")
    try:
        return find(device)
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(before)


def checked(result: tuple, what: object) -> Any:
    error, *values = result
    if error:
        raise LaunchError(f"{what}: {explain(int(error))}")
    return values[0] if values else None


def explain(error: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorString(error, ctypes.byref(text))
    said = f"CUDA error {error}, {(text.value or b'unknown').decode()}"
    if error in (1, 701):  # invalid value, too many resources requested
        return f"{said}; fix: the grid, block or shared memory asked for is more than this GPU has"
    lost = "the GPU is gone, or a kernel before this one has failed"
    return f"{said}; {lost}; fix: start a new process, with CUDA_LAUNCH_BLOCKING=1 to see which"


def load(binary: bytes, what: object) -> Any:
    """A binary given to the driver: it serves every device of its arch."""
    from cuda.bindings import driver as cuda  # type: ignore[attr-defined]

    return checked(cuda.cuLibraryLoadData(binary, [], [], 0, [], [], 0), what)


def function(library: Any, entry: str, kinds: str, shared: int, what: object) -> int:
    """The handle of an entry on the current device, whose parameters are `kinds`; `shared` bytes, at most, a launch."""
    from cuda.bindings import driver as cuda  # type: ignore[attr-defined]

    kernel = checked(cuda.cuLibraryGetKernel(library, entry.encode()), what)
    found = checked(cuda.cuKernelGetFunction(kernel), what)
    sizes, wanted = _parameters(found), [struct.calcsize(_STRUCT.get(kind, kind)) for kind in kinds]
    if sizes != wanted:
        raise LaunchError(f"{what!r} takes parameters of {sizes} bytes, its `args` say {wanted}; fix: `args`")
    if shared > STATIC_SHARED:
        most = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(cuda.cuFuncSetAttribute(found, most, shared), what)
    return int(found)


def _parameters(function: Any) -> list[int]:
    """Size in bytes of every parameter of a loaded function."""
    from cuda.bindings import driver as cuda  # type: ignore[attr-defined]

    sizes = []
    while True:
        error, _, size = cuda.cuFuncGetParamInfo(function, len(sizes))
        if error:
            return sizes
        sizes.append(int(size))
