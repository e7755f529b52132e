"""What an eager call of a prepared layer costs the host, beside `torch.nn.Linear`: small weights, few tokens.

    python benchmarks/bench_host.py --out FOLDER [--device cuda | cpu]

Where the GPU waits for the host, as in `generate` without CUDA graphs, this is what a token costs; on the CPU it comes
on top of every product. The weights are so small that a GPU is never behind, and on the CPU the product is next to
nothing. As in a model many layers are called one after the other, each rarely enough to have left the nearest caches.
All ways take turns. Summary "layer_host_us": microseconds of the host until the call returns; "layer_over_linear": at
the least, how many times as long `torch.nn.Linear` takes as a layer that runs the same product ("vendor"). Lines with a
`variant` say what a kernel takes without the layer around it.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import gossamer
from gossamer import native
from gossamer.dispatch import Step
from gossamer.formats import Format
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.formats.nm24 import NM
from gossamer.kernels import registry
from gossamer.nn import SparseLinear
from gossamer.patterns import nm
from results import append, environment

RESULTS = Path(__file__).parent / "results"
SHAPE = {"cuda": (512, 1024), "cpu": (16, 16)}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
KERNELS = {
    "cuda": {"cuda_lscd": Bitmask, "cuda_nm24": NM, "vendor": NM},
    "cpu": {"cpu_bitmask": Bitmask, "cpu_dense": Bitmask, "vendor": Bitmask},
}
SHARED = {"cuda": "cuda_lscd", "cpu": "cpu_bitmask"}  # of q, k and v
TOKENS = (1, 16)
LAYERS, ROUNDS = 48, 41  # calls in a row, and how often
Call = Callable[[Tensor], object]
Name = tuple[str, str | None]  # kernel, variant


def pruned(device: str) -> Tensor:
    a = torch.randn(SHAPE[device], device=device, dtype=DTYPE[device])
    return a * nm(a.float(), 2, 4)


def layer_of(a: Format, kernel: str, dtype: torch.dtype) -> SparseLinear:
    """A layer that runs this kernel, at every number of tokens."""
    layer = SparseLinear.from_format(a)
    if kernel in registry and a.name in registry[kernel].formats:
        gossamer.prepare(layer, tokens=TOKENS, dtype=dtype, kernel=kernel)
        return layer
    dense = a.decode(dtype)
    packed = registry[kernel].pack(Dense(a.shape, dense), dtype)
    released = layer.device.type == "cuda"  # as `prepare` does it
    step = Step(kernel, (0 if released else len(layer.parts()),), packed.meta)
    layer.use(dtype, [(TOKENS[-1], (step,))], packed.tensors, step if released else None)
    return layer


def blocks(device: str) -> list[nn.Module]:
    """Layers in threes, each q, k and v in one call."""
    found = nn.ModuleList()
    for _ in range(LAYERS // 3):
        parts = {n: SparseLinear.from_format(Bitmask.encode(pruned(device))) for n in ("q_proj", "k_proj", "v_proj")}
        found.append(nn.ModuleDict(parts))
    gossamer.prepare(found, tokens=TOKENS, dtype=DTYPE[device], kernel=SHARED[device])
    return [layer for block in found for layer in block.values()]  # type: ignore[attr-defined]


def bound(layer: SparseLinear) -> Call:
    """The kernel of a layer without the layer."""
    (_, call, _), *_ = layer._bind()[2]
    return call


def rivals(device: str) -> dict[Name, Sequence[Call]]:
    """Per kernel and variant the calls that are made one after the other."""
    found: dict[Name, Sequence[Call]] = {}
    for kernel, kind in KERNELS[device].items():
        layers = [layer_of(kind.encode(pruned(device)), kernel, DTYPE[device]) for _ in range(LAYERS)]
        found[kernel, None], found[kernel, "kernel"] = layers, [bound(layer) for layer in layers]
    found["q, k and v", None] = blocks(device)
    linear = nn.Linear(*SHAPE[device][::-1], bias=False, device=device, dtype=DTYPE[device])
    found["torch.nn.Linear", None] = [copy.deepcopy(linear) for _ in range(LAYERS)]
    return found


def in_turns(calls: dict[Name, Sequence[Call]], x: Tensor) -> dict[Name, list[float]]:
    """Microseconds a call, of every round but the first. Each time in another order, since one warms the next's way."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    wait = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    for _ in range(ROUNDS):
        for name in random.sample([*calls], len(calls)):
            wait()
            begin = time.perf_counter()
            for call in calls[name]:
                call(x)
            times[name].append((time.perf_counter() - begin) / LAYERS * 1e6)
    wait()
    return {name: found[1:] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="the host's share of an eager call")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=KERNELS, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    calls, report = rivals(args.device), Report(args.out / "host.jsonl", args.device)
    for tokens in TOKENS:
        x = torch.randn(1, tokens, SHAPE[args.device][1], device=args.device, dtype=DTYPE[args.device])
        with torch.inference_mode():
            times = in_turns(calls, x)
        base = times.pop(("torch.nn.Linear", None))
        for (kernel, variant), mine in times.items():
            report.line({"kernel": kernel, "tokens": tokens, "layers": LAYERS}, variant, mine, base)
    report.summary("layer_over_linear", {}, min(report.ratios), "x", ">=", len(report.ratios))


class Report:
    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device, self.ratios = path, device, list[float]()

    def line(self, case: dict, variant: str | None, mine: list[float], base: list[float]) -> None:
        # Minutes of a machine differ by more than the ways do, so the ratio is that of the rounds.
        ratio = statistics.median(b / m for b, m in zip(base, mine, strict=True))
        low, ours, high = statistics.quantiles(mine, n=4)
        value = statistics.median(base)
        named = case | ({"variant": said} if (said := self._variant(variant)) else {})
        line = {"bench": "host", "case": named, "ours": ours, "baseline": "torch.nn.Linear", "baseline_value": value}
        line |= {"ratio": ratio, "unit": "us", "spread": (high - low) / ours}
        append(self.path, line | environment(self.device))
        print(named, f"{ours:.2f} us, torch.nn.Linear {value:.2f}: {ratio:.3f}x", flush=True)
        if variant is None:
            self.ratios += [ratio] * (case["kernel"] == "vendor")
            self.summary("layer_host_us", case, ours, "us", "<=", len(mine))

    def summary(self, name: str, case: dict, value: float, unit: str, sense: str, n: int) -> None:
        case = case | ({"variant": said} if (said := self._variant(None)) else {})
        line = {"bench": "host", "summary": name, "case": case, "value": value, "sense": sense, "must": None}
        append(self.path, line | {"unit": unit, "n": n} | environment(self.device))
        if name == "layer_over_linear":
            print(name, f"{value:.3f}", flush=True)

    def _variant(self, variant: str | None) -> str:
        return ", ".join(filter(None, (variant, None if native.available() else "without native code")))


if __name__ == "__main__":
    main()
