"""`cuda_lscd` against the best of cuBLAS and cuBLASLt on one GPU: kernels alone, plain launches, cold weights.

    python benchmarks/bench_lscd.py --out FOLDER
    python benchmarks/bench_lscd.py --summarise        # without a GPU: of all dispatched cells, each by its newest line

Every call takes the next of several copies of its weight, together over 200 MB, under a CUDA graph. The baseline is the
fastest of torch's products with either library, in both orders of the operands, and of all that cuBLASLt's heuristic
proposes (up to 16 ways, `cublaslt.py`; torch takes the first). Summary "geomean_vs_cublaslt": baseline / ours,
geometric mean over the shapes; lines with a `variant` are other masks.
With `--dispatched`, layers that `gossamer.prepare` has prepared are timed, too, and dense products beside them, of as
many weights as layers (a GPU that has just worked hard is 2 % slower; torch's products, as a dense layer makes them):
"geomean_dispatched", and over all cells "worst_dispatched", whose case names the cells where they are not all.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cublaslt import product as proposed
from gossamer import prepare
from gossamer.dispatch import route
from gossamer.formats.bitmask import Bitmask
from gossamer.kernels._lscd_cut import best_cut
from gossamer.kernels.cuda_lscd import CudaLscd, gpu, launch, work_of
from gossamer.nn import SparseLinear
from results import append, environment

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (9216, 9216), (28672, 8192), (36864, 9216)]
TOKENS = (1, 8, 16, 32, 64, 128)
COLD_BYTES = 200 << 20
BANDWIDTH = 3.0e6  # bytes per microsecond that an H100 reads
MUST = {
    0.5: {1: 1.25, 8: 1.25, 16: 1.25, 32: 1.05},
    0.6: {1: 1.40, 8: 1.40, 16: 1.40, 32: 1.20, 64: 1.0},
    0.7: {1: 1.62, 8: 1.62, 16: 1.62, 32: 1.30, 64: 1.1},
    0.8: {1: 1.85, 8: 1.85, 16: 1.85, 32: 1.45, 64: 1.2},
    0.9: {1: 2.15, 8: 2.15, 16: 2.15, 32: 1.75, 64: 1.35},
}
TOLERANCE = 2e-3  # relative (Frobenius), against float32; rounding to bfloat16 alone is 1.7e-3
CELLS = len(SHAPES) * len(MUST) * len(TOKENS)
Call = Callable[[], object]


def uniform(m: int, k: int, sparsity: float) -> Tensor:
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    for part in a.split(4096):
        part *= torch.rand(part.shape, device="cuda") >= sparsity
    return a


def skewed(m: int, k: int, sparsity: float) -> Tensor:
    """Rows from dense to empty: every density is as frequent as its complement."""
    density = torch.linspace(1, 0, m, device="cuda") ** (sparsity / (1 - sparsity))
    keep = torch.rand(m, k, device="cuda") < density.unsqueeze(1)
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16) * keep


def blocks(m: int, k: int, sparsity: float) -> Tensor:
    keep = (torch.rand(m // 16, k // 16, device="cuda") >= sparsity).repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16) * keep


def banded(m: int, k: int, sparsity: float) -> Tensor:
    row, col = torch.arange(m, device="cuda").unsqueeze(1) * k // m, torch.arange(k, device="cuda")
    keep = (col - row) % k < k * (1 - sparsity)
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16) * keep


def two_of_four(m: int, k: int, sparsity: float) -> Tensor:
    """The two largest of each four at 50 %, and a share of them beyond."""
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    fours = a.view(-1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, 1).indices, True).view(m, k)
    return a * (keep & (torch.rand(m, k, device="cuda") < 2 * (1 - sparsity)))


MASKS: dict[str, Callable[[int, int, float], Tensor]] = {
    "2:4": two_of_four,
    "row-skewed": skewed,
    "16x16 blocks": blocks,
    "banded": banded,
}


def timed(calls: Sequence[Call], replays: int = 7) -> tuple[float, float]:
    """Median microseconds of a call, and the interquartile range / median, over replays of one graph of them all."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    rounds = -(-20 // len(calls))
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) * 1e3 / len(calls) / rounds for begin, end in events]
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def copies(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    size = sum(t.numel() * t.element_size() for t in tensors)
    return [tensors, *([t.clone() for t in tensors] for _ in range(-(-COLD_BYTES // size)))]


def dense_time(weights: Sequence[Tensor], x: Tensor) -> tuple[float, str]:
    """(microseconds, library and order of operands) of the fastest dense product that torch makes."""
    y, y_t = x.new_empty(len(x), len(weights[0])), x.new_empty(len(weights[0]), len(x))
    orders = {
        "x W^T": lambda w: torch.mm(x, w.t(), out=y),
        "W x^T": lambda w: torch.mm(w, x.t(), out=y_t),
    }
    found = []
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for order, product in orders.items():
            found.append((timed([lambda w=w, p=product: p(w) for w in weights])[0], f"{library}, {order}"))
    torch.backends.cuda.preferred_blas_library("default")
    return min(found)


def proposed_time(weights: Sequence[Tensor], x: Tensor) -> tuple[float, str]:
    """(microseconds, which) of the fastest way that cuBLASLt proposes: of all in short runs, then of that one."""
    y = x.new_empty(len(x), len(weights[0]))
    calls = proposed(len(weights[0]), len(x), x.shape[1]).calls(x, weights, y)
    best = min(calls, key=lambda name: timed(calls[name], 3)[0])
    return timed(calls[best])[0], best


def our_time(sets: Sequence[Sequence[Tensor]], meta: dict, a: Tensor, x: Tensor) -> tuple[float, float, float]:
    """(microseconds, spread, relative error)."""
    y = torch.full((len(x), len(a)), math.nan, dtype=x.dtype, device="cuda")
    found = timed([lambda s=s: launch(x, s, meta, None, y) for s in sets])
    expected = x.float() @ a.float().mT
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise ArithmeticError(f"relative error {error:.1e} at {tuple(a.shape)}, {len(x)} tokens")
    return *found, error


class Bench:
    """Times cells and appends their lines."""

    def __init__(self, path: Path, tokens: Sequence[int]) -> None:
        self.path, self.tokens = path, tokens
        self.dense: dict[tuple[int, int, int], tuple[float, str]] = {}
        self.ratios: dict[tuple[float, int], list[float]] = {}
        self.dispatched: dict[tuple[float, int], list[float]] = {}

    def baseline(self, shape: tuple[int, int], inputs: dict[int, Tensor]) -> None:
        weights = [s[0] for s in copies([uniform(shape[0], shape[1], 0.0)])]
        for n, x in inputs.items():
            found = dense_time(weights, x), proposed_time(weights, x)
            self.dense[shape[0], shape[1], n] = min(found)
            print(f"{shape}, {n} tokens, dense:", *(f"{us:.1f} us by {name}" for us, name in found))

    def cells(self, a: Tensor, case: dict, inputs: dict[int, Tensor]) -> None:
        packed = CudaLscd.pack(Bitmask.encode(a), torch.bfloat16)
        sets = copies(packed.tensors)
        for n, x in inputs.items():
            us, spread, error = our_time(sets, packed.meta, a, x)
            base, name = self.dense[a.shape[0], a.shape[1], n]
            line = {"bench": "lscd", "case": case | {"tokens": n}, "ours": us, "baseline": name, "baseline_value": base}
            line |= {"unit": "us", "ratio": base / us, "spread": spread, "gb_per_s": packed.nbytes / us / 1e3}
            floor = (a.numel() / 8 + 2 * float(a.count_nonzero())) / BANDWIDTH
            line |= {"roofline_share": floor / us, "cut": list(best_cut(work_of(n, packed.meta), gpu(0)))}
            line |= {"items": "words" if packed.meta["words"] else "halves", "error": error}
            append(self.path, line | environment("cuda"))
            if "variant" not in case:
                self.ratios.setdefault((case["sparsity"], n), []).append(base / us)
            print(case | {"tokens": n}, f"{us:.1f} us, {base / us:.2f}x of {base:.1f}", flush=True)

    @torch.no_grad()
    def prepared(self, a: Tensor, case: dict, inputs: dict[int, Tensor]) -> None:
        """The same cells through layers that choose, as many as are not all in the cache."""
        layer = SparseLinear.from_format(Bitmask.encode(a))
        layers = [layer, *(copy.deepcopy(layer) for _ in range(-(-COLD_BYTES // layer.stored_bytes)))]
        with tempfile.TemporaryDirectory() as folder:
            prepare(nn.ModuleList(layers), tokens=inputs, dtype=a.dtype, lock=Path(folder) / "lock.json")
        weights = [uniform(a.shape[0], a.shape[1], 0.0) for _ in layers]
        for n, x in inputs.items():
            us, spread = timed([lambda one=one, x=x: one(x) for one in layers])
            base, name = dense_time(weights, x)
            line = {"bench": "lscd", "case": case | {"tokens": n, "variant": "dispatched"}, "ours": us, "unit": "us"}
            line |= {"baseline": name, "baseline_value": base, "ratio": base / us, "spread": spread}
            append(self.path, line | {"kernel": route(layer.layout).way(n)[0].kernel} | environment("cuda"))
            self.dispatched.setdefault((case["sparsity"], n), []).append(base / us)

    def summaries(self) -> None:
        self._geomeans("geomean_vs_cublaslt", self.ratios, MUST)
        self._geomeans("geomean_dispatched", self.dispatched, {})
        if every := [r for ratios in self.dispatched.values() for r in ratios]:
            sparsities, tokens = (sorted(set(of)) for of in zip(*self.dispatched, strict=True))
            own = {"sparsities": sparsities, "tokens": tokens, "cells": len(every)}
            self._summary("worst_dispatched", {} if len(every) == CELLS else own, min(every), 0.97, len(every))

    def _geomeans(self, name: str, found: dict[tuple[float, int], list[float]], musts: dict) -> None:
        """Prints all, and writes those of all shapes: of some of them it is no figure of its own."""
        for (sparsity, n), ratios in sorted(found.items()):
            value, must = math.prod(ratios) ** (1 / len(ratios)), musts.get(sparsity, {}).get(n)
            print(f"{name}: {sparsity}, {n} tokens: {value:.3f} (must {must}), {min(ratios):.3f}-{max(ratios):.3f}")
            if len(ratios) == len(SHAPES):
                self._summary(name, {"sparsity": sparsity, "tokens": n}, value, must, len(ratios))

    def _summary(self, name: str, case: dict, value: float, must: float | None, n: int) -> None:
        line = {"bench": "lscd", "summary": name, "case": case, "value": value, "sense": ">=", "must": must}
        append(self.path, line | {"unit": "x", "n": n} | environment("cuda"))


def summarise(path: Path) -> None:
    """Appends "worst_dispatched" of every cell, each by its newest line; ValueError if some were never measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cells = {
        (tuple(x["case"]["shape"]), x["case"]["sparsity"], x["case"]["tokens"]): x
        for x in lines
        if x["case"].get("variant") == "dispatched"
    }
    machines = {x["machine"] for x in cells.values()}
    if len(cells) != CELLS or len(machines) != 1:
        raise ValueError(f"{len(cells)} of {CELLS} cells on {sorted(machines)}; fix: run --dispatched on one GPU")
    newest = max(cells.values(), key=lambda x: x["date"])
    line = {"bench": "lscd", "summary": "worst_dispatched", "case": {}, "sense": ">=", "must": 0.97, "unit": "x"}
    line |= {"value": min(x["ratio"] for x in cells.values()), "n": CELLS} | environment()
    line |= {"machine": newest["machine"], "versions": newest["versions"]}
    append(path, line | {"commits": sorted({x["commit"] for x in cells.values()})})


def main() -> None:
    parser = argparse.ArgumentParser(description="cuda_lscd against cuBLAS and cuBLASLt")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices")
    parser.add_argument("--sparsities", type=float, nargs="*", default=list(MUST))
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--masks", nargs="*", default=list(MASKS), help="beside uniform ones, at 8192 x 8192")
    parser.add_argument("--dispatched", action="store_true", help="prepared layers, too")
    parser.add_argument("--summarise", action="store_true", help="the lines there are; measures nothing")
    args = parser.parse_args()
    if args.summarise:
        return summarise(args.out / "lscd.jsonl")
    args.tokens = [n for n in args.tokens if n <= gpu(0).tokens]  # more take several launches
    torch.manual_seed(0)
    bench = Bench(args.out / "lscd.jsonl", args.tokens)
    for shape in [SHAPES[i] for i in args.shapes]:
        inputs = {n: torch.randn(n, shape[1], device="cuda", dtype=torch.bfloat16) for n in args.tokens}
        bench.baseline(shape, inputs)
        for sparsity in args.sparsities:
            a, case = uniform(shape[0], shape[1], sparsity), {"shape": list(shape), "sparsity": sparsity}
            bench.cells(a, case, inputs)
            if args.dispatched:
                bench.prepared(a, case, inputs)
            if shape == (8192, 8192):
                for mask in args.masks:
                    case = {"shape": list(shape), "sparsity": sparsity, "variant": mask}
                    bench.cells(
                        MASKS[mask](shape[0], shape[1], sparsity), case, {n: inputs[n] for n in inputs if n == 16}
                    )
    bench.summaries()


if __name__ == "__main__":
    main()
