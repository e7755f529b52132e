"""What was measured for a pattern on this machine: one small JSON file per pattern under `spmm` in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from .. import machine
from . import Csr

_MIX = (0x9E3779B97F4A7C15 - (1 << 64), 0x62B821756295C58D)


class Memory:
    """Times of one pattern's ways, by width of B; shared by all processes, and lost without harm."""

    def __init__(self, a: Csr, *settings: bool) -> None:
        said = machine.identity(a.device), digest(a), str(a.dtype), settings
        name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
        self.path: Path = machine.cache_folder() / "spmm" / f"{name}.json"

    def recall(self, n: int) -> dict[str, float] | None:
        """Microseconds by the name of a way, if B of n columns was measured."""
        return self._all().get(str(n))

    def remember(self, n: int, times: dict[str, float]) -> None:
        """A folder that cannot be written to is nobody's fault: it will be measured again."""
        part = self.path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._all() | {str(n): times}))
            part.replace(self.path)

    def _all(self) -> dict[str, dict[str, float]]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}


def digest(a: Csr) -> list[int]:
    """Numbers that differ between patterns: shape, entries, and two hashes of rows and columns."""
    place = torch.arange(a.nnz, device=a.device)
    salted = [((a.cols.long() + 1) * m ^ (a.rows + 1) * _MIX[i - 1]) * (2 * place + 1) for i, m in enumerate(_MIX)]
    return [*a.shape, a.nnz, *(int((s ^ (s >> 31)).sum()) for s in salted)]
