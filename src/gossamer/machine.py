"""What identifies this machine and where Gossamer may keep what it learned about it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch

from . import native


def cache_folder() -> Path:
    """$GOSSAMER_CACHE, else gossamer under $XDG_CACHE_HOME, else ~/.cache/gossamer; it need not exist yet."""
    if named := os.environ.get("GOSSAMER_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "gossamer"


def identity(device: torch.device) -> dict[str, str]:
    """Everything that a timing taken on `device` depends on and that may differ when it is read again."""
    from . import __version__

    shared = {"gossamer": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return shared | {
            "device": torch.cuda.get_device_name(device),
            "arch": f"sm_{major}{minor}",
            "driver": _driver(),
        }
    isa = native.isa() if native.available() else "none"
    return shared | {"device": cpu_name(), "arch": platform.machine(), "isa": isa, "cores": str(os.cpu_count())}


@cache
def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    keys = ("model name", "cpu family", "model", "stepping")  # clouds hide the name behind "Xeon Processor"
    return " ".join(found[k] for k in keys if k in found) or platform.machine()


@cache
def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
