"""Decoding on the CPU: one token through all linear layers of a real Llama, sparse against the best dense.

    python benchmarks/bench_decode_cpu.py MODEL

MODEL is a Hugging Face folder (SmolLM2-135M). Every linear layer of the blocks and the head is pruned by magnitude and
stored as a bf16 bitmask. Appends to benchmarks/results/decode_cpu.jsonl:

- tokens_per_s_ratio: `eager` and `compile` are the block linears and the head alone, in the order of a decoding step;
  `model_eager` and `model_compile` are whole decoding steps with a static KV cache, attention and all;
- worst_vs_dense: the smallest ratio, over sparsities and numbers of tokens, of the prepared layers to the best dense:
  the median over turns of the ratio, in an order that changes. `again` is the same of a dense model and its copy, which
  ought to be 1: what the machine adds.

Dense is the best of torch in float32, torch in bfloat16 and Gossamer's own dense kernel on bf16 weights; all runs of a
figure are interleaved in one process.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

from gossamer import patterns, prepare
from gossamer.formats.bitmask import Bitmask
from gossamer.nn import SparseLinear
from gossamer.prepare import run_dense
from gossamer.timing import race
from results import append, environment

BARS = {0.5: 1.4, 0.7: 1.8}
CPU = torch.device("cpu")
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Linears(nn.Module):
    """The linear layers of a Llama in the order of a decoding step, with as little as possible between them.

    tanh keeps numbers in bounds and costs less than a norm; k and v are gathered, so that no compiler leaves them out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = [
            [*(getattr(b.self_attn, n) for n in NAMES[:4]), *(getattr(b.mlp, n) for n in NAMES[4:])]
            for b in model.model.layers
        ]
        self.all = nn.ModuleList(m for block in self.blocks for m in block)
        self.head = model.lm_head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for q, k, v, o, gate, up, down in self.blocks:
            heads, *rest = q(x), k(x), v(x)
            kept += rest
            h = o(heads)
            x = down(torch.tanh(gate(h) * up(h)))
        return self.head(x), torch.cat(kept, -1)


def pruned(dense: nn.Module, sparsity: float) -> nn.Module:
    """A copy whose block linears and head are bf16 bitmasks."""
    model = copy.deepcopy(dense)
    targets = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in targets:
        weight = linear.weight.detach()
        mask = patterns.top(weight.abs().float().flatten(), round((1 - sparsity) * weight.numel())).view_as(weight)
        sparse = Bitmask.encode(torch.where(mask, weight, 0).bfloat16())
        model.set_submodule(name, SparseLinear.from_format(sparse, linear.bias))
    return model


