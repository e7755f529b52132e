"""The feed-forward block of a transformer in 2:4 training: sparse products, and all between them, fused.

Of a linear layer z = x W^T three products are made: F forward (z), D for the gradient of x, G for that of W. Which of
them are sparse is a *recipe*: "s_ste" F (2409.09099: soft threshold), "transposable" F and D, "fst" F, D and G
(2404.01847: one mask that is 2:4 both ways, and an unbiased 2:4 estimate of dz^T). Weights are pruned and compressed
once per optimizer step; a product that this GPU runs no faster sparse stays dense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .. import cslt, cslt_search, cuda_patterns
from ..cslt import Algorithm, Problem
from ..cslt_search import WORTH
from ..cuda_patterns import Act

log = logging.getLogger("gossamer")

Recipe = Literal["s_ste", "transposable", "fst"]
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """What torch.compile steps around; the rest of a block it compiles."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A weight [N, K] pruned for one optimizer step: compressed for F and for D, dense for what runs dense."""

    shape: tuple[int, int]
    forward: Tensor
    backward: Tensor | None
    estimate: bool  # is G sparse?
    source: tuple[Tensor, Tensor | None]  # (the pruned weight, None) or (the weight, its masks)

    @cached_property
    def dense(self) -> Tensor:
        """Made when it is asked for; the weight must not have changed since."""
        w, masks = self.source
        return w if masks is None else torch.where(cuda_patterns.mask_of(masks), w, 0)


@uncompiled
def prune(w: Tensor, recipe: Recipe, masks: Tensor | None = None, scale: Tensor | None = None) -> Pruned:
    """`masks`: of `cuda_patterns.transposable`, found now where None; `scale`: S-STE's beta, 1 where None."""
    w = w.detach()
    shape = w.shape[0], w.shape[1]
    if recipe == "s_ste":
        forward, dense = cuda_patterns.prune(w, "soft", scale)
        return Pruned(shape, forward, None, False, (dense, None))
    found = cuda_patterns.transposable(w) if masks is None else masks
    forward, backward = cuda_patterns.compressed_both(w, found)
    return Pruned(shape, forward, backward, recipe == "fst", (w, found))


def multiply(x: Tensor, w: Pruned) -> Tensor:
    """F: z [T, N] = x [T, K] W^T."""
    problem = Problem(*w.shape, x.shape[0], x.dtype, x.dtype)
    if algorithm := worth(problem, x.get_device()):
        return cslt.matmul(w.forward, problem, x, algorithm)
    return x @ w.dense.mT


def multiply_back(dz: Tensor, w: Pruned) -> Tensor:
    """D: dx [T, K] = dz [T, N] W."""
    problem = Problem(w.shape[1], w.shape[0], dz.shape[0], dz.dtype, dz.dtype)
    if w.backward is not None and (algorithm := worth(problem, dz.get_device())):
        return cslt.matmul(w.backward, problem, dz, algorithm)
    return dz @ w.dense


def weight_gradient(dz: Tensor, x: Tensor, estimate: Tensor | None) -> Tensor:
    """G: dW [N, K] = dz^T x, of the estimate of dz^T, compressed, where it is given."""
    if estimate is None:
        return dz.mT @ x
    algorithm = worth(_gradient_problem(dz.shape[1], x), dz.get_device())
    assert algorithm is not None  # `estimates` said so
    return cslt.matmul(estimate, _gradient_problem(dz.shape[1], x), x, algorithm)


def estimates(w: Pruned, x: Tensor) -> bool:
    """Is G to be sparse for this weight and its input x [T, K]?"""
    return w.estimate and x.shape[0] % 64 == 0 and worth(_gradient_problem(w.shape[0], x), x.get_device()) is not None


def _gradient_problem(rows: int, x: Tensor) -> Problem:
    return Problem(rows, x.shape[0], x.shape[1], x.dtype, x.dtype, b_rows=False, d_rows=False)


