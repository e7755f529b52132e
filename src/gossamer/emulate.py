"""What int8 does to a model, in float32: weights int8 per output, activations uint8 per tensor or int8 per token.

The numbers are those that integer kernels multiply (`kernels/cpu_bsr_int8`), so a model can be judged, calibrated and
compared with its fast form on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats.bsr_int8 import BsrInt8
from .layers import find, first_input, quiet
from .quant import LEVELS, Range

MOST = 127
Ranges = Mapping[str, tuple[float, int]]  # layer -> (scale, zero) of its input


class EmulatedInt8(nn.Module):
    """A linear layer as int8 computes it: by (scale, zero) of its input, or with a scale per token."""

    def __init__(self, linear: nn.Linear, found: tuple[float, int] | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.found = linear.in_features, linear.out_features, found
        weight = BsrInt8.encode(linear.weight.detach().float()).decode()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        seen = per_token(x.float()) if self.found is None else per_tensor(x.float(), *self.found)
        return F.linear(seen, self.weight, self.bias).to(x.dtype)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        kind = "per token" if self.found is None else f"scale={self.found[0]:.4g}, zero={self.found[1]}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def per_token(x: Tensor) -> Tensor:
    """Rounded to int8, symmetric, the largest of each token (last dimension) at 127; of the shape of `x`."""
    scale = x.abs().amax(-1, keepdim=True) / MOST
    return torch.where(scale > 0, (x / scale).round() * scale, 0)


def per_tensor(x: Tensor, scale: float, zero: int) -> Tensor:
    """Rounded to uint8, q = round(x / scale) + zero, cut off at 0 and 255."""
    return ((x / scale).round().add(zero).clamp(0, LEVELS) - zero) * scale


def linears(model: nn.Module) -> list[str]:
    """The names of the nn.Linear layers of a model's blocks."""
    names = (name for block in find(model) for group in block.groups for name in group)
    return [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    names: Iterable[str] | None = None,
    how: Literal["minmax", "percentile", "mse"] = "mse",
) -> dict[str, tuple[float, int]]:
    """(scale, zero) of the input of each layer, from the model's own inputs (`model(**batch)`).

    Padding is counted as it is fed. CalibrationError without batches, and for NaN or Inf.
    """
    ranges = {name: Range() for name in (linears(model) if names is None else names)}

    def watch(seen: Range) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.observe(first_input(args, kwargs))

    hooks = [model.get_submodule(n).register_forward_pre_hook(watch(r), with_kwargs=True) for n, r in ranges.items()]
    try:
        with quiet(model):
            for batch in batches:
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: getattr(seen, how)() for name, seen in ranges.items()}


def emulate(model: nn.Module, ranges: Ranges | None = None, names: Iterable[str] | None = None) -> nn.Module:
    """Put an `EmulatedInt8` in the place of each layer, in place: static by `ranges`, per token without."""
    for name in list(linears(model) if names is None else names):
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}; fix: name nn.Linear layers")
        if ranges is not None and name not in ranges:
            raise KeyError(f"{name} was not calibrated; fix: calibrate(model, batches) over the same layers")
        model.set_submodule(name, EmulatedInt8(linear, None if ranges is None else ranges[name]))
    return model
