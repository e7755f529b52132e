"""What the kernels for few tokens on NVIDIA GPUs ask of x and of the bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import nvrtc
from . import KernelError

DTYPES = (torch.bfloat16, torch.float16)
MAX_SHAPES = 64  # of x, that a layer keeps the short way for


class Launch(Protocol):
    """A launch on the GPU `device`, all but its tensors, of which it is told the addresses.

    x [N, K] as `rows_of` leaves it, the bias as `bias_of` does, y [N, M].
    """

    def run(self, device: int, packed: tuple[int, ...], x: int, bias: int, y: int) -> None: ...


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


def by_shape(
    run: Callable[[Tensor], Tensor],
    planned: Callable[[int], Launch],
    packed: Sequence[Tensor],
    meta: dict[str, Any],
    bias: Tensor | None,
    most: int,
    columns: int,
) -> Callable[[Tensor], Tensor]:
    """`run`, but what is the same for every x of one shape is found out once: with few tokens the host takes longest.

    `planned(tokens)` is the one launch for up to `most` tokens, if the weight is whole `columns` wide (`rows_of`).
    """
    ready = dict[torch.Size, tuple[Launch, torch.Size]]()
    index, held = packed[0].get_device(), bias_of(bias, packed[0].new_empty(0, dtype=dtype_of(meta)))
    at = tuple(t.data_ptr() for t in packed)
    if bias is not None and held.data_ptr() != bias.data_ptr():
        return run  # a copy would not see the bias change

    def product(x: Tensor) -> Tensor:
        found = ready.get(x.shape)
        if found and (begin := x.data_ptr()) % 16 == 0 and x.is_contiguous() and x.get_device() == index:
            launch, shape = found
            y = x.new_empty(shape)
            launch.run(index, at, begin, held.data_ptr(), y.data_ptr())
            return y
        y = run(x)
        tokens = x.shape[:-1].numel()
        if 0 < tokens <= most and meta["cols"] % columns == 0 and len(ready) < MAX_SHAPES:
            ready[x.shape] = planned(tokens), y.shape
        return y

    return product
