"""Appending measured lines, with what they were measured on; see "Results" in the design notes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

import gossamer


def append(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


@cache
def environment(device: str = "cpu") -> dict:
    """`machine`, `versions`, `command`, `commit`, `date` of this process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "gossamer": gossamer.__version__}
    return {
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else _cpu(),
        "versions": versions,
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit, marked when the tree differs; GOSSAMER_COMMIT where the tree is a copy without its history."""
    if known := os.environ.get("GOSSAMER_COMMIT"):
        return known
    run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(run, capture_output=True, text=True).stdout.strip() or "unknown"
