"""What is installed, what can run on this machine, and how to mend what cannot."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from gossamer import cslt, machine, native, nvrtc

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
LEAST_FREE_DISK = 5 << 30
# distribution -> (what it is for, what to install)
OPTIONAL = {
    "transformers": ("Hugging Face models", "transformers accelerate"),
    "accelerate": ("models larger than memory", "accelerate"),
    "gguf": ("GGUF files", "gguf"),
    "lm-eval": ("benchmark tasks", "lm-eval"),
    "cuda-core": ("compiling GPU kernels", "cuda-core cuda-bindings nvidia-cuda-nvrtc"),
}


@dataclass(frozen=True)
class Check:
    """One line of the report; `fix` is a command or an instruction, empty when `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def report() -> list[Check]:
    """Every check, in reading order: needed software, hardware, optional software."""
    return [
        _python(),
        _torch(),
        _safetensors(),
        _core(),
        _cpu(),
        _memory(),
        _disk(),
        _cache(),
        *_gpus(),
        *(_optional(name, *why) for name, why in OPTIONAL.items()),
    ]


def _check(name: str, ok: bool, detail: str, fix: str) -> Check:
    return Check(name, ok, detail, "" if ok else fix)


def _python() -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return _check("Python", sys.version_info >= OLDEST_PYTHON, platform.python_version(), f"install Python >= {oldest}")


def _torch() -> Check:
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    oldest = ".".join(map(str, OLDEST_TORCH))
    return _check("torch", installed >= OLDEST_TORCH, str(torch.__version__), f"pip install 'torch>={oldest}'")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _safetensors() -> Check:
    version = _version("safetensors")
    return _check("safetensors", version is not None, version or "not installed", "pip install safetensors")


def _core() -> Check:
    try:
        detail = f"{native.isa()} (this CPU runs {', '.join(native.isas())})"
    except ImportError as error:
        return Check("native core", False, str(error), "pip install . (in the repository; needs g++ >= 11)")
    except ValueError as error:
        return Check("native core", False, str(error), "unset GOSSAMER_ISA")
    return Check("native core", True, detail)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    """Cores this process may use, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> Check:
    return Check("CPU", True, f"{_cpu_name()}, {_cores()} cores, {torch.get_num_threads()} torch threads")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("memory", True, f"{total / 2**30:.1f} GiB")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    fix = f"free some space, or work on another disk than {Path.cwd()}"
    return _check("free disk", free >= LEAST_FREE_DISK, f"{free / 2**30:.1f} GiB in {Path.cwd()}", fix)


def _cache() -> Check:
    """Where lock files with timings lie, and compiled kernels."""
    folder = machine.cache_folder()
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    locks = len(list((folder / "locks").glob("*.json")))
    known = f"{folder}, {locks} lock files with timings"
    fix = "make it writable, or set GOSSAMER_CACHE to a folder that is; else every process times kernels anew"
    return _check("cache", os.access(there, os.W_OK), known, fix)


def _gpus() -> list[Check]:
    if not torch.cuda.is_available():
        return [Check("GPU", True, _why_no_gpu())]
    first = torch.device("cuda", 0)
    libraries = [
        _library("NVRTC", "compiles the GPU kernels", nvrtc.refusal(first)),
        _library("cuSPARSELt", "multiplies many tokens by 2:4 weights", cslt.refusal(first)),
    ]
    return [*(_gpu(i) for i in range(torch.cuda.device_count())), *libraries]


def _library(name: str, purpose: str, refusal: str | None) -> Check:
    """A library of NVIDIA's on the first GPU; `refusal`: why it does not run there, with a fix if there is one."""
    reason, _, fix = (refusal or purpose).partition("; fix: ")
    return _check(name, refusal is None, f"needs {reason}" if refusal else reason, fix or "use another GPU or torch")


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "none: this torch was built without CUDA; kernels run on the CPU"
    return f"none visible to torch (CUDA {torch.version.cuda}); kernels run on the CPU"


def _driver() -> str:
    """The kernel module's version: torch does not tell it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


def _gpu(index: int) -> Check:
    found = torch.cuda.get_device_properties(index)
    detail = (
        f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, "
        f"driver {_driver()}, CUDA {torch.version.cuda}"
    )
    fix = "use a GPU of compute capability 8.0 (Ampere) or later; this one runs the reference kernels"
    return _check(f"GPU {index}", found.major >= 8, detail, fix)


def _optional(distribution: str, purpose: str, packages: str) -> Check:
    version = _version(distribution)
    return _check(distribution, version is not None, version or f"not installed: {purpose}", f"pip install {packages}")
