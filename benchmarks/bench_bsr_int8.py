"""Block-sparse int8 products on this CPU against dense int8 ones.

    python benchmarks/bench_bsr_int8.py [--onednn PREFIX] [--peers PYTHON] [--tokens 64 384] [--threads 2]
    python benchmarks/bench_bsr_int8.py --summarise

PREFIX is where `pip install onednn-cpu-gomp onednn-devel-cpu-gomp` put include/ and lib/, in an environment of its own;
benchmarks/onednn_int8.cpp is built against it. PYTHON is one that has onnx, onnxruntime and openvino
(benchmarks/bsr_int8_peers.py). Another dense peer is torch's oneDNN `qlinear`, uint8 in and out; the sparse one is
torch's FBGEMM, uint8 in and out, blocks of 1 output by 4 inputs.
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI keeps oneDNN, torch and ours off AMX: a stand-in for CPUs that have none. It does
nothing to ONNX Runtime, so --peers is refused with it.

Measured lines: microseconds of uint8 to uint8 with bias, scales and rounding (variants 4x1 and 4x4, called from Python
with ready arguments: about 1 us), and of float32 to float32, quantised per token on the way (4x1 linear, 4x4 linear:
into memory that is there; `op`: SparseLinear as a model calls it). One thread: medians of thread CPU time; more: 5th
percentiles of wall time. All is timed --rounds times, in turns where it is timed by this process, and the lowest
figure of each counts, theirs as ours: on a core that is shared with strangers one turn says little, and --cores takes
turns on several, as a stranger slows down one core, dense products on its matrix unit most. Masks are uniform.
The ratio is over the fastest dense peer of the same run. --summarise makes the summaries of the newest lines of every
case. What no table needs is not measured unless it is asked for (--variants, --sparsities).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gossamer.activation import LAYOUTS, elements, row_stride
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.kernels import _bsr
from gossamer.nn import SparseLinear
from results import append, environment

RESULTS = Path(__file__).parent / "results"
SHAPES = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)]
TOKENS = [1, 16, 32, 64, 128, 384, 512]
SPARSITIES = [0.7, 0.8, 0.9]
VARIANTS = ["kernel", "linear", "op"]
BLOCKS = {"4x1": (4, 1), "4x4": (4, 4)}
VNNI = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() == "AVX512_CORE_VNNI"

AVX512 = _bsr.available() and _bsr.isa() == "avx512"  # whose bars these are

BARS_VNNI = {
    16: {0.7: 2.3, 0.8: 3.2, 0.9: 6.5}, 64: {0.7: 3.3, 0.8: 4.9, 0.9: 9.4},
    384: {0.7: 3.2, 0.8: 4.8, 0.9: 9.4}, 1: {0.7: 1.8, 0.8: 2.5, 0.9: 3.9},
}  # fmt: skip
BARS_AMX = {"4x1": {0.7: 1.1, 0.8: 1.6, 0.9: 2.8}, "4x4": {0.7: 1.4, 0.8: 2.3, 0.9: 4.0}}
BARS_SHARE = {0.7: 0.8, 0.8: 0.8, 0.9: 0.72}


class Clock:
    """Microseconds of a call: the CPU time of this thread where it does all the work, else wall time."""

    def __init__(self, seconds: float, threads: int) -> None:
        self.seconds, self.alone = seconds, threads == 1

    def __call__(self, run: Callable[[], object]) -> tuple[float, float]:
        """(median, or 5th percentile with several threads; interquartile range / median)."""
        now = time.thread_time_ns if self.alone else time.perf_counter_ns
        run()
        times: list[float] = []
        stop = time.perf_counter() + self.seconds
        while len(times) < 7 or time.perf_counter() < stop:
            start = now()
            run()
            times.append((now() - start) / 1e3)
        low, median, high = statistics.quantiles(times, n=4)
        best = median if self.alone else statistics.quantiles(times, n=20)[0]
        return best, (high - low) / median


def torch_call(m: int, k: int, n: int) -> Callable[[], object]:
    weight = torch.randint(-100, 100, (m, k), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros, bias = torch.full((m,), 0.01), torch.zeros(m, dtype=torch.int32), torch.randn(m)
    x = torch.randint(0, 255, (n, k), dtype=torch.uint8)
    pointwise = torch.ops.onednn.qlinear_pointwise
    return lambda: pointwise(x, 0.02, 128, packed, scales, zeros, bias, 0.5, 128, torch.uint8, "none", [], "")


def fbgemm_call(m: int, k: int, n: int, sparsity: float) -> Callable[[], object]:
    weight = torch.randn(m, k) * (torch.rand(m, k // 4) >= sparsity).repeat_interleave(4, 1)
    scales = (weight.abs().amax(1).double() / 127).clamp_min(1e-6)
    q = torch.quantize_per_channel(weight, scales, torch.zeros(m, dtype=torch.int64), 0, torch.qint8)
    torch.backends.quantized.engine = "fbgemm"
    packed = torch.ops.sparse.qlinear_prepack(q, torch.randn(m), 1, 4)
    x = torch.quantize_per_tensor(torch.randn(n, k), 0.03, 128, torch.quint8)
    return lambda: torch.ops.sparse.qlinear(x, packed, 0.5, 128)


def peers(
    python: str, cells: list[tuple[int, int, int]], seconds: float, threads: int
) -> dict[tuple, dict[str, float]]:
    """Microseconds of what benchmarks/bsr_int8_peers.py measures, per cell."""
    script = str(Path(__file__).with_name("bsr_int8_peers.py"))
    run = [python, script, str(seconds), str(threads), *(str(v) for cell in cells for v in cell)]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {(f.pop("m"), f.pop("k"), f.pop("n")): f for f in found}


def onednn(prefix: str, cells: list[tuple[int, int, int]], seconds: float, threads: int) -> dict[tuple, float]:
    """Microseconds of oneDNN itself, per cell."""
    prefix, source = str(Path(prefix).resolve()), Path(__file__).with_name("onednn_int8.cpp")
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/onednn_int8"
        flags = ["-O2", "-std=c++17", f"-I{prefix}/include", f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib"]
        subprocess.run(["g++", *flags[:3], str(source), "-o", binary, *flags[3:], "-ldnnl", "-fopenmp"], check=True)
        run = [binary, str(2 * seconds), *(str(v) for cell in cells for v in cell)]
        lines = subprocess.run(
            run, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
    found = [json.loads(line) for line in lines.stdout.splitlines()]
    return {(f["m"], f["k"], f["n"]): f["cpu" if threads == 1 else "wall"] for f in found}


def sparse(m: int, k: int, sparsity: float, block: tuple[int, int]) -> BsrInt8:
    keep = torch.rand(m // block[0], k // block[1]) >= sparsity
    return BsrInt8.encode(torch.randn(m, k) * keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1), block)


def kernels() -> dict[str, bool]:
    """Name -> packed in panels."""
    return {"cpu_bsr_int8": False} | ({"cpu_amx_int8": True} if _bsr.amx() and not VNNI else {})


def calls(a: BsrInt8, panels: bool, n: int, threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """uint8 to uint8, and float32 to float32, into memory that is there."""
    m, k = a.shape
    packed = _bsr.pack(a, panels)
    core, weights, layout = _bsr.require(), _bsr.weights(packed.tensors, packed.meta), _bsr.layout_of(packed.meta, n)
    x, bias, y = torch.randn(n, k), torch.randn(m), _bsr.room((n, m), torch.float32)
    q, out = _bsr.quantise(x, layout, 0.03), torch.empty(elements(layout, n, m), dtype=torch.uint8)
    at = LAYOUTS.index(layout)
    run = (
        weights, q.data.data_ptr(), at, n, row_stride(k), 128, 0.03, 0, out.data_ptr(), 2, at, row_stride(m),
        2.0, 128, bias.data_ptr(), 0, 0, 0, 0, threads,
    )  # fmt: skip
    floats = (weights, x.data_ptr(), 0, n, k, bias.data_ptr(), y.data_ptr(), threads)
    keep = (packed, q, out, x, y, bias)
    return lambda: (keep, core.run(*run))[0], lambda: (keep, core.linear(*floats))[0]


def op_call(a: BsrInt8, panels: bool, n: int) -> Callable[[], object]:
    """SparseLinear with its kernel chosen, as `gossamer.prepare` leaves it."""
    from gossamer.dispatch import Step

    layer, kernel = SparseLinear.from_format(a, torch.randn(a.shape[0])), "cpu_amx_int8" if panels else "cpu_bsr_int8"
    packed, stored = _bsr.pack(a, panels), len(layer.parts())
    step = Step(kernel, tuple(range(stored, stored + len(packed.tensors))), packed.meta)
    layer.use(torch.float32, [(n, (step,))], packed.tensors)
    x = torch.randn(n, a.shape[1])

    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


Ours = dict[tuple[str, float, str], Callable[[], object]]  # by variant, sparsity, kernel


def ours(shape: tuple[int, int], n: int, args: argparse.Namespace) -> Ours:
    found: Ours = {}
    for name, block in BLOCKS.items():
        for sparsity in args.sparsities:
            a = sparse(*shape, sparsity, block)
            for kernel, panels in kernels().items():
                kernel_call, linear_call = calls(a, panels, n, args.threads)
                runs = {name: kernel_call, f"{name} linear": linear_call}
                if "op" in args.variants:
                    runs[f"{name} op"] = op_call(a, panels, n)
                for variant, run in runs.items():
                    if variant.partition(" ")[2] in args.variants or (variant == name and "kernel" in args.variants):
                        found[variant, sparsity, kernel] = run
    return found


def in_turns(
    clock: Clock, runs: dict[Any, Callable[[], object]], rounds: int, cores: list[int]
) -> dict[Any, tuple[float, float]]:
    """The lowest figure of each and its spread."""
    found: dict[Any, list[tuple[float, float]]] = {key: [] for key in runs}
    for turn in range(rounds):
        if cores:
            os.sched_setaffinity(0, {cores[turn % len(cores)]})
        for key, run in runs.items():
            found[key].append(clock(run))
    return {key: min(times) for key, times in found.items()}


def measure(args: argparse.Namespace, path: Path) -> None:
    clock = Clock(args.seconds, args.threads)
    shapes = [s for i, s in enumerate(SHAPES) if i in args.shapes]
    grid = [(m, k, n) for n in args.tokens for m, k in shapes]
    turns = range(args.rounds)
    native = [onednn(args.onednn, grid, args.seconds, args.threads) for _ in turns] if args.onednn else []
    others = [peers(args.peers, grid, args.seconds, args.threads) for _ in turns] if args.peers else []
    for m, k, n in grid:
        own = ours((m, k), n, args)
        theirs = {"torch qlinear": torch_call(m, k, n)} | {s: fbgemm_call(m, k, n, s) for s in args.sparsities}
        times = in_turns(clock, theirs | own, args.rounds, args.cores)
        dense = {"torch qlinear": times["torch qlinear"][0]}
        for found in others:
            dense |= {name: min(us, dense.get(name, us)) for name, us in found[m, k, n].items()}
        if native:
            dense["onednn"] = min(found[m, k, n] for found in native)
        best = min(dense, key=dense.__getitem__)
        shown = []
        for variant, sparsity in dict.fromkeys(key[:2] for key in own):
            (us, spread), kernel = min((times[key], key[2]) for key in own if key[:2] == (variant, sparsity))
            case = {"shape": [m, k], "tokens": n, "threads": args.threads, "cpu": cpu()}
            case |= {"sparsity": sparsity, "variant": variant, "block": variant[:3]}
            line = {"bench": "bsr_int8", "case": case, "ours": us, "baseline": best, "kernel": kernel}
            line |= {"baseline_value": dense[best], "unit": "us", "ratio": dense[best] / us, "dense": dense}
            line |= {"sparse": {"fbgemm 1x4": times[sparsity][0]}}
            append(path, line | {"spread": round(spread, 4)} | environment())
            shown.append(f"{variant[2:]}@{sparsity:.2f} {line['ratio']:.2f}")
        print(f"{m}x{k} N={n} dense {dense}: {' '.join(shown)}", flush=True)


def cpu() -> str:
    """What the bars depend on: the model (GOSSAMER_CPU where its name hides it), and which of its units are in use."""
    name = os.environ.get("GOSSAMER_CPU") or environment()["machine"].partition(",")[0]
    return name + (" without AMX" if VNNI else " with AMX" if _bsr.amx() else "")


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def newest(path: Path) -> dict[tuple, dict[str, Any]]:
    """The last line of every case on this CPU."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [x for x in lines if "case" in x and "ours" in x and x["case"]["cpu"] == cpu()]
    keys = ("shape", "tokens", "threads", "sparsity", "variant")
    return {tuple(map(str, (x["case"][k] for k in keys))): x for x in lines}


