"""2:4 products on one GPU against the best of cuBLAS and cuBLASLt: decode, prefill, 8 bits, the host.

    python benchmarks/bench_nm24_gemm.py --out FOLDER

Under CUDA graphs, where every call takes the next of several copies of its weight, together over 150 MB. Baseline: the
fastest of torch's dense products, in both orders of the operands. Summaries: "decode_geomean" over all shapes and 1 to
64 tokens by `cuda_nm24`; "prefill_geomean" over shapes whose sides are 4,096 or more at 4,096 or more tokens by
`cuda_nm24_vendor`, in a graph and eager (variant); "fp8_geomean" of cuSPARSELt against `torch._scaled_mm` on the same,
with one scale and with scales of rows (variant); and "host_us", microseconds of the host for a call of
`cuda_nm24_vendor` as a layer makes it; lines beside it say what the layer itself and the op through torch's dispatcher
take, and torch's own dense product.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer import cslt, cslt_search, cuda_fp8
from gossamer.cslt import Problem
from gossamer.dispatch import Step
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.kernels import Kernel
from gossamer.kernels.cuda_lscd import CudaLscd
from gossamer.kernels.cuda_nm24 import CudaNm24
from gossamer.kernels.cuda_nm24_vendor import CudaNm24Vendor
from gossamer.nn import SparseLinear
from results import append, environment

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)]
DECODE, PREFILL = (1, 2, 4, 8, 16, 32, 64), (512, 1024, 2048, 4096, 8192, 16384)
LARGE = 4096
ROUNDS = 40  # of 50 calls, of which the host's time is taken
COLD_BYTES = 150 << 20
MUST = {"decode_geomean": 1.35, "prefill_geomean": 1.42, "fp8_geomean": 1.25, "host_us": 15.0}
TOLERANCE = 4e-3  # relative (Frobenius), of two products in bfloat16
FP8 = torch.float8_e4m3fn
Call = Callable[[], object]


def two_of_four(m: int, k: int) -> Tensor:
    fours = torch.randn(m * k // 4, 4, device="cuda", dtype=torch.bfloat16)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, torch.rand_like(fours).topk(2, 1).indices, True)
    return (fours * keep).view(m, k)


def graphed(calls: Sequence[Call], repeats: int = 5) -> tuple[float, float]:
    """Median microseconds a call, and interquartile range / median; all calls in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return timed(graph.replay, len(calls), repeats)


def eager(calls: Sequence[Call], repeats: int = 5) -> tuple[float, float]:
    """The same without a graph, waiting before every round: what the host costs shows where it is the longer."""
    for call in calls:
        call()

    def run() -> None:
        for call in calls:
            call()

    return timed(run, len(calls), repeats)


