"""`bitmask` on the CPU: expanded in registers for up to 16 tokens, a panel at a time for more.

Up to 16 tokens the stored values and mask are read once, where they lie, and every expanded row meets all tokens; the
only run-time tensor is where each row's values start. Above, a panel of rows is made dense in the cache and handed to
the vendor's product, so the whole dense matrix never exists. Zeros are multiplied like any other number: NaN and Inf
in x come out as they do of the dense product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import native
from ..formats import Format
from ..formats.bitmask import Bitmask
from . import Case, Kernel, KernelError, Packed

PANEL_BYTES = 2 << 20  # about a second-level cache: written, read at once, and large enough for the product to be fast


class CpuBitmask(Kernel):
    """float32 and bfloat16 values by float32 and bfloat16 x, any shape, any number of tokens."""

    name: ClassVar[str] = "cpu_bitmask"
    device: ClassVar[str] = "cpu"
    formats: ClassVar[tuple[str, ...]] = ("bitmask",)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if reason := native.refusal(case.device, case.dtype):
            return reason
        if case.spec["dtype"] not in ("float32", "bfloat16"):
            return "values in float32 or bfloat16"
        return None

    @classmethod
    def immediate(cls, case: Case) -> bool:
        return True

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        if not isinstance(a, Bitmask):
            raise KernelError(f"cpu_bitmask runs the format bitmask, not {a.name}; fix: choose another kernel")
        values, mask = a.weight.detach().contiguous(), a.mask.contiguous()
        return Packed((values, mask, native.row_offsets(values, mask, a.shape)), {"cols": a.shape[1]})

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        values, mask, offsets = packed
        # Counting elements is the shorter way, but of no columns there are none to count.
        if 0 < x.numel() <= native.MAX_TOKENS * meta["cols"] or x.shape[:-1].numel() <= native.MAX_TOKENS:
            return native.bitmask_linear(x, values, mask, offsets, meta["cols"], bias)
        return _by_panels(x, values, mask, offsets, bias)

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        values, mask, offsets = packed
        few, most = (
            native.bound_bitmask_linear(values, mask, offsets, meta["cols"], bias),
            native.MAX_TOKENS * meta["cols"],
        )
        return lambda x: few(x) if x.numel() <= most else _by_panels(x, values, mask, offsets, bias)


def _by_panels(x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """The same for many tokens. Mixed dtypes meet in float32, so that nothing is rounded but y."""
    dtype = x.dtype if x.dtype == values.dtype else torch.float32
    m, k = mask.shape[0], x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), k).to(dtype)
    rows = max(1, min(m, PANEL_BYTES // max(1, k * dtype.itemsize)))
    panel = torch.empty(rows, k, dtype=dtype)
    y = torch.empty(len(flat), m, dtype=dtype)
    for begin in range(0, m, rows):
        here = panel[: m - begin]
        native.unpack_rows(values, mask, offsets, begin, here)
        torch.mm(flat, here.mT, out=y[:, begin : begin + rows])
    if bias is not None:
        y += bias.to(dtype)
    return y.to(x.dtype).view(*x.shape[:-1], m)
