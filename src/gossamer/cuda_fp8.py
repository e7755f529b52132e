"""Products with a 2:4 matrix in 8 bits (e4m3): cuSPARSELt, with one scale an operand or one for each of its rows.

The library knows one scale for the whole product, a number of the host's: `multiply_whole` hands it that. Scales of
rows are a pass after the product (`multiply`); those of `quantized` are powers of two: of numbers with an exponent
these lose nothing against any other, and multiplying with them afterwards rounds nothing. That pass costs: where the
depth is small, dense products with scales of rows are as fast or faster. Given the dense matrix, too, both take it for
the numbers of tokens that it is faster for, as `pays` times on first use: one call comes before a CUDA graph captures.
As ops with fakes they stay whole under torch.compile(fullgraph=True).
"""

from __future__ import annotations

import logging
import math
from functools import cache, partial

import torch
from torch import Tensor

from . import cslt, cslt_search, nvrtc
from .cslt import Algorithm, Problem

log = logging.getLogger("gossamer")

E4M3 = torch.float8_e4m3fn
MOST = torch.finfo(E4M3).max
SCALE = nvrtc.Function("scale24.cuh", "scale24", "PPPPqq", {"BF16": 1})
VARIANTS = (SCALE,)
MOST_SCALES = 1024
COLD_BYTES = 150 << 20  # of weights that take turns when products are timed: more than a cache holds
MOST_TOKENS = 16384  # that are tried out; as many powers of two as are less, and others go with the next
_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define("rows24(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, Tensor? dense) -> Tensor")
_library.define(
    "whole24(Tensor x, float x_scale, Tensor packed, float scale, int rows, Tensor? bias, Tensor? dense) -> Tensor"
)


def quantized(a: Tensor) -> tuple[Tensor, Tensor]:
    """`a` [M, K] in e4m3, and float32 [M] to multiply its rows with: the least powers of two under which they fit.

    A row with an infinity, which e4m3 does not have, is multiplied with NaN.
    """
    most = a.abs().amax(-1).float() / MOST
    fraction, exponent = torch.frexp(most)
    scale = torch.ldexp(torch.ones_like(most), exponent - (fraction == 0.5).int())
    endless = most.isinf()
    scale = torch.where((most > 0) & ~endless, scale, 1.0)
    bits = (a.float() / scale.unsqueeze(-1) + 0.0).to(E4M3)  # -0.0 is no zero to cslt.compress
    return bits, torch.where(endless, torch.nan, scale)


def quantized_whole(a: Tensor, scale: float | None = None) -> tuple[Tensor, float]:
    """`a` in e4m3, and the number to multiply it with: `scale`, beyond whose range values saturate, else the least.

    Without a `scale` it waits for the GPU. With a static one, found beforehand on typical inputs, it does not.
    """
    if scale is None:
        scale = float(a.abs().amax()) / MOST if a.numel() else 1.0
        scale = scale or 1.0
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"cuda_fp8.quantized_whole: the scale is {scale}; fix: give a positive one, finite values")
    return ((a.float() / scale).clamp(-MOST, MOST) + 0.0).to(E4M3), scale


def refusal(device: torch.device) -> str | None:
    """Why there are no such products on this device (it completes "it needs ..."), or None if there are."""
    if reason := cslt.refusal(device) or nvrtc.refusal(device):
        return reason
    return None if torch.cuda.get_device_capability(device) >= (8, 9) else "a GPU of compute capability 8.9 or later"