def summarise(path: Path) -> None:
    lines = list(newest(path).values())

    def pick(**wanted: Any) -> list[dict[str, Any]]:
        return [x for x in lines if all(x["case"][k] in v for k, v in wanted.items())]

    def summary(name: str, case: dict[str, Any], values: list[float], must: float | None) -> None:
        if not values:
            return
        line = {"bench": "bsr_int8", "summary": name, "case": case | {"cpu": cpu()}, "value": round(geomean(values), 3)}
        line |= {"sense": ">=", "must": must, "unit": "x", "n": len(values)}
        append(path, line | environment())
        print(name, case, line["value"], f"bar {must}" if must else "", flush=True)

    for sparsity in SPARSITIES:
        for threads in sorted({x["case"]["threads"] for x in lines}):
            for variant in ("4x1", "4x4", "4x1 linear", "4x4 linear"):
                for tokens in TOKENS:
                    found = pick(sparsity=[sparsity], tokens=[tokens], variant=[variant], threads=[threads])
                    barred = AVX512 and VNNI and variant == "4x1" and threads == 1
                    bar = BARS_VNNI.get(tokens, {}).get(sparsity) if barred else None
                    case = {"sparsity": sparsity, "tokens": tokens, "threads": threads, "variant": variant}
                    summary("geomean_vs_best_dense", case, [x["ratio"] for x in found], bar)
        for tokens in TOKENS:
            found = pick(sparsity=[sparsity], tokens=[tokens], variant=["4x1"], threads=[1])
            ratios = [x["sparse"]["fbgemm 1x4"] / x["ours"] for x in found if "sparse" in x]
            case = {"sparsity": sparsity, "tokens": tokens, "threads": 1, "variant": "4x1"}
            summary("geomean_vs_fbgemm_1x4", case, ratios, None)
        for block in BLOCKS:
            found = pick(sparsity=[sparsity], tokens=[64, 384], variant=[block], threads=[1])
            ratios = [x["dense"]["torch qlinear"] / x["ours"] for x in found]
            bar = None if VNNI or not _bsr.amx() else BARS_AMX[block].get(sparsity)
            case = {"sparsity": sparsity, "tokens": "64, 384", "threads": 1, "variant": block}
            summary("geomean_vs_torch", case, ratios, bar)
            for kind in ("linear", "op"):
                share = _ratios(found, pick(sparsity=[sparsity], variant=[f"{block} {kind}"], threads=[1]))
                must = BARS_SHARE.get(sparsity) if AVX512 and kind == "linear" and block == "4x1" else None
                summary(f"{kind}_share_of_kernel", case, share, must)