def timed(run: Call, count: int, repeats: int) -> tuple[float, float]:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def copies(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    size = sum(t.numel() * t.element_size() for t in tensors)
    return [tuple(t.clone() for t in tensors) for _ in range(max(2, -(-COLD_BYTES // size)))]


def dense_calls(a: Tensor, x: Tensor) -> list[list[Call]]:
    """Both orders of the operands."""
    weights = [c[0] for c in copies([a])]
    return [[partial(linear, x, w) for w in weights], [partial(torch.mm, w, x.mT) for w in weights]]


def best_dense(a: Tensor, x: Tensor, how: Callable[[Sequence[Call]], tuple[float, float]]) -> float:
    found = []
    for backend in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(backend)
        found += [how(calls)[0] for calls in dense_calls(a, x)]
    torch.backends.cuda.preferred_blas_library("default")
    return min(found)


def kernel_calls(kernel: type[Kernel], packed: Sequence[Tensor], meta: dict, x: Tensor) -> list[Call]:
    return [partial(kernel.run, x, own, meta, None) for own in copies(packed)]


def checked(y: Tensor, a: Tensor, x: Tensor) -> None:
    rows = slice(0, 256)
    error = float((y[rows].double() - x[rows].double() @ a.double().mT).norm() / y[rows].double().norm())
    assert error < TOLERANCE, f"relative error {error:.2e}"


class Report:
    def __init__(self, path: Path) -> None:
        self.path, self.ratios = path, dict[str, list[float]]()

    def line(self, case: dict, ours: float, spread: float, baseline: str, value: float, group: str = "") -> None:
        line = {"bench": "nm24_gemm", "case": case, "ours": ours, "baseline": baseline, "baseline_value": value}
        append(self.path, line | {"unit": "us", "ratio": value / ours, "spread": spread} | environment("cuda"))
        print(case, f"{ours:.1f} us, {baseline} {value:.1f}: {value / ours:.2f}x", flush=True)
        if group:
            self.ratios.setdefault(group, []).append(value / ours)

    def summary(self, group: str, case: dict, value: float, n: int, unit: str = "x", sense: str = ">=") -> None:
        line = {"bench": "nm24_gemm", "summary": group, "case": case, "value": value, "sense": sense}
        append(self.path, line | {"must": MUST[group], "unit": unit, "n": n} | environment("cuda"))
        print(group, case, f"{value:.3f}", f"(must be {sense} {MUST[group]})", flush=True)

    def geomean(self, group: str, case: dict, key: str) -> None:
        if ratios := self.ratios.get(key):
            self.summary(group, case, math.exp(statistics.fmean(map(math.log, ratios))), len(ratios))


def decode(report: Report) -> None:
    for m, k in SHAPES:
        a = two_of_four(m, k)
        stored = NM.encode(a)
        packed, mask = CudaNm24.pack(stored, a.dtype), CudaLscd.pack(Bitmask.encode(a), a.dtype)
        for n in DECODE:
            x = torch.randn(n, k, device="cuda", dtype=a.dtype)
            checked(CudaNm24.run(x, packed.tensors, packed.meta, None), a, x)
            dense = best_dense(a, x, graphed)
            case = {"shape": [m, k], "tokens": n, "dtype": "bfloat16", "variant": "decode"}
            ours, spread = graphed(kernel_calls(CudaNm24, packed.tensors, packed.meta, x))
            report.line(case, ours, spread, "dense", dense, "decode")
            if n in (1, 16, 64):
                other = graphed(kernel_calls(CudaLscd, mask.tensors, mask.meta, x))[0]
                report.line(case, ours, spread, "cuda_lscd", other)
    report.geomean("decode_geomean", {}, "decode")


def prefill(report: Report) -> None:
    for m, k in SHAPES:
        a = two_of_four(m, k)
        packed = CudaNm24Vendor.pack(NM.encode(a), a.dtype)
        for n in PREFILL:
            x = torch.randn(n, k, device="cuda", dtype=a.dtype)
            checked(CudaNm24Vendor.run(x, packed.tensors, packed.meta, None), a, x)
            for variant, how in (("graph", graphed), ("eager", eager)):
                case = {"shape": [m, k], "tokens": n, "dtype": "bfloat16", "variant": f"prefill, {variant}"}
                ours, spread = how(kernel_calls(CudaNm24Vendor, packed.tensors, packed.meta, x))
                report.line(case, ours, spread, "dense", best_dense(a, x, how), variant if n >= LARGE else "")
    for variant in ("graph", "eager"):
        report.geomean("prefill_geomean", {} if variant == "graph" else {"variant": variant}, variant)


def fp8(report: Report) -> None:
    for m, k in SHAPES:
        for n in PREFILL[3:]:
            problem = Problem(m, k, n, FP8, torch.bfloat16)
            if not (found := cslt_search.best(problem, 0)):
                print("no algorithm for", problem)
                continue
            a, x = two_of_four(m, k).to(FP8), torch.randn(n, k, device="cuda").to(FP8)
            one = torch.ones((), device="cuda")
            scaled = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
            calls = [partial(cslt.matmul, w[0], problem, x, found[0]) for w in copies([cslt.compress(a)])]
            ours, spread = graphed(calls)
            dense = graphed([partial(scaled, x, w[0].mT) for w in copies([a])])[0]
            case = {"shape": [m, k], "tokens": n, "dtype": "float8_e4m3fn", "variant": "prefill, graph"}
            report.line(case, ours, spread, "torch._scaled_mm", dense, "fp8")
            scales = torch.rand(n, 1, device="cuda") + 0.5, torch.rand(1, m, device="cuda") + 0.5
            dense, (ours, spread) = fp8_rows(x, a, *scales)
            report.line(
                case | {"variant": "prefill, graph, scales of rows"}, ours, spread, "torch._scaled_mm", dense, "rows"
            )
    report.geomean("fp8_geomean", {}, "fp8")
    report.geomean("fp8_geomean", {"variant": "scales of rows"}, "rows")


def fp8_rows(x: Tensor, a: Tensor, x_scale: Tensor, scale: Tensor) -> tuple[float, tuple[float, float]]:
    """With a scale for every row of x [N, 1] and of A [1, M]: dense, and ours."""
    scaled = partial(torch._scaled_mm, scale_a=x_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True)
    flat = x_scale.flatten(), scale.flatten()
    packed = cslt.compress(a)
    y, expected = cuda_fp8.multiply(x, flat[0], packed, flat[1])[:256], scaled(x, a.mT)[:256]
    assert float((y.double() - expected.double()).norm() / expected.double().norm()) < 2e-2
    ours = graphed([partial(cuda_fp8.multiply, x, flat[0], own[0], flat[1]) for own in copies([packed])])
    return graphed([partial(scaled, x, own[0].mT) for own in copies([a])])[0], ours


def host(report: Report) -> None:
    """Of a call as a layer makes it, and what else there is: torch's own dense one, the layer around it, the op."""
    a = two_of_four(4096, 4096)
    packed, x = CudaNm24Vendor.pack(NM.encode(a), a.dtype), torch.randn(512, 4096, device="cuda", dtype=a.dtype)
    call = CudaNm24Vendor.bind(packed.tensors, packed.meta, None)
    checked(call(x), a, x)
    layer = SparseLinear.from_format(NM.encode(a))
    stored = layer.parts()
    layer.use(a.dtype, [(512, (Step(CudaNm24Vendor.name, (len(stored),), packed.meta),))], packed.tensors)
    calls: dict[str, Call] = {
        "call": partial(call, x),
        "layer": partial(layer, x),
        "op": partial(torch.ops.gossamer.linear, x, [*stored, *packed.tensors], layer.layout, None),
        "dense": partial(linear, x, a),
    }
    with torch.inference_mode():
        found = {name: host_us(call) for name, call in calls.items()}
    dense, _ = found.pop("dense")
    for name, (ours, spread) in found.items():
        case = {"shape": [4096, 4096], "tokens": 512, "dtype": "bfloat16", "variant": f"host, {name}"}
        report.line(case, ours, spread, "torch.nn.functional.linear", dense)
    report.summary("host_us", {}, found["call"][0], ROUNDS, "us", "<=")


def host_us(call: Call) -> tuple[float, float]:
    """Median microseconds of the host's until a call returns, and interquartile range / median; few enough wait."""
    rounds = []
    for turn in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(50):
            call()
        if turn:
            rounds.append((time.perf_counter() - begin) / 50 * 1e6)
    low, median, high = statistics.quantiles(rounds, n=4)
    return median, (high - low) / median


PARTS = {"host": host, "decode": decode, "prefill": prefill, "fp8": fp8}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    report = Report(args.out / "nm24_gemm.jsonl")
    for name in args.parts:
        PARTS[name](report)


if __name__ == "__main__":
    main()
