"""The compiled CPU core, typed and checked: torch tensors in, torch tensors out.

A bitmask matrix is `values` [nnz] in row-major order beside `mask` [M, ceil(K / 8)] uint8, whose bit j of byte b is
column 8 b + j; padding bits are zero. `GOSSAMER_ISA` (scalar, avx2, avx512) or `set_isa` narrows what the CPU offers;
avx512 takes AMX along where the CPU has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_built: ModuleType | None
_failure: ImportError | None = None
try:
    from gossamer import _native as _built
except ImportError as error:
    # Without its traceback, which would keep alive whatever the importer held.
    _built, _failure = None, error.with_traceback(None)

DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
    }
)


FLOATS = {torch.float32: 0, torch.bfloat16: 1}  # what the products take, numbered as in native/linear.h
MAX_TOKENS = 16


# Looked up once, for the calls that a decode step makes by the hundred.
_bitmask_linear = getattr(_built, "bitmask_linear", None) or (lambda *_: require())
_dense_linear = getattr(_built, "dense_linear", None) or (lambda *_: require())
_bitmask_many = getattr(_built, "bitmask_many", None) or (lambda *_: require())
_threads = torch.get_num_threads


def available() -> bool:
    """Was the compiled core built and can it be imported?"""
    return _built is not None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products of ours cannot run for x of `dtype` on `device` (it completes "it needs ..."), None if they can."""
    if _built is None:
        return "the compiled core; fix: pip install . in the repository, with g++ >= 11"
    if device.type != "cpu":
        return "x on the CPU"
    return None if dtype in FLOATS else "x in float32 or bfloat16"


