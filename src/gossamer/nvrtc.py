"""CUDA C++ compiled at run time and launched on torch's current stream; the only importer of `cuda.core`.

A device source is a file in `gossamer/cuda`; its entries are `extern "C"`, specialised by macros alone. A `Function` is
one entry under one set of macros, and a module that has some lists them in `VARIANTS`, so that `variants()` finds all:

    SCALE = nvrtc.Function("scale.cuh", "scale", "PfqI", {"BYTES": 2})
    VARIANTS = (SCALE,)
    SCALE.launch((blocks, 1, 1), (128, 1, 1), x, 0.5, x.numel(), 7)

Compiled binaries lie under `cuda` in the cache folder; several processes may share it. A launch neither synchronises
nor allocates on the GPU, so CUDA graphs may capture it, even the first one of a function. Call it from inside an op:
torch.compile cannot trace it.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import threading
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import driver, machine
from .driver import LaunchError

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
OLDEST = (8, 0)
SOURCES = Path(__file__).parent / "cuda"
CACHE_BYTES = 256 << 20
EXTRA = "fix: pip install 'gossamer[cuda]'"
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
_DIGEST = hashlib.sha256().digest_size
_address = torch.Tensor.data_ptr
# What torch's own generated code calls; a build without CUDA lacks them.
_current_device = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)
_lock = threading.RLock()


class CompileError(RuntimeError):
    """A device source does not compile; the message is the compiler's log, with file and line."""


class Function:
    """One entry of a device source under one set of macros, compiled on first use for the GPU it is launched on.

    `args` has a `struct` character per parameter, pointers first: P pointer (a tensor; one without elements passes
    null), i and I int32 and uint32, q and Q int64 and uint64, f float, d double; and T for a tensor map, as bytes.
    `shared` is the most dynamic shared memory a launch will ask for, in bytes; above 48 KB the driver must be told.
    """

    def __init__(
        self, file: str, entry: str, args: str, macros: Mapping[str, int | str] | None = None, shared: int = 0
    ) -> None:
        self.file, self.entry, self.args, self.shared = file, entry, args, shared
        self._pointers = args.rfind("P") + 1
        if args[: self._pointers].strip("P"):
            raise ValueError(f"{file}:{entry}: `args` is {args!r}, pointers must come first")
        self.macros = tuple(sorted((name, str(value)) for name, value in (macros or {}).items()))
        self._handles: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"{self.file}:{self.entry}[{', '.join('='.join(m) for m in self.macros)}]"

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *args: torch.Tensor | float | bytes,
        shared: int = 0,
    ) -> None:
        """Run on the device of the first argument, a tensor, and on torch's current stream there.

        A tensor passes its address; `shared` is dynamic shared memory in bytes. Shapes, dtypes and devices are the
        caller's business. Raises ImportError (no `cuda.core`), CompileError, LaunchError.
        """
        values = *map(_address, args[: self._pointers]), *args[self._pointers :]  # type: ignore[arg-type]
        self.start(args[0].get_device(), grid, block, shared, values)  # type: ignore[union-attr]

    def start(
        self,
        device: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        values: tuple[float | bytes, ...],
    ) -> None:
        """`launch` for one that knows the device, and of the tensors, all there, the addresses."""
        handle = self._handles.get(device) or self._load(device)
        if device != _current_device():
            with torch.cuda.device(device):
                return self.start(device, grid, block, shared, values)
        stream, launch = _current_stream(device), driver.launcher()
        error = launch(handle, self.args, stream, shared, grid, block, *values)
        if error == driver.NO_CONTEXT:
            driver.enter(device)
            error = launch(handle, self.args, stream, shared, grid, block, *values)
        if error:
            raise LaunchError(f"{self!r}: grid {grid}, block {block}, {shared} bytes shared: {driver.explain(error)}")

    def _load(self, device: int) -> int:
        """The driver's handle of this function on one device."""
        if device < 0:
            raise LaunchError(f"{self!r} needs a tensor on a GPU as its first argument; fix: move it there")
        with _lock, torch.cuda.device(device):
            if device not in self._handles:
                driver.enter(device)
                self._handles[device] = driver.uncaptured(self._find, device)
            return self._handles[device]

    def _find(self, device: int) -> int:
        library = _library(self.file, self.macros, arch(device))
        return driver.function(library, self.entry, self.args, self.shared, self)


@cache
def null(device: torch.device) -> torch.Tensor:
    """A tensor without elements, which passes a null pointer."""
    return torch.empty(0, device=device)


