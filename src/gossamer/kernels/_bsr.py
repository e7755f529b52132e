"""The compiled core of `bsr_int8`, typed and checked: packed weights, activations in, activations or tensors out.

`GOSSAMER_ISA` (scalar, avx2, avxvnni, avx512) or `set_isa` narrows what the CPU offers. Integer sums are exact and the
same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..activation import FUNCTIONS, LAYOUTS, Activation, Epilogue, elements, row_stride
from ..formats.bsr_int8 import BsrInt8
from . import KernelError, Packed

_built: ModuleType | None
_failure: ImportError | None = None
try:
    from gossamer import _bsr as _built
except ImportError as error:
    # Without its traceback, which would keep alive whatever the importer held.
    _built, _failure = None, error.with_traceback(None)

# Looked up once, for calls that are short.
_linear = getattr(_built, "linear", None) or (lambda *_: require())
_weights = getattr(_built, "weights", None) or (lambda *_: require())
_threads = torch.get_num_threads

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 3}
FEW = 4  # tokens, as in native/bsr_int8/bsr.h
WIDE = 8192  # channels, from which on offsets take 32 bits
MOST = 65_536  # channels whose products with int8 cannot overflow an int32
TILE = 16  # rows
PAGE, LARGE = 4096, 1 << 21  # bytes


def available() -> bool:
    """Was the compiled core built and can it be imported?"""
    return _built is not None


def require() -> ModuleType:
    """The compiled core, or an ImportError that names the fix."""
    if _built is None:
        raise ImportError(
            "Gossamer's compiled block-sparse kernels (gossamer._bsr) are missing: they need a C++17 compiler "
            "(g++ >= 11); build them with `pip install .` in the repository"
        ) from _failure
    return _built


def isas() -> list[str]:
    """The instruction sets this CPU can run, best first."""
    return require().isas()


def isa() -> str:
    """The instruction set in use. ValueError if GOSSAMER_ISA names one that this CPU cannot run."""
    return require().isa()


def set_isa(name: str) -> None:
    """Use this instruction set from now on, process-wide. ValueError if this CPU cannot run it."""
    require().set_isa(name)


def amx() -> bool:
    """Can this process use AMX? Not where GOSSAMER_ISA or `set_isa` asks for less than AVX-512."""
    return require().amx() and isa() == "avx512"


def layout_of(meta: dict[str, Any], tokens: int) -> str:
    """What a product with these weights reads fastest for so many tokens."""
    return "rows" if tokens <= FEW else meta["layout"]


def pack(a: BsrInt8, panels: bool = False) -> Packed:
    """The run-time layout: groups for vector units, or with `panels` what AMX takes, and windows for a few tokens.

    KernelError if mask and weights contradict each other.
    """
    core, (m, k), width = require(), a.shape, a.width
    used = a.used()
    counts = used.sum(1)
    if int(counts.sum()) != len(a.weight):
        raise KernelError("bsr_int8: mask and weights contradict each other: damaged; fix: fetch the file again")
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    columns, data = used.nonzero(as_tuple=True)[1].int(), a.weight.contiguous()
    groups, windows = torch.empty_like(starts), torch.empty_like(starts)
    stored = (len(used), k, width, starts.data_ptr(), columns.data_ptr())
    panel_bytes = core.count(*stored, groups.data_ptr(), windows.data_ptr())
    many, few, wide = 0 if panels else int(groups[-1]), int(windows[-1]), k >= WIDE
    panel_data = torch.empty(panel_bytes if panels else 0, dtype=torch.int8)
    group_data = torch.empty(many, 4, 4, dtype=torch.int8)
    offsets = torch.empty(many * 4 // width, dtype=torch.int32 if wide else torch.int16)
    window_data, index = torch.empty(few, 4, 16, dtype=torch.int8), torch.empty(few, 16, dtype=torch.uint8)
    base = torch.empty(few, dtype=torch.int32)
    sums, scale = (torch.zeros(-(-m // TILE) * TILE, dtype=kind) for kind in (torch.int32, torch.float32))
    scale[:m] = a.scale
    core.fill(
        *stored, data.data_ptr(), panel_data.data_ptr(), groups.data_ptr(), group_data.data_ptr(), offsets.data_ptr(),
        wide, windows.data_ptr(), window_data.data_ptr(), index.data_ptr(), base.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    tensors = (panel_data, groups, group_data, offsets, windows, window_data, index, base, scale, sums)
    layout = "t" if width == 1 and not panels else "q"
    return Packed(tensors, {"rows": m, "cols": k, "block": width, "wide": wide, "layout": layout})


def weights(packed: Sequence[Tensor], meta: dict[str, Any]) -> Any:
    """What the compiled core takes; valid for as long as the tensors are where they are."""
    groups = packed[1]
    held, address, found = _known.get(id(groups), (None, 0, None))
    if held is not None and held() is groups and address == groups.data_ptr():
        return found
    panels, groups, group_data, offsets, windows, window_data, index, base, scale, sums = packed
    found = _weights(
        meta["rows"], meta["cols"], meta["block"], panels.data_ptr(), groups.data_ptr(), group_data.data_ptr(),
        offsets.data_ptr(), meta["wide"], windows.data_ptr(), window_data.data_ptr(), index.data_ptr(),
        base.data_ptr(), scale.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    _known[id(groups)] = (ref(groups, partial(_forget, id(groups))), groups.data_ptr(), found)
    return found


# By the tensor where groups start: (that tensor, its address, Weights). Ten addresses take as long as a small product.
_known: dict[int, tuple[ref[Tensor] | None, int, Any]] = {}


def _forget(which: int, _: ref[Tensor]) -> None:
    _known.pop(which, None)


def linear(x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
    """y [.., M] = x [.., K] A^T + bias in the dtype of x, float32 or bfloat16; x is quantised per token on the way.

    A token with NaN or Inf in x gives NaN in all its outputs.
    """
    return _product(x, weights(packed, meta), meta["rows"], meta["cols"], _plain(bias))


def bound(packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`linear` as a function of x, for weights that stay where they are."""
    found, rows, cols = weights(packed, meta), meta["rows"], meta["cols"]
    held = tuple(t.detach() for t in packed)  # their memory lives as long as what is returned

    def call(x: Tensor, _held: tuple[Tensor, ...] = held) -> Tensor:
        return _product(x, found, rows, cols, _plain(bias))

    return call


