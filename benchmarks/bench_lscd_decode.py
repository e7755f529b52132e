"""How fast a GPU expands what `cuda_lscd` has packed: its decoder alone, from shared memory into registers.

    python benchmarks/bench_lscd_decode.py --out FOLDER

Weights, zeros among them, that one processor expands in a clock, by density and by what a stage holds (halves or
words), with as many warps as do best. The baseline is what memory can deliver: the weights that a processor's share of
3 TB/s holds, packed so, at the clock of the run. Ratio above 1: reading binds; below: expanding does. Summary
"decode_headroom": the ratio of the better kind of items, by sparsity; no bar.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gossamer import nvrtc
from gossamer.kernels._lscd_pack import DEPTH, LINE, STEPS, pack_matrix
from results import append, environment

RESULTS = Path(__file__).parent / "results"
SOURCE = Path(__file__).with_name("lscd_decode.cuh")
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1)
WARPS = (8, 12, 16, 20, 24)
ROUNDS = 200
BANDWIDTH = 3000.0  # bytes a nanosecond that an H100 reads
SHARED = 227 << 10


@cache
def function(words: bool, summed: bool) -> nvrtc.Function:
    macros = {"STEPS": STEPS, "TILES": 1, "BF16": 1, "WORDS": int(words), "TEAM": 1, "PAIR": 1, "CLUSTER": 1}
    macros |= {"THREADS": 32 * WARPS[-1], "UNROLL": 1 if words else 2, "SUMMED": int(summed)}
    return nvrtc.Function(str(SOURCE.resolve()), "lscd_decode", "PPPii", macros, SHARED)


def stage_of(density: float, words: bool) -> tuple[Tensor, Tensor]:
    """(one stage as int32, the 16 x DEPTH bfloat16 values that it holds)."""
    a = (torch.randn(32, DEPTH) * (torch.rand(32, DEPTH) < density)).bfloat16()
    stages, offsets, _ = pack_matrix(a, words)
    return stages[: int(offsets[1]) * LINE].view(torch.int32), a[:16]


def checksum(values: Tensor) -> int:
    """The xor of 16-bit values, -0.0 apart: `pack_matrix` stores none."""
    found = 0
    for bits in values.contiguous().view(torch.int16).flatten().tolist():
        found ^= bits & 0xFFFF if bits & 0x7FFF else 0
    return found


def folded(registers: Sequence[int]) -> int:
    """The xor of both halves of all registers."""
    found = 0
    for bits in registers:
        found ^= bits ^ bits >> 16
    return found & 0xFFFF


def run(stage: Tensor, words: bool, warps: int, summed: bool) -> tuple[Tensor, Tensor]:
    """(clocks and nanoseconds of every block [blocks, 2], registers' xor of every thread) on all processors."""
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    clocks = torch.zeros(blocks, 2, dtype=torch.int64, device="cuda")
    found = torch.zeros(blocks * 32 * warps, dtype=torch.int32, device="cuda")
    size = stage.numel() * 4
    rounds = 1 if summed else ROUNDS
    grid, block = (blocks, 1, 1), (32 * warps, 1, 1)
    function(words, summed).launch(grid, block, stage, clocks, found, size, rounds, shared=warps * size)
    return clocks.cpu(), found.cpu()


def checked(stage: Tensor, values: Tensor, words: bool) -> None:
    """ArithmeticError unless every warp expands the stage to its values."""
    _, found = run(stage, words, WARPS[0], summed=True)
    wanted = checksum(values)
    if any(folded(warp.tolist()) != wanted for warp in found.view(-1, 32)):
        raise ArithmeticError("the decoder's values are not those of the stage")


def measured(stage: Tensor, words: bool, warps: int) -> tuple[float, float]:
    """(weights per clock and processor, gigahertz): the median block of the second of two runs."""
    for _ in range(2):
        clocks, _ = run(stage, words, warps, summed=False)
    spent, nanoseconds = clocks.double().median(0).values.tolist()
    return warps * ROUNDS * 16 * DEPTH / spent, spent / nanoseconds


def main() -> None:
    parser = argparse.ArgumentParser(description="the decoder of cuda_lscd alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for density in DENSITIES:
        best = 0.0
        for words in (False, True):
            stage, values = stage_of(density, words)
            stage = stage.cuda()
            checked(stage, values, words)
            fits = [w for w in WARPS if w * stage.numel() * 4 <= SHARED]
            rate, clock, warps = max((*measured(stage, words, w), w) for w in fits)
            delivered = BANDWIDTH / (stage.numel() * 4 / 16 / DEPTH) / processors / clock
            case = {"sparsity": round(1 - density, 2), "items": "words" if words else "halves"}
            line = {"bench": "lscd_decode", "case": case, "ours": rate, "baseline": "what 3 TB/s deliver, packed so"}
            line |= {"baseline_value": delivered, "unit": "weights / clock / processor", "ratio": rate / delivered}
            append(args.out / "lscd_decode.jsonl", line | {"warps": warps, "ghz": clock} | environment("cuda"))
            print(case, f"{rate:.1f} a clock with {warps} warps, {clock:.2f} GHz; memory delivers {delivered:.1f}")
            best = max(best, rate / delivered)
        line = {"bench": "lscd_decode", "summary": "decode_headroom", "case": {"sparsity": round(1 - density, 2)}}
        line |= {"value": best, "sense": ">=", "must": None, "unit": "x", "n": 2}
        append(args.out / "lscd_decode.jsonl", line | environment("cuda"))


if __name__ == "__main__":
    main()