def worth(problem: Problem, index: int) -> Algorithm | None:
    """The algorithm of a product that is faster sparse than dense on this GPU, timed on first use; None if none is.

    None for once where there is no memory left to find out.
    """
    try:
        return _worth(problem, index)
    except torch.OutOfMemoryError as error:
        log.info("no memory to time %s (%s); it runs dense this time", problem, error)
        return None


@cache
def _worth(problem: Problem, index: int) -> Algorithm | None:
    if cslt.refusal(torch.device("cuda", index)) or problem.refuses():
        return None
    found = cslt_search.best(problem, index)
    return found[0] if found and found[1] < WORTH * cslt_search.dense_time(problem, index) else None


worth.cache_clear = _worth.cache_clear  # pyright: ignore[reportFunctionMemberAccess]


class _FFN(torch.autograd.Function):
    """y = act(x W_in^T) W_out^T; the gradients of the weights are those of the pruned ones (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, first: Pruned, second: Pruned, act: Act) -> Tensor:
        flat = cslt.aligned(x.reshape(-1, x.shape[-1]))
        z = multiply(flat, first)
        gated = z.shape[1] == 2 * second.shape[1]
        h = cuda_patterns.activate(z, act, gated)
        ctx.save_for_backward(flat, z, h)
        ctx.first, ctx.second, ctx.act, ctx.gated, ctx.shape = first, second, act, gated, x.shape
        return multiply(h, second).view(*x.shape[:-1], second.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, h = ctx.saved_tensors
        first, second = ctx.first, ctx.second
        dy = cslt.aligned(grads[0].reshape(-1, second.shape[0]))
        dh = multiply_back(dy, second)
        estimate = cuda_patterns.estimate_t(dy) if estimates(second, h) else None
        d_out = weight_gradient(dy, h, estimate)
        dz, estimate = cuda_patterns.activate_backward(z, dh, ctx.act, ctx.gated, estimates(first, x))
        d_in = weight_gradient(dz, x, estimate)
        dx = multiply_back(dz, first).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, d_in, d_out, None, None, None


@uncompiled
def ffn24(x: Tensor, w_in: Tensor, w_out: Tensor, first: Pruned, second: Pruned, act: Act = "silu") -> Tensor:
    """y [.., d] of x [.., d] with pruned weights; gradients flow to x, `w_in` and `w_out`.

    `w_in` [F, d], or [2 F, d] = [gate | up] for a gated block; `w_out` [d, F]; `first` and `second` are `prune` of
    them, made once per optimizer step. bfloat16 or float16 on an NVIDIA GPU, all sizes and tokens multiples of 64.
    """
    if w_in.shape[0] not in (w_out.shape[1], 2 * w_out.shape[1]):
        raise ValueError(f"w_in is {tuple(w_in.shape)}, w_out {tuple(w_out.shape)}; fix: F or 2 F rows for F columns")
    _check(x, w_in, w_out, first, second)
    if reason := cuda_patterns.refusal(cslt.aligned(x.reshape(-1, x.shape[-1]))):
        raise cslt.CsltError(f"ffn24 needs {reason}; fix: F.linear with the pruned weights")
    return _FFN.apply(x, w_in, w_out, first, second, act)  # type: ignore[return-value]


def _check(x: Tensor, w_in: Tensor, w_out: Tensor, first: Pruned, second: Pruned) -> None:
    if x.shape[-1] != w_in.shape[1] or w_out.shape[0] != w_in.shape[1]:
        shapes = f"x has {x.shape[-1]} features, w_in {w_in.shape[1]} columns, w_out {w_out.shape[0]} rows"
        raise ValueError(f"ffn24: {shapes}; fix: pass the three of one block, all d")
    for w, pruned in ((w_in, first), (w_out, second)):
        if pruned.shape != tuple(w.shape):
            raise ValueError(f"ffn24: {pruned.shape} pruned of {tuple(w.shape)}; fix: ffn24.prune the same weight")
        if pruned.source[0].dtype != x.dtype or pruned.forward.device != x.device:
            kinds = f"x is {x.dtype} on {x.device}, a weight {pruned.source[0].dtype} on {pruned.forward.device}"
            raise ValueError(f"ffn24: {kinds}; fix: convert x, or prune the weight as x is")