def _plain(bias: Tensor | None) -> Tensor | None:
    if bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()):
        return bias
    return bias.float().contiguous()


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for an output, a large one from the beginning of a page on.

    A product writes a line each of 64 rows; where these are whole pages apart and begin amid pages it takes longer
    (docs/kernels/bsr_int8.md).
    """
    count = math.prod(shape)
    if count * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype)
    whole = torch.empty(count + PAGE // dtype.itemsize, dtype=dtype)
    begin = -whole.data_ptr() % PAGE // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(whole.untyped_storage(), begin, shape)  # type: ignore[call-overload]


def _product(x: Tensor, found: Any, rows: int, cols: int, bias: Tensor | None) -> Tensor:
    *lead, features = x.shape
    _check_features(features, cols)
    if not x.is_cpu:
        raise ValueError(f"x lies on {x.device}, the weight on the CPU; fix: move one of them")
    y = room((*lead, rows), x.dtype)
    if not y.numel():
        return y
    if cols and x.is_contiguous():
        tokens, stride = x.numel() // cols, cols
    else:
        x, tokens = _matrix(x, cols)
        stride = x.stride(0)
    at = 0 if bias is None else bias.data_ptr()
    _linear(found, x.data_ptr(), TYPES[x.dtype], tokens, stride, at, y.data_ptr(), _threads())
    return y


def quantise(x: Tensor, layout: str, scale: float | None = None, zero: int = 128) -> Activation:
    """x [tokens, channels], float32 or bfloat16, as uint8: by `scale` and `zero`, or symmetric per token (zero 128).

    ValueError for a scale that is not positive and finite.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        raise ValueError(f"expected a CPU matrix of float32 or bfloat16, got {x.dtype} {tuple(x.shape)} on {x.device}")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"a scale is positive and finite, not {scale}; fix: calibrate it with gossamer.quant")
    if not 0 <= zero <= 255 or (scale is None and zero != 128):
        raise ValueError(f"a zero point is 0 to 255, and 128 where scales are per token, not {zero}")
    channels = x.shape[1]
    x, tokens = _matrix(x, channels)
    data = torch.empty(elements(layout, tokens, channels), dtype=torch.uint8)
    scales = torch.empty(tokens if scale is None else 0, dtype=torch.float32)
    require().quantise(
        x.data_ptr(), TYPES[x.dtype], tokens, channels, x.stride(0), LAYOUTS.index(layout),
        0.0 if scale is None else 1.0 / scale, zero, data.data_ptr(), row_stride(channels), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return Activation(data, layout, tokens, channels, scales if scale is None else scale, zero)


def multiply(
    x: Activation, packed: Sequence[Tensor], meta: dict[str, Any], epilogue: Epilogue | None = None
) -> Tensor | Activation:
    """The product of a quantised activation with an epilogue; KernelError where layouts or shapes do not fit."""
    to, rows, tokens = epilogue or Epilogue(), meta["rows"], x.tokens
    _check_operands(x, meta, to)
    floats = to.layout == "rows" and to.dtype in (torch.float32, torch.bfloat16)
    size = tokens * rows if floats else elements(to.layout, tokens, rows)
    out = torch.empty(size, dtype=to.dtype)
    residual, kind, stride = _residual(to, tokens, rows)
    bias = None if to.bias is None else to.bias.float().contiguous()
    per_token = isinstance(x.scale, Tensor)
    if size:
        require().run(
            weights(packed, meta), x.data.data_ptr(), LAYOUTS.index(x.layout), tokens, row_stride(x.channels), x.zero,
            1.0 if per_token else x.scale, x.scale.data_ptr() if isinstance(x.scale, Tensor) else 0, out.data_ptr(),
            TYPES[to.dtype], LAYOUTS.index(to.layout), rows if floats else row_stride(rows), 1.0 / to.scale, to.zero,
            0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), kind, stride,
            FUNCTIONS.index(to.function), torch.get_num_threads(),
        )  # fmt: skip
    return out.view(tokens, rows) if floats else Activation(out, to.layout, tokens, rows, to.scale, to.zero)