def require() -> ModuleType:
    """The compiled core, or an ImportError that names the fix."""
    if _built is None:
        raise ImportError(
            "Gossamer's compiled core (gossamer._native) is missing: it needs a C++17 compiler (g++ >= 11); "
            "build it with `pip install .` in the repository"
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


def pack_bitmask(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [M, K] on the CPU -> (values [nnz] of its dtype, mask [M, ceil(K / 8)] uint8). -0.0 counts as zero."""
    native = require()
    _check_dtype(dense.dtype)
    if dense.dim() != 2 or dense.device.type != "cpu":
        raise ValueError(f"expected a CPU matrix, got {dense.dim()} dimensions on {dense.device}")
    rows, cols = dense.shape
    dense = _row_major(dense.detach())
    stride = dense.stride(0) * dense.itemsize
    matrix = (dense.data_ptr(), rows, cols, stride, dense.itemsize, dense.is_floating_point())
    counts = torch.empty(rows, dtype=torch.int64)
    native.bitmask_count(*matrix, counts.data_ptr(), torch.get_num_threads())
    offsets = _offsets(counts)
    values = torch.empty(int(offsets[-1]), dtype=dense.dtype)
    mask = torch.empty(rows, _bytes(cols), dtype=torch.uint8)
    native.bitmask_pack(*matrix, mask.data_ptr(), offsets.data_ptr(), values.data_ptr(), torch.get_num_threads())
    return values, mask


def unpack_bitmask(values: Tensor, mask: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """The inverse of `pack_bitmask`: dense [M, K], of `dtype` if given.

    ValueError if values, mask and shape contradict each other, so that a damaged file cannot read out of bounds.
    """
    native = require()
    _check_dtype(values.dtype)
    rows, cols = shape
    _check_packed(values, mask, rows, cols)
    values, mask = values.detach().contiguous(), mask.contiguous()
    offsets = _checked_offsets(values, mask)
    widen = values.dtype == torch.bfloat16 and dtype == torch.float32
    dense = torch.empty(rows, cols, dtype=torch.float32 if widen else values.dtype)
    packed = (mask.data_ptr(), values.data_ptr(), offsets.data_ptr(), rows, cols)
    target = (dense.data_ptr(), cols * dense.itemsize, torch.get_num_threads())
    if widen:
        native.bitmask_unpack_bf16_f32(*packed, *target)
        return dense
    native.bitmask_unpack(*packed, values.itemsize, *target)
    return dense if dtype is None else dense.to(dtype)


def row_offsets(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Where each row's values start, and where the last ends: int64 [M + 1].

    ValueError if values, mask and shape contradict each other: what passes is safe for `bitmask_linear`.
    """
    _check_packed(values, mask, *shape)
    return _checked_offsets(values, mask)


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, cols: int, bias: Tensor | None = None
) -> Tensor:
    """y [.., M] = x [.., K] A^T + bias in the dtype of x, at most 16 tokens; `offsets` from `row_offsets`.

    values, mask and offsets are contiguous; x, values and bias are float32 or bfloat16, each for itself; sums are
    float32. Bits do not depend on the number of threads. ValueError where K or the number of tokens does not fit.
    """
    rows = mask.shape[0]
    x, y, tokens, stride = _in_and_out(x, rows, cols)
    if tokens:
        bias, at, kind = _added(bias)
        _bitmask_linear(
            mask.data_ptr(), values.data_ptr(), offsets.data_ptr(), FLOATS[values.dtype], rows, cols,
            x.data_ptr(), FLOATS[x.dtype], stride, tokens, at, kind, y.data_ptr(), _threads(),
        )  # fmt: skip
    return y


def bitmask_many(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, cols: int, bias: Tensor | None = None
) -> Tensor | None:
    """`bitmask_linear` of any number of tokens, made for many: what is not stored is not multiplied.

    None where x holds Inf or NaN, which times zero would have to be NaN.
    """
    rows = mask.shape[0]
    x, y, tokens, stride = _in_and_out(x, rows, cols, most=None)
    bias, at, kind = _added(bias)
    finite = _bitmask_many(
        mask.data_ptr(), values.data_ptr(), offsets.data_ptr(), FLOATS[values.dtype], rows, cols,
        x.data_ptr(), FLOATS[x.dtype], stride, tokens, at, kind, y.data_ptr(), _threads(),
    )  # fmt: skip
    return y if finite else None


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bitmask_linear` of a contiguous dense weight [M, K]."""
    rows, cols = weight.shape
    x, y, tokens, stride = _in_and_out(x, rows, cols)
    if tokens:
        bias, at, kind = _added(bias)
        _dense_linear(
            weight.data_ptr(), FLOATS[weight.dtype], rows, cols,
            x.data_ptr(), FLOATS[x.dtype], stride, tokens, at, kind, y.data_ptr(), _threads(),
        )  # fmt: skip
    return y


def bound_bitmask_linear(
    values: Tensor, mask: Tensor, offsets: Tensor, cols: int, bias: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """`bitmask_linear` as a function of x, for a matrix that stays where it is."""
    head = mask.data_ptr(), values.data_ptr(), offsets.data_ptr(), FLOATS[values.dtype], mask.shape[0], cols
    return _bound(_bitmask_linear, head, (values, mask, offsets), bias)


def bound_dense_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`dense_linear` as a function of x, for a weight that stays where it is."""
    return _bound(_dense_linear, (weight.data_ptr(), FLOATS[weight.dtype], *weight.shape), (weight,), bias)


def _bound(
    function: Callable[..., Any], head: tuple[int, ...], held: tuple[Tensor, ...], bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """`head`: the arguments before x. The memory behind `held` and `bias` lives as long as what is returned."""
    rows, cols = head[-2:]
    given, *tail = _added(bias)
    if given is not bias:  # a copy, which would not see the bias change
        return lambda x: _bound(function, head, held, _added(bias)[0])(x)
    held = tuple(t.detach() for t in held) + (() if bias is None else (bias.detach(),))

    def call(x: Tensor, _held: tuple[Tensor, ...] = held) -> Tensor:
        x, y, tokens, stride = _in_and_out(x, rows, cols)
        if tokens:
            function(*head, x.data_ptr(), FLOATS[x.dtype], stride, tokens, *tail, y.data_ptr(), _threads())
        return y

    return call


def _added(bias: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The bias as the products take it, its address and its dtype."""
    if bias is None:
        return None, 0, 0
    bias = (bias if bias.dtype in FLOATS else bias.float()).contiguous()
    return bias, bias.data_ptr(), FLOATS[bias.dtype]


def unpack_rows(values: Tensor, mask: Tensor, offsets: Tensor, begin: int, out: Tensor) -> None:
    """Rows begin, begin + 1, .. of a bitmask matrix, dense, into all of `out` [rows, K], which is contiguous.

    `out` has the dtype of values, or is float32 for values of bfloat16; the rest is as in `bitmask_linear`.
    """
    native, (rows, cols) = require(), out.shape
    packed = (
        mask.data_ptr() + begin * mask.shape[1], values.data_ptr(), offsets.data_ptr() + begin * 8, rows, cols,
    )  # fmt: skip
    target = (out.data_ptr(), cols * out.itemsize, torch.get_num_threads())
    if out.dtype == values.dtype:
        native.bitmask_unpack(*packed, values.itemsize, *target)
    else:
        native.bitmask_unpack_bf16_f32(*packed, *target)


def move_to_huge_pages(tensor: Tensor) -> bool:
    """Move a contiguous CPU tensor onto huge pages, in place; False where the system would not.

    Worth up to twice the read bandwidth in a virtual machine, where a page walk is a walk of walks. Costs about as long
    as copying it. Linux 6.1 or later and ordinary memory (a mapped file stays as it is).
    """
    return require().move_to_huge_pages(tensor.data_ptr(), tensor.nbytes)


def sum_words(buffer: Tensor) -> int:
    """The sum of a contiguous CPU tensor's 64-bit words, modulo 2^64, whole cache lines only: reads at full speed."""
    return require().sum_words(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())


def popcount_rows(mask: Tensor) -> Tensor:
    """Set bits in each row of a uint8 matrix on the CPU: int64 [M]."""
    native = require()
    _check_bytes(mask)
    mask = mask.contiguous()
    counts = torch.empty(mask.shape[0], dtype=torch.int64)
    native.popcount_rows(mask.data_ptr(), *mask.shape, counts.data_ptr(), torch.get_num_threads())
    return counts


def _bytes(cols: int) -> int:
    return (cols + 7) // 8


def _row_major(dense: Tensor) -> Tensor:
    """Rows may lie any distance apart; within a row columns must touch."""
    return dense if dense.stride(1) == 1 or dense.shape[1] <= 1 else dense.contiguous()


def _offsets(counts: Tensor) -> Tensor:
    """Where each row's values start, and where the last ends: int64 [M + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _in_and_out(x: Tensor, rows: int, cols: int, most: int | None = MAX_TOKENS) -> tuple[Tensor, Tensor, int, int]:
    """x as a matrix whose rows are whole, y, tokens, and the distance between rows of x in bytes.

    Short ways first: a decode step makes hundreds of these calls, and a microsecond here is a tenth of one.
    """
    *lead, features = shape = x.shape
    if features != cols:
        raise ValueError(f"x has {features} features in its last dimension; fix: pass the {cols} that the weight takes")
    if not x.is_cpu:
        raise ValueError(f"x lies on {x.device}, the weight on the CPU; fix: move one of them")
    y = x.new_empty(*lead, rows)  # spread out: a tuple takes half as long again
    if cols and x.is_contiguous():
        tokens, stride = x.numel() // cols, cols
    else:
        x = x.reshape(-1, cols) if cols else x.new_empty(shape[:-1].numel(), 0)
        x = x if x.stride(1) == 1 or cols <= 1 else x.contiguous()
        tokens, stride = x.shape[0], x.stride(0)
    if most is not None and tokens > most:
        raise ValueError(f"x has {tokens} tokens, the kernel takes {most} at a time; split x")
    return x, y, tokens, stride * x.itemsize


def _checked_offsets(values: Tensor, mask: Tensor) -> Tensor:
    offsets = _offsets(popcount_rows(mask))
    if int(offsets[-1]) != values.numel():
        raise ValueError(f"the mask has {int(offsets[-1])} bits set but there are {values.numel()} values: damaged")
    return offsets


def _check_packed(values: Tensor, mask: Tensor, rows: int, cols: int) -> None:
    _check_mask(mask, rows, cols)
    if values.dim() != 1 or values.device.type != "cpu":
        raise ValueError(f"expected a CPU vector of values, got {values.dim()} dimensions on {values.device}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        known = ", ".join(sorted(str(known).removeprefix("torch.") for known in DTYPES))
        raise TypeError(f"{dtype} is not supported; choose one of: {known}")


def _check_bytes(mask: Tensor) -> None:
    if mask.dim() != 2 or mask.dtype != torch.uint8 or mask.device.type != "cpu":
        raise ValueError(f"expected a CPU matrix of uint8, got {mask.dtype} {tuple(mask.shape)} on {mask.device}")


def _check_mask(mask: Tensor, rows: int, cols: int) -> None:
    _check_bytes(mask)
    if mask.shape != (rows, _bytes(cols)):
        raise ValueError(f"a {rows} x {cols} matrix has a mask of {rows} x {_bytes(cols)}, got {tuple(mask.shape)}")
    if cols % 8 and bool((mask[:, -1] >> (cols % 8)).any()):
        raise ValueError(f"the mask has bits set past column {cols}: damaged")
