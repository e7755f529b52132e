"""General sparse products on the GPU against every algorithm of cuSPARSE and a dense product, on 27 matrices.

    python benchmarks/bench_spmm.py --data DATA             # measures, appends a line per matrix, width and precision
    python benchmarks/bench_spmm.py --packing               # choosing, reordering and packing of 10^7 entries
    python benchmarks/bench_spmm.py --summarise             # the figures of the newest lines

Timed hot (what fits the L2 cache stays there), as replayed CUDA graphs, a small B at several addresses (`duel.copies`);
cuSPARSE is prepared (cusparseSpMM_preprocess) outside the timing, as our packing is. Every choice is made afresh, by
timings of its own: "default" is the way that `SparseMatrix` chose, in `choosing_ms`; "predicted" that of
`measure=False`, "measured" that of `measure=True`; "measured_free" the same with `deterministic=False`. What they took
is looked up in "candidates", which are all ways but hopeless ones of ours, timed side by side with "baselines"; of them
"left_out" are those that need `deterministic=False`, and two runs of those in "unstable" did not agree. "ours" is the
default's. `packing_ms` is what predicting, reordering and packing took.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bsr
import spmm_matrices
from gossamer import cusparse, nvrtc, timing
from gossamer.matrix import SparseMatrix
from gossamer.spmm import Csr, Way, duel, memory, model
from gossamer.spmm.choice import MEASURED, Chooser
from gossamer.spmm.kernels import cuda_rows, cuda_windows
from gossamer.spmm.kernels import cusparse as cusparse_kernel
from results import append, environment
from spmm_lines import ERRORS, PRECISIONS, RESULTS, WIDTHS, summarise

BLOCKED = ("band64_16k", "band512_16k", "blockdiag64_shuffled")  # that all of cuSPARSE's block formats are tried on
BF16 = 32  # the width at which bfloat16's error is looked at, too
SMALL = 200_000  # entries; on larger matrices cuSPARSE's CSR_ALG1 was never the best, and very slow
SECONDS = 0.003  # of timing per candidate, at least
LONG = 1e8  # entries times columns; such a product is long beside its launch
HOPELESS = 4.0  # times the shortest predicted time; ways of ours beyond that are not timed
LARGE = {
    "rmat20_10M": lambda: spmm_matrices.rmat(20, 11),
    "blocks_10M": lambda: spmm_matrices.block_diagonal(163840, 64, 1.0),
}
ALL = {"alg1": cusparse.ALG1, "alg2": cusparse.ALG2, "alg3": cusparse.ALG3}


def baselines(name: str, a: Csr, b: torch.Tensor, which: list[str]) -> dict[str, list[partial]]:
    """cuSPARSE's algorithms for CSR, its block formats by the size of their blocks; a call per copy of B."""
    found = {}
    for label in which:
        try:
            calls = _baseline(a, b, label)
            calls[0]()
            found[f"cusparse_{'fp32' if a.dtype == torch.float32 else 'fp16'}_{label}"] = calls
        except (cusparse.CusparseError, torch.OutOfMemoryError) as error:
            print(f"{name} {label}: {error}", file=sys.stderr)
    return found


def _baseline(a: Csr, b: torch.Tensor, label: str) -> list[partial]:
    if label.startswith("alg"):
        left, algorithm = cusparse.csr(a.shape, a.pointers.to(torch.int32), a.cols, a.values), ALL[label]
    elif label.startswith("ell"):
        left = cusparse.blocked_ell(a.shape[1], *cusparse_kernel.blocks_of(a, int(label[3:])))
        algorithm = cusparse.BLOCKED_ELL
    else:
        left, algorithm = bsr.bsr(a, int(label[3:])), cusparse.BSR
    plan = cusparse.Plan(left, b, algorithm)
    c = torch.zeros(left.shape[0], b.shape[1], dtype=b.dtype, device=b.device)
    return [partial(plan.run, x, c) for x in duel.copies(b)]


def timed(a: Csr, n: int, runners: Mapping[str, Sequence[timing.Call]]) -> dict[str, float]:
    timing.LAUNCHES = 3 if a.nnz * n > LONG else 10
    return timing.race(runners, torch.device("cuda"), SECONDS)


def exact_product(a: Csr, b: torch.Tensor) -> torch.Tensor:
    """In float64, its first columns."""
    return a.to(dtype=torch.float64).torch() @ b[:, :32].double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found[:, : expected.shape[1]].double() - expected).norm() / expected.norm())


def cells(name: str, kind: str, a32: Csr) -> None:
    few = [x for x in ALL if x != "alg1" or a32.nnz < SMALL]
    base = {n: timed(a32, n, baselines(name, a32, dense_operand(a32, n, torch.float32), few)) for n in WIDTHS}
    for precision, (dtype, tf32) in PRECISIONS.items():
        a = a32.to(dtype=dtype)
        torch.cuda.synchronize()
        start = time.perf_counter()
        chooser = Chooser(a, tf32, True, False, measuring=False)
        chooser.prepare(WIDTHS[0], False)
        torch.cuda.synchronize()
        packing = time.perf_counter() - start
        choosers = chooser, Chooser(a, tf32, True, False), Chooser(a, tf32, True, False, deterministic=False)
        for n in WIDTHS:
            line = cell(name, kind, a32, a, n, precision, choosers, base[n])
            if (precision, n) == ("fp16", BF16):
                line["error_bf16"] = float(f"{bf16_error(a32, n):.2g}")
            append(RESULTS, line | {"packing_ms": round(1e3 * packing, 1)} | environment("cuda"))
        del chooser, choosers


