"""How far block-sparse int8 products can be ahead of torch's dense ones on this core, at the very most.

    taskset -c 1 python benchmarks/bsr_int8_bounds.py

builds benchmarks/bsr_int8_bounds.cpp (AVX-512 VNNI and AMX), whose bare inner loops find everything in the first-level
cache and finish nothing, and measures them and torch's oneDNN `qlinear` in turns; the lowest of each counts. A ceiling
is the geometric mean over six shapes and 64 and 384 tokens of torch's time over that of the loops: `one`, the better
of the vector unit alone and the matrix unit alone (which multiplies zeros, too), and `both`, the rows shared between
them as they go side by side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch

from bench_bsr_int8 import AVX512, RESULTS, SHAPES, SPARSITIES, Clock, cpu, geomean, torch_call
from results import append, environment

FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-tree-pre",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512vnni",
    "-mamx-tile",
    "-mamx-int8",
    "-w",
]
TOKENS = [64, 384]
TILES = 4 * 16 * 16 * 64  # dense products of a step on the matrix unit


def build(folder: str) -> str:
    source, binary = Path(__file__).with_suffix(".cpp"), f"{folder}/bounds"
    subprocess.run(["g++", *FLAGS, str(source), "-o", binary], check=True)
    return binary


def loops(binary: str, seconds: float) -> dict[str, float]:
    """Nanoseconds of a step of each loop."""
    lines = subprocess.run([binary, str(seconds)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {found["loop"]: found["ns"] for found in map(json.loads, lines)}


def speeds(ns: dict[str, float], block: str, sparsity: float) -> dict[str, float]:
    """Dense products a nanosecond."""
    group = 4 * 4 * 4 * 64 / (1 - sparsity)  # four groups of 4 rows x 4 columns x 64 tokens
    one = [group / ns[block]] + ([TILES / ns["tiles"]] if "tiles" in ns else [])
    both = [(group + TILES) / ns[f"{block} and tiles"]] if "tiles" in ns else []
    return {"one": max(one)} | ({"both": max(one + both)} if both else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.01, help="for every measurement")
    parser.add_argument("--rounds", type=int, default=12, help="of every measurement; the lowest counts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not AVX512:
        parser.error("the loops are AVX-512 VNNI, which this CPU has not; run it on one that has")
    torch.set_num_threads(1)
    path, clock = args.out / "bsr_int8.jsonl", Clock(args.seconds, 1)
    cells = [(m, k, n) for n in TOKENS for m, k in SHAPES]
    dense = {cell: torch_call(*cell) for cell in cells}
    torch_us, ns = dict.fromkeys(cells, float("inf")), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        binary = build(folder)
        for _ in range(args.rounds):
            for cell, run in dense.items():
                torch_us[cell] = min(torch_us[cell], clock(run)[0])
            ns = {name: min(value, ns.get(name, value)) for name, value in loops(binary, args.seconds).items()}
    print({name: round(value, 1) for name, value in ns.items()}, "ns a step of 4 tile products and, or, 4 groups")
    for block in ("4x1", "4x4"):
        for sparsity in SPARSITIES:
            for units, speed in speeds(ns, block, sparsity).items():
                value = geomean([torch_us[m, k, n] * 1e3 / (m * k * n / speed) for m, k, n in cells])
                case = {"sparsity": sparsity, "tokens": "64, 384", "threads": 1, "variant": block, "units": units}
                line = {"bench": "bsr_int8", "summary": "ceiling_vs_torch", "case": case | {"cpu": cpu()}}
                line |= {"value": round(value, 3), "sense": ">=", "must": None, "unit": "x", "n": len(cells), "ns": ns}
                append(path, line | environment())
                print(block, sparsity, units, line["value"], f"({speed:.0f} GMAC/s)", flush=True)


if __name__ == "__main__":
    main()
