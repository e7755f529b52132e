"""Which of cuSPARSELt's algorithms to take: tried out on random operands, checked, timed.

No algorithm is used before its result was compared with a dense product on the same GPU: some of some versions are
wrong (pytorch#155333). It takes a moment and waits for the GPU, so it belongs into `pack` or before training, not into
an op.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from . import cslt, cslt_library
from .cslt import Algorithm, CsltError, Problem

log = logging.getLogger("gossamer")

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float8_e4m3fn: 6e-2}
WORTH = 0.98  # of the dense product's time: what a sparse one may take
LAUNCH = 100_000  # cycles of the GPU, some 50 us: more than the host needs for one
TIMED = 5  # runs of an algorithm that are timed, of which the median counts


@cache
def best(problem: Problem, index: int) -> tuple[Algorithm, float] | None:
    """The fastest algorithm that computes this product correctly, and its microseconds; None if there is none.

    torch.OutOfMemoryError, which is not remembered, where there is no room for the operands of the trial.
    """
    problem = problem._replace(bias=0)
    if problem.refuses():
        return None
    try:
        with torch.cuda.device(index):
            found = [r for r in trials(problem, index) if r[2] is None]
    except CsltError as error:  # a product that it does not have
        log.info("cuSPARSELt is not used for %s: %s", problem, error)
        return None
    return min(((a, t) for a, t, _ in found), key=lambda r: r[1], default=None)


def trials(problem: Problem, index: int) -> Iterator[tuple[Algorithm, float, str | None]]:
    """(algorithm, microseconds, what is wrong with it) for every algorithm."""
    a, b = operands(problem, index)
    expected, packed = _dense(problem, a, b), cslt.compress(a, trusted=True)
    for algorithm in _candidates(problem, index):
        try:
            ready = cslt.Plan(problem, algorithm, index)
            d = torch.full_like(expected, torch.nan if expected.is_floating_point() else 77)
            ready.run(packed, b, d)
            error = _error(d, expected)
        except CsltError as failure:
            yield algorithm, 0.0, str(failure)
            continue
        if not error < TOLERANCE.get(problem.out, 1e-6):
            log.info("cuSPARSELt's %s is wrong by %.2g on %s; it is not used", algorithm, error, problem)
            yield algorithm, 0.0, f"relative error {error:.3g}"
            continue
        yield algorithm, microseconds(partial(ready.run, packed, b, d)), None


# What ends in an illegal instruction, which no process survives: algorithms from these on, by version and type. Seen on
# an H100, 4096 x 4096 by 1024 tokens: one of 28 to 51.
UNSAFE = {((0, 8), torch.float16): 28}


def _candidates(problem: Problem, index: int) -> Iterator[Algorithm]:
    """Without one that is known to kill the process."""
    count = cslt.Plan(problem, Algorithm(0), index).configs()
    for config in range(min(count, UNSAFE.get((cslt_library.version(), problem.dtype), count))):
        yield Algorithm(config)


@cache
def dense_time(problem: Problem, index: int) -> float:
    """Microseconds of torch's dense product of the same shapes, in bfloat16 where there are 8 bits."""
    with torch.cuda.device(index):
        a, b = operands(problem, index)
        return microseconds(lambda: _dense(problem, a, b))


def operands(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """Random, A of a random 2:4 pattern."""
    generator = torch.Generator(device=f"cuda:{index}").manual_seed(24)
    draw = {"device": f"cuda:{index}", "generator": generator}
    scores = torch.rand(problem.rows, problem.depth // 4, 4, **draw)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    right = (problem.columns, problem.depth) if problem.b_rows else (problem.depth, problem.columns)
    if problem.dtype == torch.int8:
        a, b = (torch.randint(-9, 10, shape, dtype=torch.int8, **draw) for shape in (keep.shape, right))
    else:
        a, b = (torch.randn(shape, dtype=torch.bfloat16, **draw).to(problem.dtype) for shape in (keep.shape, right))
    a = torch.where(keep, a.view(torch.int8) if a.itemsize == 1 else a, 0)
    return a.view(problem.dtype).view(problem.rows, problem.depth), b


def _dense(problem: Problem, a: Tensor, b: Tensor) -> Tensor:
    """D as a dense product makes it, rounded once."""
    wide = torch.float32 if problem.dtype == torch.int8 else torch.bfloat16 if a.itemsize == 1 else problem.dtype
    a, b = a.to(wide), b.to(wide)
    right = b.mT if problem.b_rows else b
    d = right.mT @ a.mT if problem.d_rows else a @ right
    return (d.clamp(-128, 127) if problem.out == torch.int8 else d).to(problem.out)


def _error(d: Tensor, expected: Tensor) -> float:
    """Relative, Frobenius."""
    d, expected = d.float(), expected.float()
    return float((d - expected).norm() / expected.norm())


def microseconds(*runs: Callable[[], object]) -> float:
    """Median microseconds on the GPU of one of these, made in turn: of one alone, what it reads is in the cache."""
    for run in runs:
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    torch.cuda._sleep(LAUNCH * TIMED * len(runs))  # behind a wait on the GPU the launches queue up
    marks[0].record()
    for mark in marks[1:]:
        for run in runs:
            run()
        mark.record()
    marks[-1].synchronize()
    times = sorted(first.elapsed_time(second) for first, second in pairwise(marks))
    return times[TIMED // 2] * 1e3 / len(runs)