def bf16_error(a32: Csr, n: int) -> float:
    """Of what prediction alone chooses."""
    a = SparseMatrix(a32, "bf16", measure=False)
    b = dense_operand(a32, n, torch.bfloat16)
    return relative_error(a @ b, exact_product(a32.to(dtype=torch.bfloat16), b))


def dense_operand(a: Csr, n: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(a.device).manual_seed(n)
    return torch.randn(a.shape[1], n, device=a.device, generator=generator).to(dtype)


def cell(
    name: str,
    kind: str,
    a32: Csr,
    a: Csr,
    n: int,
    precision: str,
    choosers: tuple[Chooser, Chooser, Chooser],
    base: dict[str, float],
) -> dict:
    """choosers: a predicting one, the default, and one that may choose what does not repeat itself to the bit."""
    chooser, default, loose = choosers
    b = dense_operand(a, n, a.dtype)
    operands, runners, ways = duel.copies(b), {}, promising(chooser, loose, n)
    for way in ways:
        try:
            packed = chooser.packed(n, way)
            runners[str(way)] = [partial(way.own.run, x, packed.tensors, packed.meta) for x in operands]
            runners[str(way)][0]()
        except (cusparse.CusparseError, torch.OutOfMemoryError) as error:
            runners.pop(str(way), None)
            print(f"{name} {way} N={n}: {error}", file=sys.stderr)
    worst, unstable = 0.0, []
    expected = exact_product(a32 if precision == "tf32" else a, b)
    for key, (run, *_) in runners.items():
        error = relative_error(found := run(), expected)
        if not error <= ERRORS[precision]:
            raise ArithmeticError(f"{name} {key} N={n} {precision}: relative error {error:.1e}")
        worst = max(worst, error)
        if not all(torch.equal(found, run()) for _ in range(2)):
            unstable.append(key)
    others = baselines(name, a, b, extra(name, a)) if precision == "fp16" else {}
    times = timed(a, n, runners | others)
    candidates = {k: round(times[k], 2) for k in runners}
    stored = "fp16" if precision == "fp16" else "fp32"
    own = {f"cusparse_{stored}_{label_of(k)}": k for k in runners if "cusparse" in k}
    baseline = base | {k: times[k] for k in others} | {k: times[v] for k, v in own.items()}
    baseline = {k: round(v, 2) for k, v in baseline.items()}
    choosing = choosing_ms(default, n)
    packs = chooser._packed
    chooser.prepare(n, True)
    measured = free = str(chooser.way(n))
    left_out = [str(w) for w in ways if w not in chooser.ways]
    if "cusparse[alg=3]" in left_out:
        loose._packed = dict(packs)
        loose.prepare(n, True)
        free = str(loose.way(n))
    chooser._packed = packs  # all of them, for the next width
    stats = chooser.stats
    predicted = next(str(w) for w in chooser.predicted(n) if str(w) in runners)
    chosen = str(default.way(n))
    reference = min(v for k, v in baseline.items() if k.startswith("cusparse_fp32"))
    print(f"{name:21s} {n:4d} {precision} {chosen:34s} {candidates[chosen]:8.1f} us", end=" ")
    print(f"{reference / candidates[chosen]:6.2f}x, measured {measured} {candidates[measured]:.1f}", flush=True)
    return {
        "bench": "spmm",
        "case": {"matrix": name, "kind": kind, "N": n, "precision": precision},
        "ours": candidates[chosen],
        "baseline": "cuSPARSE CSR float32, best algorithm",
        "baseline_value": reference,
        "unit": "us",
        "ratio": round(reference / candidates[chosen], 3),
        "default": chosen,
        "choosing_ms": round(choosing, 2),
        "predicted": predicted,
        "measured": measured,
        "measured_free": free,
        "left_out": left_out,
        "error": float(f"{worst:.2g}"),
        "candidates": candidates,
        "baselines": baseline,
        "unstable": unstable,
        "stats": list(astuple(stats))[:7],
        "reordered": chooser.reordered,
    }


def promising(chooser: Chooser, loose: Chooser, n: int) -> list[Way]:
    """All ways but what torch takes, and those of ours of which nothing is to be hoped."""
    predicted = chooser.predicted(n)
    limit = HOPELESS * min(predicted.values())
    slow = {w for i, (w, us) in enumerate(predicted.items()) if i >= MEASURED and us > limit}
    ways = dict.fromkeys([*chooser.ways, *loose.ways])
    return [w for w in ways if w.kernel != "vendor" and (w.kernel in model.LIBRARY or w not in slow)]


def choosing_ms(default: Chooser, n: int) -> float:
    """Milliseconds of choosing and packing for this width; binaries, order of rows and statistics are there already."""
    assert default.stats
    torch.cuda.synchronize()
    start = time.perf_counter()
    default.prepare(n, False)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def label_of(way: str) -> str:
    """cusparse[alg=2] -> alg2."""
    return way.partition("[")[2].removesuffix("]").replace("=", "")


def extra(name: str, a: Csr) -> list[str]:
    """cuSPARSE's algorithms for float16 that are no candidates."""
    return ["alg2"] + ["alg1"] * (a.nnz < SMALL) + (["ell16", "ell32", "bsr16"] if name in BLOCKED else [])


def packing(folder: Path, data: Path) -> None:
    """Milliseconds from a torch.sparse tensor on the GPU to a packed matrix, without what only the first one costs."""
    for name in LARGE:
        generate(folder, data, name)
        a = spmm_matrices.csr(generated(folder, name), torch.device("cuda")).torch()
        took, ways = zip(*[_packed_in(a) for _ in range(4)][1:], strict=True)
        line = {"bench": "spmm", "summary": "packing_ms", "case": {"matrix": name, "nnz": a.values().numel()}}
        line["case"] |= {"choice": "default"}
        line |= {"value": round(1e3 * max(took), 1), "sense": "<=", "must": 1000, "unit": "ms", "n": len(took)}
        append(RESULTS, line | {k: environment("cuda")[k] for k in ("machine", "commit", "date")})
        print(name, a.values().numel(), [round(1e3 * t, 1) for t in took], "ms", *ways, flush=True)


def _packed_in(a: torch.Tensor) -> tuple[float, str]:
    """Seconds, and what was chosen."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    packed = SparseMatrix(a, "fp16").prepare(128)
    torch.cuda.synchronize()
    return time.perf_counter() - start, str(packed.way(128))


def generate(folder: Path, data: Path, name: str) -> None:
    """Keeps a pattern in `folder`, so that all are made side by side before the GPU is needed."""
    path = folder / f"{name.replace('%', '')}.npz"
    if not path.exists():
        kind, shape, rows, cols = (LARGE[name] if name in LARGE else spmm_matrices.patterns(data)[name])()
        np.savez(path, kind=kind, shape=shape, rows=rows.astype(np.int32), cols=cols.astype(np.int32))


def generated(folder: Path, name: str) -> spmm_matrices.Pattern:
    found = np.load(folder / f"{name.replace('%', '')}.npz")
    m, k = map(int, found["shape"])
    return str(found["kind"]), (m, k), found["rows"], found["cols"]


def warm_compiler() -> None:
    """Every variant that may come up, side by side; they stay in the cache of binaries."""
    jobs = sorted({(f.file, f.macros) for f in functions()})
    with ProcessPoolExecutor() as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True), chunksize=2))


def functions() -> list[nvrtc.Function]:
    found = []
    for kind, widths in ((0, WIDTHS), (1, (BF16,)), (2, WIDTHS)):
        for rows, masked, warps in itertools.product(cuda_windows.ROWS, (False, True), (4, 16)):
            found += [
                cuda_windows.function(kind, rows, cols, masked, warps)
                for cols in {cuda_windows.lane_columns(n, kind, rows) for n in widths}
                if not (rows > 8 and masked) and (warps == 4 or rows * cols <= 128)
            ]
        found += [cuda_windows.sum_function(kind, rows) for rows in cuda_windows.ROWS]
        size = 4 if kind == 2 else 2
        found += [
            cuda_rows.function(kind, *(shape := cuda_rows.shape_of(n, size, team, double)), unroll // shape.loads)
            for n in widths
            for unroll, team, double, _ in cuda_rows.KNOBS
        ]
        found.append(cuda_rows.function(kind, cuda_rows.WARP, 1, 1, "spmm_rows_sum"))
    return found


def _compile(file: str, macros: tuple) -> None:
    nvrtc.compile(file, dict(macros), os.environ.get("BENCH_ARCH", "sm_90a"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real matrices")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gossamer_spmm"), help="folder for the generated ones")
    parser.add_argument("--only", nargs="*", help="names of matrices, in the order to be measured")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no matrix after so many")
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--packing", action="store_true")
    asked = parser.parse_args()
    asked.work.mkdir(exist_ok=True)
    memory.Memory.recall = lambda self, n: None  # every choice is made afresh
    if asked.summarise or asked.packing:
        return summarise() if asked.summarise else packing(asked.work, asked.data)
    start = time.monotonic()
    names = asked.only or list(spmm_matrices.patterns(asked.data))
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(generate, asked.work, asked.data), names))
    warm_compiler()
    gc.freeze()  # torch collects garbage before every capture
    wrong: list[str] = []
    for name in names:
        if time.monotonic() - start > asked.seconds:
            return print("out of time before", name)
        pattern = generated(asked.work, name)
        try:
            cells(name, pattern[0], spmm_matrices.csr(pattern, torch.device("cuda")))
        except ArithmeticError as error:
            wrong.append(str(error))
        torch.cuda.empty_cache()
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
