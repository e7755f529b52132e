"""B as the kernels read it: rows end to end, of whole 16-byte vectors, at such an address."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

BYTES = 16


def padded(b: Tensor) -> tuple[Tensor, int]:
    """B with columns of zeros added if need be, and how many columns it now has; a copy only where it takes one."""
    unit = BYTES // b.element_size()
    if b.shape[1] % unit:
        b = pad(b, (0, -b.shape[1] % unit))
    fits = b.stride(1) == 1 and b.stride(0) % unit == 0 and b.stride(0) >= b.shape[1] and b.data_ptr() % BYTES == 0
    return b if fits else b.clone(memory_format=torch.contiguous_format), b.shape[1]


def columns_of(c: Tensor, n: int) -> Tensor:
    """The first n columns, contiguous."""
    return c if c.shape[1] == n else c[:, :n].contiguous()


@cache
def processors(device: torch.device | None) -> int:
    """Multiprocessors of a GPU; for predictions, and on the CPU, where layouts are only tested, an H100's."""
    gpu = device is not None and device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if gpu else 132