def step(model: nn.Module, dtype: torch.dtype, compiled: bool) -> Callable[[], Tensor]:
    """One decoding step of the whole model at position 64."""
    ids = torch.arange(1, 65)[None]
    cache = StaticCache(config=model.config, max_cache_len=128)
    token = torch.tensor([[7]])
    position = torch.tensor([[64]])
    run = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    model(input_ids=ids, past_key_values=cache, use_cache=True)

    def call() -> Tensor:
        # The step writes the same place again, so that every call does the same work.
        cache_position(cache, 64)
        return run(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits

    return call


def cache_position(cache: StaticCache, length: int) -> None:
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            value = layer.cumulative_length
            layer.cumulative_length = value.fill_(length) if isinstance(value, Tensor) else length


def ways(models: dict[str, nn.Module], make: Callable[[nn.Module, torch.dtype], Callable[[], object]]) -> dict:
    return {name: [make(m, torch.bfloat16 if name.endswith("bf16") else torch.float32)] for name, m in models.items()}


def variants(dense: nn.Module, sparse: nn.Module, sizes: tuple[int, ...]) -> dict[str, nn.Module]:
    """What is raced: three dense runs and the prepared one, in float32 and bfloat16."""
    found = {"torch fp32": copy.deepcopy(dense).float(), "torch bf16": copy.deepcopy(dense).bfloat16()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        own = copy.deepcopy(sparse).to(dtype)
        run_dense(own, "cpu_dense", dtype)
        found[f"own dense {name}"] = own
        ours = copy.deepcopy(sparse).to(dtype)
        prepare(ours, tokens=sizes, dtype=dtype, lock=Path(tempfile.mkdtemp()) / "lock.json")
        found[f"sparse {name}"] = ours
    return found


def ratio(times: list[dict[str, float]]) -> tuple[float, float, dict[str, float]]:
    """Best dense over best sparse, its spread over the rounds, and the medians."""
    median = {n: statistics.median(t[n] for t in times) for n in times[0]}
    each = [_ratio(t) for t in times]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return _ratio(median), (high - low) / statistics.median(each), median


def _ratio(times: dict[str, float]) -> float:
    best = {kind: min(t for n, t in times.items() if n.startswith("sparse") == kind) for kind in (True, False)}
    return best[False] / best[True]


def decode(args: argparse.Namespace, dense: nn.Module, sparsity: float) -> None:
    models = variants(dense, pruned(dense, sparsity), (1,))
    for compiled in (False, True):
        torch._dynamo.reset()

        def linears(model: nn.Module, dtype: torch.dtype, compiled: bool = compiled) -> Callable[[], object]:
            x = torch.randn(1, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
            module = Linears(model)
            run = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
            return lambda: run(x)

        def whole(model: nn.Module, dtype: torch.dtype, compiled: bool = compiled) -> Callable[[], Tensor]:
            return step(model, dtype, compiled)

        for prefix, make in (("", linears), ("model_", whole)):
            runners = ways(models, make)
            rounds = [race(runners, CPU, args.seconds) for _ in range(5)]
            value, spread, median = ratio(rounds)
            variant = prefix + ("compile" if compiled else "eager")
            print(
                f"{variant} {sparsity}: {value:.3f}  " + "  ".join(f"{n} {t:.0f}" for n, t in median.items()),
                flush=True,
            )
            must = None if prefix else BARS.get(sparsity)
            case = {"sparsity": sparsity, "variant": variant}
            record(args, "tokens_per_s_ratio", case, value, must, spread, microseconds=median)


def worst(args: argparse.Namespace, dense: nn.Module) -> None:
    found, again = {}, {}
    for sparsity in args.grid:
        models = variants(dense, pruned(dense, sparsity), args.tokens)
        for tokens, kind in itertools.product(args.tokens, ("fp32", "bf16")):
            dtype = torch.float32 if kind == "fp32" else torch.bfloat16
            x = torch.randn(1, tokens, dense.config.hidden_size).to(dtype)
            mine = {n: m for n, m in models.items() if n.endswith(kind) and (tokens <= 16 or "own" not in n)}
            mine["again"] = copy.deepcopy(mine[f"torch {kind}"])
            times = passes({n: partial(Linears(m), x) for n, m in mine.items()}, args.seconds * 10)
            dense_ones = [n for n in times if not n.startswith("sparse") and n != "again"]
            best = min(dense_ones, key=lambda n: statistics.median(times[n]))
            found[sparsity, tokens, kind] = value = paired(times[best], times[f"sparse {kind}"])
            again[sparsity, tokens, kind] = same = paired(times[f"torch {kind}"], times["again"])
            medians = {n: round(statistics.median(t) * 1e6) for n, t in times.items()}
            print(f"{sparsity} {tokens} {kind}: {value:.3f} (again {same:.3f}) {medians}", flush=True)
    (sparsity, tokens, kind), value = min(found.items(), key=lambda item: item[1])
    at = {"sparsity": sparsity, "tokens": tokens, "dtype": kind}
    extra = {"n": len(found), "at": at, "cells": named(found), "again": named(again)}
    record(args, "worst_vs_dense", {}, value, 0.97, None, **extra)


def named(cells: dict[tuple[float, int, str], float]) -> dict[str, float]:
    return {f"{s} {t} {k}": round(v, 4) for (s, t, k), v in cells.items()}


def passes(runners: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every pass of every runner: in turns, at least 21 each, every turn starting with another runner."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    names, stop = list(runners), time.perf_counter() + seconds
    for run in runners.values():
        run()
    while len(times[names[0]]) < 21 or time.perf_counter() < stop:
        for name in names:
            start = time.perf_counter()
            runners[name]()
            times[name].append(time.perf_counter() - start)
        names = [*names[1:], names[0]]
    return times


def paired(slow: list[float], fast: list[float]) -> float:
    """How many times faster, by the median over turns."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def record(
    args: argparse.Namespace,
    summary: str,
    case: dict,
    value: float,
    must: float | None,
    spread: float | None,
    **extra: object,
) -> None:
    line = {"bench": "decode_cpu", "summary": summary, "case": case, "value": round(value, 4), "sense": ">="}
    line |= {"must": must, "unit": "x", "n": 1, "threads": torch.get_num_threads()}
    if spread is not None:
        line["spread"] = round(spread, 4)
    append(args.out / "decode_cpu.jsonl", line | extra | environment("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--grid", type=float, nargs="*", default=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="per way and round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.tokens = tuple(args.tokens)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for sparsity in args.sparsities:
            decode(args, dense, sparsity)
        if args.grid:
            worst(args, dense)


if __name__ == "__main__":
    main()
