"""What an eager call of a prepared layer costs the host on a GPU, beside `torch.nn.Linear`: small weights, few tokens.

    python benchmarks/bench_host.py --out FOLDER

Where the GPU waits for the host, as in `generate` without CUDA graphs, this is what a token costs. The weights are so
small that the GPU is never behind. Summary "layer_host_us": microseconds of the host until the call returns, of a
layer that runs its sparse kernel; lines with a `variant` say where they go.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import gossamer
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.nn import SparseLinear
from gossamer.patterns import nm
from nm24_timing import ROUNDS, Call, host_us
from results import append, environment

RESULTS = Path(__file__).parent / "results"
ROWS, COLS = 512, 1024


def layers() -> dict[str, SparseLinear]:
    """One of each kind that decodes on a GPU, with its kernel for every size."""
    a = torch.randn(ROWS, COLS, device="cuda", dtype=torch.bfloat16)
    kept = torch.rand(a.shape, device="cuda") < 0.4
    found = {
        "cuda_lscd": SparseLinear.from_format(Bitmask.encode(a * kept)),
        "cuda_nm24": SparseLinear.from_format(NM.encode(a * nm(a.float(), 2, 4))),
    }
    for kernel, layer in found.items():
        gossamer.prepare(layer, tokens=[1, 16], dtype=a.dtype, kernel=kernel)
    return found


def three(layers: Sequence[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def stacked(layer: SparseLinear) -> list[nn.Module]:
    """q, k and v, each as `layer`, in one call."""
    parts: list[nn.Module] = [SparseLinear.from_format(layer.format) for _ in range(3)]
    names = ("q_proj", "k_proj", "v_proj")
    block = nn.ModuleDict(dict(zip(names, parts, strict=True)))
    gossamer.prepare(block, tokens=[1, 16], dtype=torch.bfloat16, kernel="cuda_lscd")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description="the host's share of an eager call on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    dense = nn.Linear(COLS, ROWS, bias=False, device="cuda", dtype=torch.bfloat16)
    triple = [copy.deepcopy(dense) for _ in range(3)]
    found = layers()
    block = stacked(found["cuda_lscd"])
    for tokens in (1, 16):
        x = torch.randn(1, tokens, COLS, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            base, three_base = host_us(partial(dense, x))[0], host_us(partial(three, triple, x))[0]
            for kernel, layer in found.items():
                (_, call), *_ = layer._bind()[2]
                for variant, way in {None: partial(layer, x), "kernel": partial(call, x)}.items():
                    report(args.out, {"kernel": kernel, "tokens": tokens, "variant": variant}, way, base)
            report(
                args.out,
                {"kernel": "q, k and v", "tokens": tokens, "variant": None},
                partial(three, block, x),
                three_base,
            )


def report(out: Path, case: dict, call: Call, base: float) -> None:
    ours, spread = host_us(call)
    case = {k: v for k, v in case.items() if v is not None}
    line = {"bench": "host", "case": case, "ours": ours, "baseline": "torch.nn.Linear", "baseline_value": base}
    append(out / "host.jsonl", line | {"ratio": base / ours, "unit": "us", "spread": spread} | environment("cuda"))
    if "variant" not in case:
        line = {"bench": "host", "summary": "layer_host_us", "case": case, "value": ours, "sense": "<=", "must": None}
        append(out / "host.jsonl", line | {"unit": "us", "n": ROUNDS} | environment("cuda"))
    print(case, f"{ours:.1f} us, torch.nn.Linear {base:.1f}", flush=True)


if __name__ == "__main__":
    main()