def refusal(device: torch.device) -> str | None:
    """Why kernels of ours cannot run on this device (it completes "it needs ..."), or None if they can."""
    if device.type != "cuda" or not driver.present():
        return "an NVIDIA GPU"
    return _refusal(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _refusal(index: int) -> str | None:
    if torch.cuda.get_device_capability(index) < OLDEST:
        return "a GPU of compute capability 8.0 (Ampere) or later"
    try:
        _core()
        driver.library()
    except (ImportError, LaunchError) as error:
        return f"a working CUDA compiler: {error}"
    return None


@cache
def arch(device: int) -> str:
    """The compiler's name of a GPU: sm_90a, sm_100a, else sm_XX. LaunchError below sm_80."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        raise LaunchError(
            f"GPU {device} is sm_{major}{minor}, kernels of ours need sm_80 (Ampere) or later; "
            "fix: use another GPU, or ask for no kernel by name and the reference kernel runs"
        )
    return f"sm_{major}{minor}" + ("a" if major in (9, 10) else "")


def read(file: str) -> str:
    """A device source with every `#include "x.cuh"` of ours in place, once each; log lines name the original files."""
    return _inlined(file, set())


def _inlined(file: str, seen: set[str]) -> str:
    seen.add(file)
    parts, line = [f'#line 1 "{file}"\n'], 1
    for piece, included in _pieces((SOURCES / file).read_text()):
        parts.append(piece)
        line += piece.count("\n")
        if included is not None:
            parts.append("" if included in seen else _inlined(included, seen))
            parts.append(f'#line {line + 1} "{file}"')
    return "".join(parts)


def _pieces(text: str) -> Iterable[tuple[str, str | None]]:
    found = _INCLUDE.split(text)
    return zip(found[::2], [*found[1::2], None], strict=True)


def compile(file: str, macros: Mapping[str, int | str], arch: str) -> bytes:
    """The binary of a device source under `macros` for one arch, from the disk cache if it is there.

    Needs no GPU. Raises CompileError with the compiler's log, ImportError if `cuda.core` or NVRTC is missing.
    """
    core = _core()
    source = read(file)
    defines = [(name, str(value)) for name, value in sorted(macros.items())]
    options = core.ProgramOptions(name=Path(file).name, arch=arch, define_macro=defines or None)
    key = core.make_program_cache_key(code=source, code_type="c++", options=options, target_type="cubin")
    if (binary := _recall(key)) is not None:
        return binary
    binary = _compiled(core, source, options)
    _remember(key, binary)
    return binary


def _compiled(core: Any, source: str, options: Any) -> bytes:
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        return bytes(core.Program(source, "c++", options=options).compile("cubin").code)
    except DynamicLibNotFoundError as error:
        raise ImportError(f"NVRTC, CUDA's run-time compiler, does not load: {error}; {EXTRA}") from error
    except Exception as error:  # cuda.core's errors have no public class
        log = str(error).strip("\0\n ")
        if "gpu-architecture" in log:
            log = "this NVRTC is too old to know it; fix: pip install -U nvidia-cuda-nvrtc"
        raise CompileError(f"{options.name} for {options.arch}: {log}") from error


def compile_all(functions: Iterable[Function], archs: Iterable[str] = ARCHS) -> int:
    """Compile every source that `functions` need for every arch, without a GPU; how many binaries that made."""
    jobs = {(f.file, f.macros, arch) for f in functions for arch in archs}
    for file, macros, arch in sorted(jobs):
        compile(file, dict(macros), arch)
    return len(jobs)


def variants() -> list[Function]:
    """Every function of Gossamer: the `VARIANTS` of the modules `cuda_*` here and in the folders of kernels."""
    found = []
    for package in ("gossamer", "gossamer.kernels", "gossamer.spmm.kernels"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name.startswith("cuda_"):
                found += importlib.import_module(f"{package}.{module.name}").VARIANTS
    return found


def cache_folder() -> Path:
    """Where compiled binaries lie."""
    return machine.cache_folder() / "cuda"


def _recall(key: bytes) -> bytes | None:
    try:
        entry = _disk(cache_folder()).get(key) or b""
    except OSError as error:
        return _warn_once(str(cache_folder()), str(error))
    # A damaged entry is as good as none: the new binary replaces it.
    return entry[_DIGEST:] if hashlib.sha256(entry[_DIGEST:]).digest() == entry[:_DIGEST] else None


def _remember(key: bytes, binary: bytes) -> None:
    try:
        _disk(cache_folder())[key] = hashlib.sha256(binary).digest() + binary
    except OSError as error:
        _warn_once(str(cache_folder()), str(error))


@cache
def _disk(folder: Path) -> Any:
    return _core().FileStreamProgramCache(folder, max_size_bytes=CACHE_BYTES)


@cache
def _warn_once(folder: str, why: str) -> None:
    text = f"compiled GPU kernels cannot be kept in {folder}: {why}; every process compiles them again"
    warnings.warn(f"{text}; fix: make it writable, or set GOSSAMER_CACHE to a folder that is", stacklevel=2)


class _Core(NamedTuple):
    """What this file uses of cuda.core."""

    Program: Any
    ProgramOptions: Any
    FileStreamProgramCache: Any
    make_program_cache_key: Any


@cache
def _core() -> _Core:
    try:
        from cuda.core import Program, ProgramOptions  # type: ignore[attr-defined]
        from cuda.core.utils import FileStreamProgramCache, make_program_cache_key
    except ImportError as error:
        raise ImportError(f"GPU kernels need cuda-core >= 1.0 and NVRTC: {error}; {EXTRA}") from error
    return _Core(Program, ProgramOptions, FileStreamProgramCache, make_program_cache_key)


@cache
def _library(file: str, macros: tuple[tuple[str, str], ...], arch: str) -> Any:
    """A binary given to the driver, once per process: it serves every device of this arch."""
    return driver.load(compile(file, dict(macros), arch), file)
