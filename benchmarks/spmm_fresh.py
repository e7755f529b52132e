"""What does SparseMatrix choose in a process that has just begun, where clocks are low and libraries not yet loaded?

    python benchmarks/spmm_fresh.py --data DATA --times 2

On the smallest matrices of bench_spmm.py, where tenths of a microsecond decide: a new process for each of them and each
precision makes its first choices by default, beginning with another width every time. Then what raced is timed at
leisure ("candidates"); "lost" is how many times longer than the best of those the choice takes, "ratio" the best of the
library's over the choice. The line "at" tells how many choices the process had made before.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

import bench_spmm
import spmm_matrices
from gossamer.spmm import duel, memory, model
from gossamer.spmm.choice import Chooser
from results import append, environment
from spmm_lines import PRECISIONS, WIDTHS

RESULTS = Path(__file__).parent / "results" / "spmm_fresh.jsonl"
MATRICES = ("dlmc_tr90_ffn1", "dlmc_tr95_ffn1", "dlmc_tr90_q", "cora", "citeseer", "pubmed", "bcsstk17")
WORK = Path(tempfile.gettempdir()) / "gossamer_spmm"
WRONG = 1.05
SIDE_BY_SIDE = 5  # processes that begin beside the one that has the GPU


def choices(name: str, precision: str, turn: int) -> None:
    """A line per width; the GPU is touched by one process at a time."""
    pattern = bench_spmm.generated(WORK, name)
    memory.Memory.recall = lambda self, n: None
    lock = (WORK / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    dtype, tf32 = PRECISIONS[precision]
    a = spmm_matrices.csr(pattern, torch.device("cuda")).to(dtype=dtype)
    default, judge = Chooser(a, tf32, True, False), Chooser(a, tf32, True, False, measuring=False)
    for at, n in enumerate([*WIDTHS, *WIDTHS][turn % 4 :][:4]):
        took = bench_spmm.choosing_ms(default, n)
        chosen, rivals = str(default.way(n)), judge._rivals(n)
        operands = duel.copies(bench_spmm.dense_operand(a, n, dtype))
        runners = {}
        for way in rivals:
            packed = judge.packed(n, way)
            runners[str(way)] = [partial(way.own.run, b, packed.tensors, packed.meta) for b in operands]
            runners[str(way)][0]()
        times = bench_spmm.timed(a, n, runners)
        library = [us for way, us in zip(rivals, times.values(), strict=True) if way.kernel in model.LIBRARY]
        line = {"bench": "spmm_fresh", "case": {"matrix": name, "N": n, "precision": precision}, "turn": turn, "at": at}
        line |= {"ours": round(times[chosen], 2), "baseline": "the best of what raced", "unit": "us"}
        line |= {"baseline_value": round(min(times.values()), 2), "default": chosen, "choosing_ms": round(took, 2)}
        line |= {"lost": round(times[chosen] / min(times.values()), 3)}
        line |= {"ratio": round(min(library) / times[chosen], 3) if library else None}
        append(RESULTS, line | {"candidates": {k: round(v, 2) for k, v in times.items()}} | environment("cuda"))


def start(job: tuple[str, str, int], until: float) -> None:
    if time.monotonic() < until:
        subprocess.run([sys.executable, __file__, "--one", *map(str, job)], check=True)


def summarise(before: int) -> None:
    """Of the lines that were added."""
    lines = [json.loads(x) for x in RESULTS.read_text().splitlines()[before:]]
    wrong = [x for x in lines if x["lost"] > WRONG]
    for x in wrong:
        print("lost", x["lost"], x["case"], x["default"], x["candidates"])
    kept = {k: environment("cuda")[k] for k in ("machine", "commit", "date")}
    ratios = [x["ratio"] for x in lines if x["ratio"]]
    for name, value, must in (
        ("fresh_choices_lost", len(wrong) / len(lines), None),
        ("fresh_worst_vs_library", min(ratios), 0.95),
        ("fresh_choosing_ms", sorted(x["choosing_ms"] for x in lines)[len(lines) // 2], None),
    ):
        line = {"bench": "spmm_fresh", "summary": name, "case": {}, "value": round(value, 4), "must": must, "unit": ""}
        append(RESULTS, line | {"sense": ">=" if must else "<=", "n": len(lines)} | kept)
        print(name, value, "of", len(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real matrices")
    parser.add_argument("--times", type=int, default=1, help="processes for each matrix and precision")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no process after so many")
    parser.add_argument("--one", nargs=3, metavar=("MATRIX", "PRECISION", "TURN"), help="in this process")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    if asked.one:
        return choices(asked.one[0], asked.one[1], int(asked.one[2]))
    WORK.mkdir(exist_ok=True)
    for name in MATRICES:
        bench_spmm.generate(WORK, asked.data, name)
    bench_spmm.warm_compiler()
    before = len(RESULTS.read_text().splitlines()) if RESULTS.exists() else 0
    cases = list(itertools.product(range(asked.times), PRECISIONS, MATRICES))
    jobs = [(matrix, precision, i + again) for i, (again, precision, matrix) in enumerate(cases)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(partial(start, until=until), jobs))
    summarise(before)


if __name__ == "__main__":
    main()
