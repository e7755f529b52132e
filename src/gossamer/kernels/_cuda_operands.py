"""What the kernels for few tokens on NVIDIA GPUs ask of x and of the bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import nvrtc
from . import KernelError

DTYPES = (torch.bfloat16, torch.float16)


def dtype_of(meta: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if meta["bf16"] else torch.float16


def rows_of(name: str, x: Tensor, meta: dict[str, Any], device: torch.device, columns: int = 8) -> Tensor:
    """x [..., K] as rows [N, K'] that kernels copy: end to end, each whole `columns`, a multiple of 8, at 16 bytes.

    Raises KernelError where x lies on another device than the weight, is not as wide or of another dtype.
    """
    if x.device != device:
        raise KernelError(f"{name}: x lies on {x.device}, the weight on {device}; fix: move one of them")
    if x.shape[-1] != meta["cols"]:
        raise KernelError(f"{name}: x has {x.shape[-1]} features, the weight takes {meta['cols']}; fix: pass that x")
    if x.dtype != dtype_of(meta):
        raise KernelError(f"{name}: packed for {dtype_of(meta)}, not {x.dtype}; fix: gossamer.prepare the model again")
    flat = x.reshape(x.shape[:-1].numel(), meta["cols"])
    if meta["cols"] % columns:
        return pad(flat, (0, -meta["cols"] % columns))
    flat = flat.contiguous()
    return flat if flat.data_ptr() % 16 == 0 else flat.clone()


def bias_of(bias: Tensor | None, x: Tensor) -> Tensor:
    """The bias as kernels read it; an empty tensor, which passes a null pointer, where there is none."""
    return nvrtc.null(x.device) if bias is None else bias.to(x.dtype).contiguous()
