"""Products with a 2:4 matrix in 8 bits (e4m3): cuSPARSELt, with one scale an operand or one for each of its rows.

The library knows one scale for the whole product, a number of the host's: `multiply_whole` hands it that. Scales of
rows are a pass after the product (`multiply`); those of `quantized` are powers of two: of numbers with an exponent
these lose nothing against any other, and multiplying with them afterwards rounds nothing. That pass costs: where the
depth is small, dense products with scales of rows are as fast or faster. Nothing here chooses; `pays` measures.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from . import cslt, cslt_search, nvrtc
from .cslt import Algorithm, Problem

E4M3 = torch.float8_e4m3fn
MOST = torch.finfo(E4M3).max
SCALE = nvrtc.Function("scale24.cuh", "scale24", "PPPPqq", {"BF16": 1})
VARIANTS = (SCALE,)


def quantized(a: Tensor) -> tuple[Tensor, Tensor]:
    """`a` [M, K] in e4m3, and float32 [M] to multiply its rows with: the least powers of two under which they fit."""
    most = a.abs().amax(-1).float() / MOST
    fraction, exponent = torch.frexp(most)
    scale = torch.ldexp(torch.ones_like(most), exponent - (fraction == 0.5).int())
    scale = torch.where(most > 0, scale, 1.0)
    return (a.float() / scale.unsqueeze(-1) + 0.0).to(E4M3), scale  # -0.0 is no zero to cslt.compress


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


def multiply(x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [T, M] = x A^T + bias in bfloat16, for x [T, K] in e4m3, A [M, K] as `cslt.compress` leaves it in e4m3.

    `x_scale` [T] and `scale` [M], float32, `bias` [M], bfloat16; T is a multiple of 16, M and K of 32. Tries out the
    library's algorithms on the first use of a shape; CsltError where there is none, ValueError for operands that are
    not of one product.
    """
    if any(t.dtype != torch.float32 or t.dim() != 1 for t in (x_scale, scale)) or len(x_scale) != len(x):
        raise ValueError("cuda_fp8.multiply takes x in e4m3 and float32 scales of its rows; fix: pass quantized(x)")
    rows = len(scale)
    algorithm = _ready("multiply", x, rows, packed, (x_scale, scale), bias)
    y = cslt.matmul(packed, _problem(rows, x), cslt.aligned(x), algorithm)
    bias = nvrtc.null(x.device) if bias is None else cslt.aligned(bias.to(torch.bfloat16))
    grid = len(x), -(-rows // 2048), 1
    SCALE.launch(grid, (256, 1, 1), y, x_scale.contiguous(), cslt.aligned(scale), bias, len(x), rows)
    return y


def multiply_whole(
    x: Tensor, x_scale: float, packed: Tensor, scale: float, rows: int, bias: Tensor | None = None
) -> Tensor:
    """`multiply` with one scale for x and one for A [rows, K], of `quantized_whole`: cuSPARSELt alone.

    The scales are the host's numbers. One that lies on the GPU would have to be waited for: give a static one, or take
    `multiply`, whose scales stay there. A bias is one more pass.
    """
    algorithm = _ready("multiply_whole", x, rows, packed, (), bias)
    y = cslt.matmul(packed, _problem(rows, x), cslt.aligned(x), algorithm, float(x_scale) * float(scale))
    return y if bias is None else y.add_(bias)


@cache
def pays(rows: int, depth: int, tokens: int, index: int, each_row: bool) -> bool:
    """Is A [rows, depth] times so many tokens faster here than `torch._scaled_mm`, on GPU `index`? Timed on first use.

    `each_row`: with scales of rows, `multiply`, else `multiply_whole`. CsltError where there is no such product.
    """
    with torch.cuda.device(index):
        a, x = cslt_search.operands(_problem(rows, torch.empty(tokens, depth, dtype=E4M3, device="meta")), index)
        packed, ones = cslt.compress(a), partial(torch.ones, device=a.device)
        if each_row:
            scales = ones(tokens, 1), ones(1, rows)
            ours = partial(multiply, x, scales[0].flatten(), packed, scales[1].flatten())
        else:
            scales = ones(()), ones(())
            ours = partial(multiply_whole, x, 1.0, packed, 1.0, rows)
        out = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        dense = partial(torch._scaled_mm, x, a.mT, scale_a=scales[0], scale_b=scales[1], **out)
        return cslt_search.microseconds(ours) < cslt_search.microseconds(dense)


def _ready(
    name: str, x: Tensor, rows: int, packed: Tensor, scales: tuple[Tensor, ...], bias: Tensor | None
) -> Algorithm:
    """The algorithm for operands that are what these products take; `cslt.matmul` looks at the shape of `packed`."""
    if reason := refusal(x.device):
        raise cslt.CsltError(f"cuda_fp8.{name} needs {reason}; fix: multiply in bfloat16")
    if x.dtype != E4M3 or x.dim() != 2:
        raise ValueError(
            f"cuda_fp8.{name} takes x [T, K] in e4m3, not {x.dtype} {tuple(x.shape)}; fix: pass quantized(x)"
        )
    if any(t.device != x.device for t in (packed, *scales, *(() if bias is None else (bias,)))):
        raise ValueError(f"cuda_fp8.{name} takes all operands on the GPU of x, {x.device}; fix: move them there")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"cuda_fp8.{name} takes a bias [{rows}], not {tuple(bias.shape)}; fix: pass one of each row")
    found = cslt_search.best(_problem(rows, x), x.get_device())
    if found is None:
        raise cslt.CsltError(f"cuSPARSELt has no right algorithm for {_problem(rows, x)}; fix: multiply in bfloat16")
    return found[0]


def _problem(rows: int, x: Tensor) -> Problem:
    return Problem(rows, x.shape[1], x.shape[0], E4M3, torch.bfloat16)
