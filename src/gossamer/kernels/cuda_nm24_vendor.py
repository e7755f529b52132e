"""`nm24` (2:4) on NVIDIA GPUs at prefill: cuSPARSELt, with plans that are kept and algorithms that were tried out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from .. import cslt, cslt_library, cslt_search
from ..cslt import Algorithm, Problem
from ..formats import Format
from . import Case, Kernel, KernelError, Packed
from ._cuda_operands import dtype_of, rows_of
from .cuda_nm24 import check, unfit

log = logging.getLogger("gossamer")
_ready: dict[tuple, cslt.Plan] = {}  # for x as the library takes it, without a bias: nothing else is looked at
VARIANTS = ()  # the library's kernels are not ours to compile
SIZES = (128, 512, 1024, 2048, 4096, 16384)  # tokens for which an algorithm is looked for; others go with the next
MIN_TOKENS = 128
MAX_SHAPES = 64  # of x, that a layer keeps the short way for


class CudaNm24Vendor(Kernel):
    """bfloat16 and float16 x, 128 tokens or more, 2:4 weights whose sizes are multiples of 16."""

    name: ClassVar[str] = "cuda_nm24_vendor"
    device: ClassVar[str] = "cuda"
    formats: ClassVar[tuple[str, ...]] = ("nm24",)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        if reason := cslt.refusal(case.device) or unfit(case):
            return reason
        if case.tokens < MIN_TOKENS:
            return f"at least {MIN_TOKENS} tokens"
        rows, cols = case.spec["shape"]
        return Problem(rows, cols, SIZES[0], case.dtype, case.dtype).refuses()

    @classmethod
    def pack(cls, a: Format, dtype: torch.dtype) -> Packed:
        check(cls.name, a, dtype)
        dense = a.decode(dtype).detach().contiguous()
        if reason := cslt.refusal(dense.device):
            raise KernelError(f"{cls.name} needs {reason}; fix: choose another kernel")
        problem = Problem(*a.shape, SIZES[0], dtype, dtype)
        if reason := problem.refuses():
            raise KernelError(f"{cls.name} needs {reason}; fix: choose another kernel")
        found = _algorithms(problem, dense.get_device())
        meta = {"rows": a.shape[0], "cols": a.shape[1], "bf16": dtype == torch.bfloat16, "algorithms": found}
        meta["made_by"] = _maker(dense.device)
        if not found:
            log.warning("no algorithm of cuSPARSELt is right on %s; it runs dense; fix: update the library", problem)
        return Packed((cslt.compress(dense, trusted=True) if found else dense,), meta)

    @classmethod
    def fits(cls, meta: dict[str, Any], device: torch.device) -> bool:
        return cslt.refusal(device) is None and meta.get("made_by") == _maker(device)

    @classmethod
    def run(cls, x: Tensor, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Tensor:
        if not meta["algorithms"]:
            rows_of(cls.name, x, meta, packed[0].device)
            return linear(x, packed[0], None if bias is None else bias.to(x.dtype))
        key = x.shape, x.dtype, x.get_device(), packed[0].get_device(), meta["rows"], meta["cols"], meta["bf16"]
        if bias is None and (plan := _ready.get(key)) and x.is_contiguous() and x.data_ptr() % cslt.ALIGNMENT == 0:
            return plan.run(packed[0], x, x.new_empty(x.shape[0], meta["rows"]))
        flat = rows_of(cls.name, x, meta, packed[0].device)
        tokens, rows = flat.shape[0], meta["rows"]
        if not tokens:
            return x.new_empty(*x.shape[:-1], rows)
        if more := _padded(tokens) - tokens:
            flat = pad(flat, (0, 0, 0, more))
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        plan = _plan(meta, flat.shape[0], bias, x.get_device())
        if bias is None and flat.shape == x.shape and len(_ready) < cslt.MAX_PLANS:
            _ready[key] = plan
        y = plan.run(packed[0], flat, x.new_empty(flat.shape[0], rows))
        return (y if len(y) == tokens else y[:tokens]).view(*x.shape[:-1], rows)

    @classmethod
    def bind(cls, packed: Sequence[Tensor], meta: dict[str, Any], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        a, dtype, ready = packed[0], dtype_of(meta), dict[torch.Size, Callable[[Tensor], Tensor]]()
        index = a.get_device()
        if bias is not None and (bias.dtype != dtype or not bias.is_contiguous()):
            return super().bind(packed, meta, bias)  # a copy would not see the bias change

        def product(x: Tensor) -> Tensor:
            call = ready.get(x.shape)
            if call and x.is_contiguous() and x.data_ptr() % cslt.ALIGNMENT == 0 and x.get_device() == index:
                return call(x)
            y = cls.run(x, packed, meta, bias)
            tokens = y.numel() // meta["rows"]
            if meta["algorithms"] and tokens == _padded(tokens) and len(ready) < MAX_SHAPES:
                ready[x.shape] = _plan(meta, tokens, bias, index).bind(a, y.shape)
            return y

        return product


def _maker(device: torch.device) -> list[list[int]]:
    """What the layout of a compressed matrix and the numbers of algorithms depend on: the GPU's kind, the version."""
    return [list(torch.cuda.get_device_capability(device)), list(cslt_library.version())]


def _padded(tokens: int) -> int:
    """The tokens that the library is given: fewer than were tried out it never sees."""
    return max(MIN_TOKENS, tokens + -tokens % 8)


def _plan(meta: dict[str, Any], tokens: int, bias: Tensor | None, index: int) -> cslt.Plan:
    """The plan of a layer for so many tokens, `_padded`."""
    dtype, found = dtype_of(meta), _choice(meta["algorithms"], tokens)
    problem = Problem(meta["rows"], meta["cols"], tokens, dtype, dtype, bias=0 if bias is None else bias.data_ptr())
    return cslt.plan(problem, found, index)


def _choice(algorithms: Sequence[Sequence[int]], tokens: int) -> Algorithm:
    """Of the smallest size that the tokens fit in, else of the largest."""
    found = next((a for a in algorithms if tokens <= a[0]), algorithms[-1])
    return Algorithm(*found[1:])


def _algorithms(problem: Problem, index: int) -> list[list[int]]:
    """[tokens, the algorithm] of each size that has one, ascending; up to the size that there is memory to try out."""
    found: list[list[int]] = []
    for n in SIZES:
        try:
            best = cslt_search.best(problem._replace(columns=n), index)
        except torch.OutOfMemoryError:
            if not found:
                raise
            log.info("no memory to try out %d tokens on %s; they go with the algorithm of %d", n, problem, found[-1][0])
            break
        found += [[n, *best[0]]] if best else []
    return found
