"""The lock file: what each kernel took for each shape on this machine, so that it is measured once.

    {"gossamer_lock": 1, "machine": {...}, "times": {key: {tokens: {kernel: microseconds}}}}

A file of another machine or of other versions is ignored, and said so once. The default file lies in the cache folder
under a name made from the machine, so that several machines can share a home folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import machine
from .formats import Spec, dtype_name
from .once import say

log = logging.getLogger("gossamer")

VERSION = 1
FIX = "fix: run gossamer.prepare again here"
Times = dict[str, dict[int, dict[str, float]]]  # key -> tokens -> kernel -> microseconds


def key(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """One line for everything that decides how long a product takes, the number of tokens apart."""
    m, k = spec["shape"]
    stored = spec["format"] + (f":{spec['dtype']}" if "dtype" in spec else "")
    # To a twentieth: layers that were pruned together differ by a few non-zeros.
    density = f" {20 * spec['nnz'] / max(1, m * k):.0f}/20" if "nnz" in spec else ""
    kept = f" {spec['n']}:{spec['m']}" if "n" in spec else ""
    block = " {}x{}".format(*spec["block"]) if "block" in spec else ""
    threads = f" threads {torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"{stored}{kept}{block} {m}x{k}{density} x {dtype_name(dtype)}{threads}"


@dataclass
class Lock:
    """The times of one file; `path` None keeps them in memory only."""

    path: Path | None
    identity: dict[str, str]
    times: Times = field(default_factory=dict)

    def merge(self, key: str, tokens: int, found: dict[str, float]) -> None:
        self.times.setdefault(key, {}).setdefault(tokens, {}).update(found)

    def save(self) -> None:
        """Write the file whole or not at all; without write access say so and go on."""
        if self.path is None:
            return
        text = json.dumps({"gossamer_lock": VERSION, "machine": self.identity, "times": self.times}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("timings are not kept: cannot write %s (%s); fix: set GOSSAMER_CACHE", self.path, error)


def default_path(device: torch.device) -> Path:
    identity = json.dumps(machine.identity(device), sort_keys=True)
    return machine.cache_folder() / "locks" / f"{device.type}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def load(device: torch.device, path: Path | str | None = None) -> Lock:
    """The lock of this machine; empty where there is no file, or none that can be used."""
    path = Path(path) if path else default_path(device)
    return Lock(path, machine.identity(device), _read(path, machine.identity(device)))


def _read(path: Path, identity: dict[str, str]) -> Times:
    try:
        found = json.loads(path.read_text())
        times = {k: {int(n): dict(t) for n, t in by.items()} for k, by in found["times"].items()}
        version, written = found["gossamer_lock"], found["machine"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say(f"ignoring the lock file {path}: it cannot be read ({type(error).__name__}: {error}); {FIX}")
        return {}
    differs = [f"{k} {written.get(k)} -> {v}" for k, v in identity.items() if written.get(k) != v]
    if version != VERSION or differs:
        other = ", ".join(differs) or version
        say(f"ignoring the lock file {path}: it is of another machine or version ({other}); {FIX}")
        return {}
    return times
