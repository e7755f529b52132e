"""Products with a 2:4 matrix in 8 bits (e4m3), a scale for every row of either operand: cuSPARSELt and a pass after it.

The library itself knows no scales but one for the whole product. Scales of `quantized` are powers of two: of numbers
with an exponent these lose nothing against any other, and multiplying with them afterwards rounds nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import cslt, cslt_search, nvrtc
from .cslt import Problem

E4M3 = torch.float8_e4m3fn
SCALE = nvrtc.Function("scale24.cuh", "scale24", "PPPPqq", {"BF16": 1})
VARIANTS = (SCALE,)


def quantized(a: Tensor) -> tuple[Tensor, Tensor]:
    """`a` [M, K] in e4m3, and float32 [M] to multiply its rows with: the least powers of two under which they fit."""
    most = a.abs().amax(-1).float() / torch.finfo(E4M3).max
    fraction, exponent = torch.frexp(most)
    scale = torch.ldexp(torch.ones_like(most), exponent - (fraction == 0.5).int())
    scale = torch.where(most > 0, scale, 1.0)
    return (a.float() / scale.unsqueeze(-1) + 0.0).to(E4M3), scale  # -0.0 is no zero to cslt.compress


def refusal(device: torch.device) -> str | None:
    """Why there are no such products on this device (it completes "it needs ..."), or None if there are."""
    if reason := cslt.refusal(device) or nvrtc.refusal(device):
        return reason
    return None if torch.cuda.get_device_capability(device) >= (8, 9) else "a GPU of compute capability 8.9 or later"


def multiply(x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [T, M] = x A^T + bias in bfloat16, for x [T, K] in e4m3, A [M, K] as `cslt.compress` leaves it in e4m3.

    `x_scale` [T] and `scale` [M], float32, `bias` [M], bfloat16; T is a multiple of 16, M and K of 32. Tries out the
    library's algorithms on the first use of a shape; CsltError where there is none.
    """
    if reason := refusal(x.device):
        raise cslt.CsltError(f"cuda_fp8.multiply needs {reason}; fix: multiply in bfloat16")
    if x.dtype != E4M3 or x_scale.shape != x.shape[:1] or scale.dtype != torch.float32 or x_scale.dtype != scale.dtype:
        raise ValueError("cuda_fp8.multiply takes x in e4m3 and float32 scales of its rows; fix: pass quantized(x)")
    problem = Problem(len(scale), x.shape[1], x.shape[0], E4M3, torch.bfloat16)
    found = cslt_search.best(problem, x.get_device())
    if found is None:
        raise cslt.CsltError(f"cuSPARSELt has no right algorithm for {problem}; fix: multiply in bfloat16")
    y = cslt.matmul(packed, problem, cslt.aligned(x), found[0])
    bias = _none(x.device) if bias is None else bias.to(torch.bfloat16).contiguous()
    grid = len(x), -(-len(scale) // 2048), 1
    SCALE.launch(grid, (256, 1, 1), y, x_scale.contiguous(), cslt.aligned(scale), bias, len(x), len(scale))
    return y


@cache
def _none(device: torch.device) -> Tensor:
    """No bias: an empty tensor passes a null pointer."""
    return torch.empty(0, device=device)