def _matrix(x: Tensor, cols: int) -> tuple[Tensor, int]:
    """x as rows that are whole, and their number."""
    if cols and x.is_contiguous():
        return x.view(-1, cols), x.numel() // cols
    x = x.reshape(x.shape[:-1].numel(), cols)
    return (x if x.stride(1) == 1 or cols <= 1 else x.contiguous()), x.shape[0]


def _check_features(found: int, cols: int) -> None:
    if found != cols:
        raise ValueError(f"x has {found} features in its last dimension; fix: pass the {cols} that the weight takes")


def _check_operands(x: Activation, meta: dict[str, Any], to: Epilogue) -> None:
    _check_features(x.channels, meta["cols"])
    own = meta["layout"]
    if x.layout not in (own, "rows") or x.data.dtype != torch.uint8:
        raise KernelError(
            f"these weights take uint8 activations in the layouts '{own}' and 'rows', not {x.data.dtype} in "
            f"'{x.layout}'; fix: give the layer before an Epilogue with layout='{own}'"
        )
    _check_size(x)
    taken = {"rows": TYPES.keys(), "t": {torch.float32, torch.uint8, torch.int8}, "q": {torch.uint8, torch.int8}}
    fits = to.dtype in taken.get(to.layout, ()) and (to.layout == "rows" or x.layout != "rows")
    if not fits:
        raise KernelError(f"no output of {to.dtype} in the layout '{to.layout}' from '{x.layout}'; fix: use rows or t")
    if to.function not in FUNCTIONS:
        raise KernelError(f"unknown function '{to.function}'; fix: choose one of {', '.join(FUNCTIONS)}")
    if not 0 < to.scale < float("inf"):
        raise KernelError(f"an output scale is positive and finite, not {to.scale}; fix: calibrate it")
    if to.bias is not None and to.bias.shape != (meta["rows"],):
        raise KernelError(f"a bias has {meta['rows']} entries here, not {tuple(to.bias.shape)}")


def _check_size(x: Activation) -> None:
    """What is smaller than it says would be read past its end."""
    needed = elements(x.layout, x.tokens, x.channels)
    scales = x.scale.numel() if isinstance(x.scale, Tensor) else x.tokens
    if x.data.numel() < needed or scales != x.tokens or not x.data.is_contiguous():
        raise KernelError(
            f"an activation of {x.tokens} x {x.channels} in '{x.layout}' has {needed} entries and one scale or "
            f"{x.tokens}, not {x.data.numel()} and {scales}; fix: make it with `quantise`"
        )


def _residual(to: Epilogue, tokens: int, rows: int) -> tuple[Tensor | None, int, int]:
    """(data, type, elements between tokens)."""
    r = to.residual
    if r is None:
        return None, 0, 0
    if isinstance(r, Activation):
        if r.layout == to.layout == "t" and r.data.dtype == torch.float32 and (r.tokens, r.channels) == (tokens, rows):
            _check_size(r)
            return r.data, 0, 0
        raise KernelError("a residual of an output in 't' is a float32 Activation in 't' of the same shape")
    if to.layout != "rows" or r.dtype not in (torch.float32, torch.bfloat16) or r.shape != (tokens, rows):
        raise KernelError(f"a residual of an output in rows is float32 or bfloat16 [{tokens}, {rows}]; fix: make it so")
    r = r if r.stride(1) == 1 else r.contiguous()
    return r, TYPES[r.dtype], r.stride(0)
