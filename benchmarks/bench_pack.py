"""Bitmask packing on a GPU: seconds for a model, share of the copy bandwidth, microseconds per launch.

    python benchmarks/bench_pack.py

- "seconds": dense bf16 -> bitmask of every linear of a Llama 3 8B, 32 layers, one layer's tensors on the GPU at a time.
  The weights are made on the GPU and lie there: copying them in is not counted, host time between them is.
- "copy_share": bytes read and written over time, against those of a device-to-device copy; ten calls in a row, what
  they wait for included. `encode` reads the dense matrix twice, since the values cannot be allocated before they are
  counted, and the mask again: "copy_share_least" counts dense, values and mask once each.
- "launch_us": host time of `Function.launch` with six arguments, compiled and loaded before.

The baseline is torch's own way: `x[x != 0]` and a mask of bits, and `dense[bits] = values` back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gossamer import cuda_bitmask
from gossamer.formats.bitmask import Bitmask, pack_bits, unpack_bits
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "pack.jsonl"
LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
LAYERS = 32
SHAPES = [(4096, 4096), (14336, 4096), (128256, 4096)]
BAR = (14336, 4096)  # the shape that the bar is set for; a smaller one is bound by the host
COPY_SIZE = 1 << 30  # bytes


def sparse(shape: tuple[int, int], sparsity: float) -> Tensor:
    a = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return a.masked_fill_(torch.rand(shape, device="cuda") < sparsity, 0)


def seconds(run: Callable[[], object], repeats: int = 20, calls: int = 10) -> tuple[float, float]:
    """(median, spread) of the time of one call, what it waits for included."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def torch_encode(a: Tensor) -> tuple[Tensor, Tensor]:
    return a[a != 0], pack_bits(a != 0)


def torch_decode(found: Bitmask) -> Tensor:
    dense = found.weight.new_zeros(found.shape)
    dense[unpack_bits(found.mask, found.shape[1])] = found.weight
    return dense


def copy_bandwidth() -> float:
    """Bytes per second, read and written."""
    source = torch.randint(0, 256, (COPY_SIZE,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_SIZE / seconds(lambda: target.copy_(source))[0]


def measure_shares(shape: tuple[int, int], sparsity: float, copy: float, where: dict) -> None:
    a = sparse(shape, sparsity)
    found = Bitmask.encode(a)
    offsets = cuda_bitmask.tile_offsets(found.mask, shape)
    least = a.nbytes + found.nbytes
    runs = {
        "encode": (lambda: Bitmask.encode(a), lambda: torch_encode(a), a.nbytes + found.mask.nbytes),
        "decode": (lambda: found.decode(), lambda: torch_decode(found), found.mask.nbytes),
        "decode, offsets kept": (
            lambda: cuda_bitmask.unpack_bitmask(found.weight, found.mask, shape, offsets=offsets),
            lambda: torch_decode(found),
            0,
        ),
    }
    for op, (ours, theirs, again) in runs.items():
        (taken, spread), (theirs_taken, _) = seconds(ours), seconds(theirs, 5, 2)
        case = {"op": op, "shape": list(shape), "sparsity": sparsity}
        line = {"bench": "pack", "case": case, "ours": taken * 1e6, "baseline": "torch", "spread": spread, "unit": "us"}
        append(RESULTS, line | {"baseline_value": theirs_taken * 1e6, "ratio": theirs_taken / taken} | where)
        must = 0.6 if shape == BAR else None
        summary("copy_share", (least + again) / taken / copy, ">=", must, "of copy bandwidth", case, where)
        summary("copy_share_least", least / taken / copy, ">=", None, "of copy bandwidth", case, where)


def measure_model(sparsity: float, where: dict) -> None:
    ours, theirs = (sum(pack_layer(sparsity, how) for _ in range(LAYERS)) for how in (Bitmask.encode, torch_encode))
    case = {"model": "Llama 3 8B shapes", "sparsity": sparsity}
    line = {"bench": "pack", "case": case, "ours": ours, "baseline": "torch", "baseline_value": theirs}
    append(RESULTS, line | {"ratio": theirs / ours, "unit": "s", "spread": None} | where)
    summary("seconds", ours, "<=", 5.0, "s", case, where, LAYERS * len(LAYER))


def pack_layer(sparsity: float, encode: Callable[[Tensor], object]) -> float:
    weights = [sparse(shape, sparsity) for shape in LAYER]
    torch.cuda.synchronize()
    start = time.perf_counter()
    packed = [encode(w) for w in weights]
    torch.cuda.synchronize()
    del packed
    return time.perf_counter() - start


def measure_launch(where: dict, launches: int = 200, rounds: int = 50) -> None:
    found = Bitmask.encode(sparse((8, 1024), 0.5))
    offsets = cuda_bitmask.tile_offsets(found.mask, found.shape)
    dense = found.decode()
    unpack = next(f for f in cuda_bitmask.VARIANTS if f.entry == "unpack" and dict(f.macros)["BYTES"] == "2")
    args = found.weight, found.mask, offsets, dense, found.weight.numel(), 1, 8192
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            unpack.launch((2, 1, 1), (128, 1, 1), *args)
        taken.append((time.perf_counter() - start) / launches * 1e6)
    summary("launch_us", statistics.median(taken), "<=", 8.0, "us", {}, where, rounds)


def summary(
    name: str, value: float, sense: str, must: float | None, unit: str, case: dict, where: dict, n: int = 1
) -> None:
    print(f"{name} {case}: {value:.3f} {unit}", flush=True)
    line = {"bench": "pack", "summary": name, "case": case, "value": value, "sense": sense, "must": must}
    append(RESULTS, line | {"unit": unit, "n": n} | where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    args = parser.parse_args()
    where = environment("cuda")
    measure_launch(where)
    copy = copy_bandwidth()
    print(f"device-to-device copy: {copy / 1e12:.2f} TB/s, read and written")
    for sparsity in args.sparsities:
        for shape in SHAPES:
            measure_shares(shape, sparsity, copy, where)
        measure_model(sparsity, where)


if __name__ == "__main__":
    main()
