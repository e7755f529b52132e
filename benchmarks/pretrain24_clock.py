"""Seconds a step, and a file that one process at a time writes."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pretrain.loop import Training


def seconds(training: Training, steps: int) -> float:
    _synchronize(training)
    begin = time.perf_counter()
    for _ in range(steps):
        training.take_step()
    _synchronize(training)
    return (time.perf_counter() - begin) / steps


def _synchronize(training: Training) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