def _ratios(kernel: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[float]:
    """Time of the kernel / time of the other, where one run measured both."""

    def place(x: dict[str, Any]) -> tuple[object, ...]:
        return (*x["case"]["shape"], x["case"]["tokens"], x["commit"], x["command"])

    times = {place(x): x["ours"] for x in other}
    return [x["ours"] / times[place(x)] for x in kernel if place(x) in times]


def scaling(args: argparse.Namespace, path: Path) -> None:
    """Speed of two threads over twice that of one, in turns, 5th percentiles of wall time."""
    clock = Clock(args.seconds, 2)
    for sparsity in (0.7, 0.8, 0.9):
        values = []
        for m, k in (s for i, s in enumerate(SHAPES) if i in args.shapes):
            for n in args.tokens:
                a = sparse(m, k, sparsity, (4, 1))
                one, two = (calls(a, False, n, threads)[0] for threads in (1, 2))
                times = [(clock(one)[0], clock(two)[0]) for _ in range(3)]
                values.append(min(t[0] for t in times) / min(t[1] for t in times) / 2)
        case = {"sparsity": sparsity, "tokens": args.tokens, "variant": "4x1", "cpu": cpu()}
        line = {"bench": "bsr_int8", "summary": "two_thread_scaling", "case": case, "value": round(geomean(values), 3)}
        append(path, line | {"sense": ">=", "must": 0.9, "unit": "x", "n": len(values)} | environment())
        print("two_thread_scaling", sparsity, line["value"], [round(v, 2) for v in values], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onednn", metavar="PREFIX")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python with onnx, onnxruntime and openvino")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))), help="0 to 5")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seconds", type=float, default=0.03, help="for every measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of every measurement; the lowest counts")
    parser.add_argument("--cores", type=int, nargs="+", default=[], help="to run on, another one in every turn")
    parser.add_argument("--scaling", action="store_true", help="one thread against two")
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.cores and (args.onednn or args.peers or args.scaling or args.threads > 1):
        parser.error("--cores moves one thread of this process; leave out --onednn, --peers, --scaling and --threads")
    if VNNI and args.peers:
        parser.error("ONEDNN_MAX_CPU_ISA does not keep ONNX Runtime off AMX: leave --peers out, or unset it")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    path = args.out / "bsr_int8.jsonl"
    if args.summarise:
        return summarise(path)
    torch.set_num_threads(2 if args.scaling else args.threads)
    if args.scaling:
        return scaling(args, path)
    measure(args, path)


if __name__ == "__main__":
    sys.exit(main())
