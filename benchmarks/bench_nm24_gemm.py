"""2:4 products on one GPU against the best of cuBLAS and cuBLASLt: decode, prefill, 8 bits, the host.

    python benchmarks/bench_nm24_gemm.py --out FOLDER

Under CUDA graphs, where every call takes the next of several copies of its weight, together over 150 MB. Baseline: the
fastest of torch's dense products, in both orders of the operands. Summaries: "decode_geomean" over all shapes and 1 to
64 tokens by `cuda_nm24`; "prefill_geomean" over shapes whose sides are 4,096 or more at 4,096 or more tokens by
`cuda_nm24_vendor`, in a graph and eager (variant); "fp8_geomean" of `cuda_fp8` against `torch._scaled_mm` on the same,
both with a scale for each operand, and with scales of rows (variant; no bar); "worst_dispatched" of layers as
`gossamer.prepare` leaves them against `nn.Linear`, in a graph and eager (variant), many layers one after the other, and
of `cuda_fp8` given the dense matrix, too (variants "8 bits"); and
"host_us", microseconds of the host for a call of `cuda_nm24_vendor` as a layer makes it; lines beside it say what the
layer itself and the op through torch's dispatcher take, and torch's own dense product.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import gossamer
from gossamer import cslt, cuda_fp8, native
from gossamer.dispatch import Step, route
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.kernels import Kernel
from gossamer.kernels.cuda_lscd import CudaLscd
from gossamer.kernels.cuda_nm24 import CudaNm24
from gossamer.kernels.cuda_nm24_vendor import CudaNm24Vendor
from gossamer.nn import SparseLinear
from nm24_timing import COLD_BYTES, ROUNDS, Call, captured, copies, eager, graphed, host_us, in_a_row, in_turns
from results import append, environment

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)]
DECODE, PREFILL = (1, 2, 4, 8, 16, 32, 64), (512, 1024, 2048, 4096, 8192, 16384)
LARGE = 4096
DISPATCHED_8 = (512, 4096, 16384)
DISPATCHED = [(1024, 4096), *SHAPES[:4]], (1, 16, 64, 128, 512, 4096)
MUST = {"decode_geomean": 1.35, "prefill_geomean": 1.42, "fp8_geomean": 1.25, "host_us": 15.0, "worst_dispatched": 0.97}
TOLERANCE = 4e-3  # relative (Frobenius), of two products in bfloat16


def two_of_four(m: int, k: int) -> Tensor:
    fours = torch.randn(m * k // 4, 4, device="cuda", dtype=torch.bfloat16)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, torch.rand_like(fours).topk(2, 1).indices, True)
    return (fours * keep).view(m, k)


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

    def line(
        self, case: dict, ours: float, spread: float, baseline: str, value: float, group: str = "", **more: str
    ) -> None:
        line = {"bench": "nm24_gemm", "case": case, "ours": ours, "baseline": baseline, "baseline_value": value} | more
        append(self.path, line | {"unit": "us", "ratio": value / ours, "spread": spread} | environment("cuda"))
        print(case, f"{ours:.1f} us, {baseline} {value:.1f}: {value / ours:.2f}x", flush=True)
        if group:
            self.ratios.setdefault(group, []).append(value / ours)

    def summary(
        self, group: str, case: dict, value: float, n: int, unit: str = "x", sense: str = ">=", barred: bool = True
    ) -> None:
        must = MUST[group] if barred else None
        line = {"bench": "nm24_gemm", "summary": group, "case": case, "value": value, "sense": sense}
        append(self.path, line | {"must": must, "unit": unit, "n": n} | environment("cuda"))
        print(group, case, f"{value:.3f}", f"(must be {sense} {must})" if barred else "", flush=True)

    def geomean(self, group: str, case: dict, key: str, barred: bool = True) -> None:
        if ratios := self.ratios.get(key):
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            self.summary(group, case, mean, len(ratios), barred=barred)


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
                report.line(case | {"variant": "decode, against cuda_lscd"}, ours, spread, "cuda_lscd", other)
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
        a = two_of_four(m, k)
        for n in PREFILL[3:]:
            for of, product in EIGHT.items():
                case = {"shape": [m, k], "tokens": n, "dtype": "float8_e4m3fn", "variant": f"prefill, graph{of}"}
                x = torch.randn(n, k, device="cuda", dtype=a.dtype)
                dense, (ours, spread) = product(x, a, False)
                report.line(case, ours, spread, "torch._scaled_mm", dense, f"fp8{of}", scales="quantized")
    for of in EIGHT:
        report.geomean("fp8_geomean", {"variant": "scales of rows"} if of else {}, f"fp8{of}", barred=not of)


def fp8_dispatched(report: Report) -> None:
    for m, k in SHAPES:
        a = two_of_four(m, k)
        for n in DISPATCHED_8:
            for of, product in EIGHT.items():
                case = {"shape": [m, k], "tokens": n, "dtype": "float8_e4m3fn", "variant": f"dispatched, graph{of}"}
                x = torch.randn(n, k, device="cuda", dtype=a.dtype)
                dense, (ours, spread) = product(x, a, True)
                more = {"scales": "quantized", "kernel": "sparse" if cuda_fp8.pays(m, k, n, 0, bool(of)) else "dense"}
                report.line(case, ours, spread, "torch._scaled_mm", dense, f"dispatched{of}", **more)
    for of in EIGHT:
        ratios = report.ratios[f"dispatched{of}"]
        report.summary("worst_dispatched", {"variant": f"graph, 8 bits{of}"}, min(ratios), len(ratios))


def fp8_whole(x: Tensor, a: Tensor, chosen: bool) -> tuple[float, tuple[float, float]]:
    """With a scale for x and one for the weight: dense, which reads them on the GPU, and ours."""
    (x8, x_scale), (a8, scale) = cuda_fp8.quantized_whole(x), cuda_fp8.quantized_whole(a)
    scales = [torch.tensor(s, device="cuda") for s in (x_scale, scale)]

    def ours(packed: Tensor, dense: Tensor | None = None) -> Tensor:
        return cuda_fp8.multiply_whole(x8, x_scale, packed, scale, len(a), None, dense)

    return compared(x8, a8, scales, ours, chosen)


def fp8_rows(x: Tensor, a: Tensor, chosen: bool) -> tuple[float, tuple[float, float]]:
    """With a scale for every row of x and of the weight: dense, and ours."""
    (x8, x_scale), (a8, scale) = cuda_fp8.quantized(x), cuda_fp8.quantized(a)

    def ours(packed: Tensor, dense: Tensor | None = None) -> Tensor:
        return cuda_fp8.multiply(x8, x_scale, packed, scale, None, dense)

    return compared(x8, a8, [x_scale.unsqueeze(1), scale.unsqueeze(0)], ours, chosen)


EIGHT = {"": fp8_whole, ", scales of rows": fp8_rows}


def compared(
    x: Tensor, a: Tensor, scales: Sequence[Tensor], ours: Callable[..., Tensor], chosen: bool
) -> tuple[float, tuple[float, float]]:
    """torch's product and ours; `chosen`: ours is given the dense matrix, too, and both take turns."""
    scaled = partial(
        torch._scaled_mm, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    held = [cslt.compress(a), a] if chosen else [cslt.compress(a)]
    y, expected = ours(*held)[:256], scaled(x, a.mT)[:256]
    assert float((y.double() - expected.double()).norm() / expected.double().norm()) < 2e-2
    calls = [partial(ours, *own) for own in copies(held)]
    dense = [partial(scaled, x, own[0].mT) for own in copies([a])]
    if not chosen:
        found = graphed(calls)
        return graphed(dense)[0], found
    found, (value, _) = in_turns(captured(calls), captured(dense), 3)
    return value, found


def dispatched(report: Report) -> None:
    shapes, sizes = DISPATCHED
    for m, k in shapes:
        weights = [two_of_four(m, k) for _ in range(max(2, -(-COLD_BYTES // (2 * m * k))))]
        layers = nn.ModuleList([SparseLinear.from_format(NM.encode(a)) for a in weights])
        gossamer.prepare(layers, tokens=sizes, dtype=weights[0].dtype)
        dense = [linear_of(a) for a in weights]
        for n in sizes:
            x = torch.randn(n, k, device="cuda", dtype=weights[0].dtype)
            for variant, how in (("graph", captured), ("eager", in_a_row)):
                with torch.inference_mode():
                    checked(layers[0](x), weights[0], x)
                    (ours, spread), (value, _) = in_turns(how(calls_of(layers, x)), how(calls_of(dense, x)))
                case = {"shape": [m, k], "tokens": n, "dtype": "bfloat16", "variant": f"dispatched, {by_host(variant)}"}
                kernel = route(layers[0].layout).way(n)[0].kernel  # type: ignore[arg-type]
                report.line(case, ours, spread, "torch.nn.Linear", value, f"dispatched {variant}", kernel=kernel)
    for variant in ("graph", "eager"):
        ratios = report.ratios[f"dispatched {variant}"]
        report.summary("worst_dispatched", {"variant": by_host(variant)}, min(ratios), len(ratios))


def by_host(variant: str) -> str:
    """Where the host's time counts, an installation without native code is another thing."""
    return variant if native.available() or variant == "graph" else f"{variant}, without native code"


def linear_of(a: Tensor) -> nn.Linear:
    found = nn.Linear(a.shape[1], a.shape[0], bias=False, device="meta")
    found.weight = nn.Parameter(a, requires_grad=False)
    return found


def calls_of(layers: Iterable[nn.Module], x: Tensor) -> list[Call]:
    return [partial(layer, x) for layer in layers]


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
        case = {"shape": [4096, 4096], "tokens": 512, "dtype": "bfloat16", "variant": by_host(f"host, {name}")}
        report.line(case, ours, spread, "torch.nn.functional.linear", dense)
    built = native.available()
    case = {} if built else {"variant": by_host("host")}
    report.summary("host_us", case, found["call"][0], ROUNDS, "us", "<=", barred=built)


PARTS = {"host": host, "decode": decode, "prefill": prefill, "fp8": fp8, "dispatched": dispatched}
PARTS |= {"fp8_dispatched": fp8_dispatched}


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