def multiply(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """y [T, M] = x A^T + bias in bfloat16, for x [T, K] in e4m3, A [M, K] as `cslt.compress` leaves it in e4m3.

    `x_scale` [T] and `scale` [M], float32, `bias` [M], bfloat16. `dense`: A itself, in e4m3, for what is not faster
    sparse. Without it T is a multiple of 16, M and K of 32; with it K and M are multiples of 16. Tries out the
    library's algorithms on the first use of a shape; CsltError where there is none, ValueError for operands that are
    not of one product.
    """
    return torch.ops.gossamer.rows24(x, x_scale, packed, scale, bias, dense)


def multiply_whole(
    x: Tensor,
    x_scale: float,
    packed: Tensor,
    scale: float,
    rows: int,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """`multiply` with one scale for x and one for A [rows, K], of `quantized_whole`: cuSPARSELt alone.

    The scales are the host's numbers. One that lies on the GPU would have to be waited for: give a static one, or take
    `multiply`, whose scales stay there. A bias is one more pass.
    """
    return torch.ops.gossamer.whole24(x, float(x_scale), packed, float(scale), rows, bias, dense)


def _rows24(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dense: Tensor | None
) -> Tensor:
    if any(t.dtype != torch.float32 or t.dim() != 1 for t in (x_scale, scale)) or len(x_scale) != len(x):
        raise ValueError("cuda_fp8.multiply takes x in e4m3 and float32 scales of its rows; fix: pass quantized(x)")
    rows, bias = len(scale), None if bias is None else bias.to(torch.bfloat16)
    _check("multiply", x, rows, (packed, x_scale, scale), bias, dense)
    if not len(x):
        return x.new_empty(0, rows, dtype=torch.bfloat16)
    if dense is not None and not _sparse(x, rows, True):
        return _dense(x, dense, x_scale.contiguous().unsqueeze(1), scale.contiguous().unsqueeze(0), bias)
    y = cslt.matmul(packed, _problem(rows, x), cslt.aligned(x), _algorithm(rows, x))
    held = nvrtc.null(x.device) if bias is None else cslt.aligned(bias)
    grid = len(x), -(-rows // 2048), 1
    SCALE.launch(grid, (256, 1, 1), y, x_scale.contiguous(), cslt.aligned(scale), held, len(x), rows)
    return y


def _whole24(
    x: Tensor, x_scale: float, packed: Tensor, scale: float, rows: int, bias: Tensor | None, dense: Tensor | None
) -> Tensor:
    if not x_scale * scale > 0:
        raise ValueError(f"cuda_fp8.multiply_whole: the scales are {x_scale} and {scale}; fix: give positive ones")
    bias = None if bias is None else bias.to(torch.bfloat16)
    _check("multiply_whole", x, rows, (packed,), bias, dense)
    if not len(x):
        return x.new_empty(0, rows, dtype=torch.bfloat16)
    if dense is not None and not _sparse(x, rows, False):
        root = _held(math.sqrt(x_scale * scale), x.device)
        return _dense(x, dense, root, root, bias)
    y = cslt.matmul(packed, _problem(rows, x), cslt.aligned(x), _algorithm(rows, x), x_scale * scale)
    return y if bias is None else y.add_(bias)


_library.impl("rows24", _rows24, "CompositeExplicitAutograd")
_library.impl("whole24", _whole24, "CompositeExplicitAutograd")


@torch.library.register_fake("gossamer::rows24", lib=_library)
def _(x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dense: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0], dtype=torch.bfloat16)


@torch.library.register_fake("gossamer::whole24", lib=_library)
def _(
    x: Tensor, x_scale: float, packed: Tensor, scale: float, rows: int, bias: Tensor | None, dense: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], rows, dtype=torch.bfloat16)


@cache
def pays(rows: int, depth: int, tokens: int, index: int, each_row: bool) -> bool:
    """Is A [rows, depth] times so many tokens faster here than `torch._scaled_mm`, on GPU `index`? Timed on first use.

    `each_row`: with scales of rows, `multiply`, else `multiply_whole`. False where there is no such product. Weights
    come from memory, as they do in a model.
    """
    problem = Problem(rows, depth, tokens, E4M3, torch.bfloat16)
    if cslt_search.best(problem, index) is None:
        return False
    with torch.cuda.device(index):
        a, x = cslt_search.operands(problem, index)
        weights = [a, *(a.clone() for _ in range(COLD_BYTES // a.numel()))]
        packed = [cslt.compress(w, trusted=True) for w in weights]
        if each_row:
            of_x, of_a = (torch.ones(n, device=a.device) for n in (tokens, rows))
            ours = [partial(multiply, x, of_x, p, of_a) for p in packed]
            dense = [partial(_dense, x, w, of_x.unsqueeze(1), of_a.unsqueeze(0), None) for w in weights]
        else:
            one = torch.ones((), device=a.device)
            ours = [partial(multiply_whole, x, 1.0, p, 1.0, rows) for p in packed]
            dense = [partial(_dense, x, w, one, one, None) for w in weights]
        return cslt_search.microseconds(*ours) < cslt_search.WORTH * cslt_search.microseconds(*dense)


def _sparse(x: Tensor, rows: int, each_row: bool) -> bool:
    """Is the sparse product the one to take for this x?"""
    if _problem(rows, x).refuses():
        return False
    try:
        return pays(rows, x.shape[1], _size(len(x)), x.get_device(), each_row)
    except torch.OutOfMemoryError as error:
        log.info("no memory to time %d x %d in 8 bits (%s); it runs dense this time", rows, x.shape[1], error)
        return False


def _dense(x: Tensor, a: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(cslt.aligned(x), a.mT, scale_a=x_scale, scale_b=scale, bias=bias, **out)


_scales: dict[tuple[float, torch.device], Tensor] = {}


def _held(number: float, device: torch.device) -> Tensor:
    """The number on the GPU. The first few are kept for good, as captured graphs read them; making one waits for it."""
    found = _scales.get((number, device))
    if found is None:
        found = torch.full((), number, device=device)
        if len(_scales) < MOST_SCALES and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).synchronize()  # other streams will read it, too
            _scales[number, device] = found
    return found


def _check(
    name: str, x: Tensor, rows: int, operands: tuple[Tensor, ...], bias: Tensor | None, dense: Tensor | None
) -> None:
    """That these are operands of one such product; `cslt.matmul` looks at the shape of the compressed one."""
    if reason := refusal(x.device):
        raise cslt.CsltError(f"cuda_fp8.{name} needs {reason}; fix: multiply in bfloat16")
    if x.dtype != E4M3 or x.dim() != 2:
        raise ValueError(
            f"cuda_fp8.{name} takes x [T, K] in e4m3, not {x.dtype} {tuple(x.shape)}; fix: pass quantized(x)"
        )
    if any(t.device != x.device for t in (*operands, bias, dense) if t is not None):
        raise ValueError(f"cuda_fp8.{name} takes all operands on the GPU of x, {x.device}; fix: move them there")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"cuda_fp8.{name} takes a bias [{rows}], not {tuple(bias.shape)}; fix: pass one of each row")
    if dense is not None and (dense.dtype != E4M3 or dense.shape != (rows, x.shape[1]) or not dense.is_contiguous()):
        wanted = f"a contiguous dense matrix [{rows}, {x.shape[1]}] in e4m3, not {dense.dtype} {tuple(dense.shape)}"
        raise ValueError(f"cuda_fp8.{name} takes {wanted}; fix: pass what was given to cslt.compress")


def _algorithm(rows: int, x: Tensor) -> Algorithm:
    problem = _problem(rows, x)
    found = problem.refuses() is None and cslt_search.best(problem._replace(columns=_size(len(x))), x.get_device())
    if not found:
        raise cslt.CsltError(f"cuSPARSELt has no right algorithm for {problem}; fix: multiply in bfloat16")
    return found[0]


def _size(tokens: int) -> int:
    return min(MOST_TOKENS, max(16, 1 << (tokens - 1).bit_length()))


def _problem(rows: int, x: Tensor) -> Problem:
    return Problem(rows, x.shape[1], x.shape[0], E4M3, torch.bfloat16)
