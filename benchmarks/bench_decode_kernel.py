"""The CPU kernels alone, against the read bandwidth of the machine and against dense products.

    python benchmarks/bench_decode_kernel.py --out FOLDER

Weights are cold: every call takes the next of many matrices that together exceed the last-level cache. Summary
"bandwidth_share": compressed bytes a second of `cpu_bitmask` (one token, bfloat16 weights) / bytes a second of a plain
read loop over memory of the same kind, taken in turns. Measured lines: `cpu_bitmask` against `cpu_dense` and
`F.linear` at the linear shapes of SmolLM2-135M, cold, and in one sweep over all its layers; `many` is
`cpu_bitmask_many` (bfloat16 weights, float32 x) against `F.linear` in float32, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer import native
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.kernels.cpu_bitmask import CpuBitmask
from gossamer.kernels.cpu_bitmask_many import CpuBitmaskMany
from gossamer.kernels.cpu_dense import CpuDense
from gossamer.packs import settled
from gossamer.timing import race
from results import append, environment

RESULTS = Path(__file__).parent / "results"
COLD_BYTES = 640 << 20  # of weights, in rotation
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
HEAD = (49152, 576)
MANY = [*dict.fromkeys(BLOCK), (2048, 2048), (4096, 4096)]
MANY_BYTES = 128 << 20  # of dense weights that one turn of `many` runs through
LAYERS = 30
Call = Callable[[Tensor], object]


def seconds(run: Callable[[], object], seconds_to_spend: float) -> tuple[float, float]:
    """Median of the time of a run, and its interquartile range / median."""
    run()
    times: list[float] = []
    stop = time.perf_counter() + seconds_to_spend
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def sparse(shape: tuple[int, int], sparsity: float) -> Tensor:
    return torch.where(torch.rand(shape) >= sparsity, torch.randn(shape), 0).bfloat16()


def copy_of(a: Bitmask) -> Bitmask:
    return Bitmask(a.shape, a.weight.clone(), a.mask.clone())


def bitmask_call(a: Bitmask) -> Call:
    packed = settled(CpuBitmask, a, torch.float32)
    return CpuBitmask.bind(packed.tensors, packed.meta, None)


def dense_call(a: Tensor) -> Call:
    packed = settled(CpuDense, Dense((a.shape[0], a.shape[1]), a), torch.float32)
    return CpuDense.bind(packed.tensors, packed.meta, None)


def torch_call(a: Tensor, dtype: torch.dtype) -> Call:
    weight = a.to(dtype, copy=True)
    native.move_to_huge_pages(weight)
    return lambda x: linear(x.to(dtype), weight)


def bandwidth_share(sparsity: float, threads: int, spend: float) -> tuple[float, float]:
    """(share, bytes a second of the read loop), at 4096 x 4096."""
    torch.set_num_threads(threads)
    buffer = torch.ones(COLD_BYTES, dtype=torch.uint8)
    native.move_to_huge_pages(buffer)
    one = Bitmask.encode(sparse((4096, 4096), sparsity))
    calls = [bitmask_call(copy_of(one)) for _ in range(-(-COLD_BYTES // one.nbytes))]
    x = torch.randn(1, 4096)
    shares, reads = [], []
    for _ in range(3):  # in turns: the machine has other guests
        read = COLD_BYTES / seconds(lambda: native.sum_words(buffer), spend / 6)[0]
        run = len(calls) * one.nbytes / seconds(lambda: [call(x) for call in calls], spend / 6)[0]
        shares.append(run / read)
        reads.append(read)
    return statistics.median(shares), statistics.median(reads)


def candidates(shape: tuple[int, int], sparsity: float) -> Iterator[tuple[str, int, Callable[[], Call]]]:
    """Name, bytes and maker of every product that is compared; every call of a maker is a new copy."""
    a = sparse(shape, sparsity)
    stored = Bitmask.encode(a)
    yield "cpu_bitmask", stored.nbytes, lambda: bitmask_call(copy_of(stored))
    yield "cpu_dense bf16", a.nbytes, lambda: dense_call(a.clone())
    yield "torch bf16", a.nbytes, lambda: torch_call(a, torch.bfloat16)
    yield "torch fp32", 2 * a.nbytes, lambda: torch_call(a, torch.float32)


def cold(shape: tuple[int, int], sparsity: float, spend: float) -> dict[str, tuple[float, float]]:
    """Microseconds a call and their spread, one token in float32."""
    x, found = torch.randn(1, shape[1]), {}
    for name, nbytes, make in candidates(shape, sparsity):
        calls = [make() for _ in range(max(2, -(-COLD_BYTES // nbytes)))]
        time_of_all, spread = seconds(lambda calls=calls: [call(x) for call in calls], spend)
        found[name] = time_of_all / len(calls) * 1e6, spread
    return found


def sweep(sparsity: float, spend: float) -> dict[str, tuple[float, float]]:
    """Microseconds of one token through the linears of every layer and the head, each its own weights."""
    makers: dict[str, list[Callable[[], Call]]] = {}
    for shape in [*BLOCK * LAYERS, HEAD]:
        for name, _, make in candidates(shape, sparsity):
            makers.setdefault(name, []).append(make)
    inputs = [torch.randn(1, k) for _, k in [*BLOCK * LAYERS, HEAD]]
    found = {}
    for name, all_of in makers.items():
        calls = [make() for make in all_of]
        run = lambda calls=calls: [call(x) for call, x in zip(calls, inputs, strict=True)]  # noqa: E731
        median, spread = seconds(run, spend)
        found[name] = median * 1e6, spread
    return found


def many(shape: tuple[int, int], tokens: int, sparsity: float, spend: float) -> dict[str, tuple[float, float]]:
    """Microseconds a call of `tokens` tokens in float32; no spread, as turns are not kept."""
    x, ours, dense = torch.randn(tokens, shape[1]), [], []
    for _ in range(max(2, MANY_BYTES // (4 * shape[0] * shape[1]))):
        a = sparse(shape, sparsity)
        packed = settled(CpuBitmaskMany, Bitmask.encode(a), torch.float32)
        ours.append(partial(CpuBitmaskMany.bind(packed.tensors, packed.meta, None), x))
        dense.append(partial(torch_call(a, torch.float32), x))
    found = race({"cpu_bitmask_many": ours, "torch fp32": dense}, torch.device("cpu"), spend / 2)
    return {name: (value, 0.0) for name, value in found.items()}


def record(path: Path, case: dict, found: dict[str, tuple[float, float]], mine: str = "cpu_bitmask") -> None:
    ours, spread = found.pop(mine)
    for name, (value, _) in found.items():
        line = {"bench": "decode_cpu", "case": case, "ours": ours, "baseline": name, "baseline_value": value}
        append(path, line | {"unit": "us", "ratio": value / ours, "spread": spread} | environment())
    print(case, f"{ours:.1f} us", {n: f"{v / ours:.2f}x" for n, (v, _) in found.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="*", default=["share", "cold", "sweep", "many"])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="*", default=[32, 64, 128, 512], help="of `many`")
    parser.add_argument("--spend", type=float, default=2.0, help="seconds of each timing")
    args = parser.parse_args()
    path = args.out / "decode_cpu.jsonl"
    for threads in args.threads:
        torch.set_num_threads(threads)
        for sparsity in args.sparsities:
            case = {"sparsity": sparsity, "threads": threads}
            if "share" in args.parts:
                share, read = bandwidth_share(sparsity, threads, args.spend * 3)
                print(case, f"share {share:.3f} of {read / 1e9:.1f} GB/s", flush=True)
                line = {"bench": "decode_cpu", "summary": "bandwidth_share", "case": case, "value": share}
                line |= {"sense": ">=", "must": 0.8 if sparsity == 0.5 else None, "unit": "of read bandwidth", "n": 1}
                append(path, line | environment())
            if "cold" in args.parts:
                for shape in [*dict.fromkeys(BLOCK), HEAD]:
                    record(path, case | {"shape": list(shape), "variant": "cold"}, cold(shape, sparsity, args.spend))
            if "sweep" in args.parts:
                record(path, case | {"variant": "sweep"}, sweep(sparsity, args.spend))
            if "many" in args.parts:
                for shape, tokens in itertools.product(MANY, args.tokens):
                    found = many(shape, tokens, sparsity, args.spend)
                    this = case | {"shape": list(shape), "tokens": tokens, "variant": "many"}
                    record(path, this, found, "cpu_bitmask_many")


if __name__ == "__main__":
    main()
