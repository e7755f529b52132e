"""A feed-forward block and a transformer block in 2:4 training, forward and backward, against dense torch.compile.

    python benchmarks/bench_ffn24.py --out FOLDER

One micro-batch of 16,384 tokens an optimizer step, bfloat16. Pruning, compressing and the sampling of gradients are
inside; of the search of the transposable masks, made every 40th step in FST, a fortieth. All variants take turns, so
that the GPU's clocks are the same for all. The dense block is compiled in two ways, whole and in two parts as the
sparse one is, and the faster is the baseline. Summaries: "s_ste" (the forward product sparse), "transposable" (that and
the gradient of the input), "fst" (all three) by {"d", "ff"}; "block": a whole block, attention included, with the best
of them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer import cuda_patterns
from gossamer.train.ffn24 import Recipe, ffn24, prune
from results import append, environment

RESULTS = Path(__file__).parent / "results"
TOKENS, SEQUENCE, REFRESH = 16384, 2048, 40
MUST = {"s_ste": 1.08, "transposable": 1.15, "fst": 1.20, "block": 1.08}
TOLERANCE = 2e-2  # relative (Frobenius), of chains of products in bfloat16


class Size(NamedTuple):
    """Of a block: `heads` of attention, ACT(x w_in^T) w_out^T with two halves of w_in if `gated`."""

    d: int
    ff: int
    act: cuda_patterns.Act
    gated: bool
    heads: int


SIZES = (Size(4096, 14336, "silu", True, 32), Size(2048, 8192, "gelu_tanh", False, 16))


class FeedForward(nn.Module):
    """Dense; `recipe` makes its products sparse."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.recipe: Recipe | None = None
        self.masks: list[Tensor | None] = [None, None]
        self.w_in = nn.Parameter(torch.empty(size.ff * (1 + size.gated), size.d))
        self.w_out = nn.Parameter(torch.empty(size.d, size.ff))
        for w in (self.w_in, self.w_out):
            nn.init.normal_(w, std=0.02)

    def sparse(self, recipe: Recipe) -> FeedForward:
        """The same weights under this recipe."""
        twin = copy.copy(self)
        twin.recipe = recipe
        twin.masks = [None if recipe == "s_ste" else cuda_patterns.transposable(w) for w in (self.w_in, self.w_out)]
        return twin

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe is None:
            return F.linear(activated(F.linear(x, self.w_in), self.size), self.w_out)
        first, second = (prune(w, self.recipe, m) for w, m in zip((self.w_in, self.w_out), self.masks, strict=True))
        return ffn24(x, self.w_in, self.w_out, first, second, self.size.act)


def activated(z: Tensor, size: Size) -> Tensor:
    if size.gated:
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(z, approximate="tanh")


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.norm = size.heads, nn.RMSNorm(size.d)
        self.qkv, self.out = nn.Linear(size.d, 3 * size.d, bias=False), nn.Linear(size.d, size.d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention, self.norm, self.ffn = Attention(size), nn.RMSNorm(size.d), FeedForward(size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.ffn(self.norm(x))

    def with_ffn(self, ffn: nn.Module) -> Block:
        """The same block around another feed-forward block."""
        twin = copy.copy(self)
        twin._modules = self._modules | {"ffn": ffn}
        return twin


class Apart(nn.Module):
    """A module compiled by itself, which the compiler leaves alone in another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.run = compiled(module)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def seconds(runs: Sequence[Callable[[], object]], rounds: int = 7, calls: int = 3) -> list[tuple[float, float]]:
    """Of each, median seconds of a call on the GPU, and interquartile range / median; behind a wait, so launches queue
    up. They take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, own in zip(runs, times, strict=True):
            run()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(20_000_000)
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            if turn:  # the first warms up
                own.append(begin.elapsed_time(end) / 1e3 / calls)
    quartiles = [statistics.quantiles(own, n=4) for own in times]
    return [(median, (high - low) / median) for low, median, high in quartiles]


def training(module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, dy: Tensor) -> Callable:
    def step() -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        module(x).backward(dy)

    return step


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, dynamic=False)


def search_time(ffn: FeedForward) -> float:
    """Of the masks, the share of a step."""
    if ffn.recipe == "s_ste":
        return 0.0
    return seconds([lambda: [cuda_patterns.transposable(w) for w in (ffn.w_in, ffn.w_out)]])[0][0] / REFRESH


def checked(ffn: FeedForward, x: Tensor) -> None:
    """The block with its pruned weights, dense and in float32, says the same."""
    assert ffn.recipe is not None
    part = x.detach()[:1, :256]
    pruned = [prune(w, ffn.recipe, m).dense.float() for w, m in zip((ffn.w_in, ffn.w_out), ffn.masks, strict=True)]
    expected = F.linear(activated(F.linear(part.float(), pruned[0]), ffn.size), pruned[1])
    error = float((ffn(x)[:1, :256].float() - expected).norm() / expected.norm())
    assert error < TOLERANCE, f"{ffn.recipe}: relative error {error:.2e}"


class Report:
    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, name: str, size: Size, ours: float, spread: float, dense: float, case: dict) -> None:
        full = {"d": size.d, "ff": size.ff, "act": size.act, "tokens": TOKENS, "variant": name} | case
        line = {"bench": "ffn24", "case": full, "ours": ours * 1e3, "baseline": "dense torch.compile"}
        line |= {"baseline_value": dense * 1e3, "unit": "ms", "ratio": dense / ours, "spread": spread}
        append(self.path, line | environment("cuda"))
        print(full, f"{ours * 1e3:.2f} ms, dense {dense * 1e3:.2f}: {dense / ours:.3f}x", flush=True)

    def summary(self, name: str, case: dict, value: float, n: int) -> None:
        line = {"bench": "ffn24", "summary": name, "case": case, "value": value, "sense": ">=", "must": MUST[name]}
        append(self.path, line | {"unit": "x", "n": n} | environment("cuda"))


def batch(size: Size) -> tuple[Tensor, Tensor]:
    """x and the gradient of y."""
    x = torch.randn(TOKENS // SEQUENCE, SEQUENCE, size.d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn_like(x)


def feed_forward(report: Report, size: Size) -> Recipe:
    """Every recipe; gives the best."""
    ffn, (x, dy) = FeedForward(size).to("cuda", torch.bfloat16), batch(size)
    sparse = {recipe: ffn.sparse(recipe) for recipe in get_args(Recipe)}
    for own in sparse.values():
        checked(own, x)
    modules = [compiled(ffn), *sparse.values()]
    (dense, _), *measured = seconds([training(m, list(ffn.parameters()), x, dy) for m in modules])
    found: dict[Recipe, float] = {}
    for (recipe, own), (ours, spread) in zip(sparse.items(), measured, strict=True):
        found[recipe] = ours + search_time(own)
        report.line(recipe, size, found[recipe], spread, dense, {})
        report.summary(recipe, {"d": size.d, "ff": size.ff}, dense / found[recipe], 1)
    return min(found, key=found.__getitem__)


def block(report: Report, size: Size, recipe: Recipe) -> None:
    model, (x, dy) = Block(size).to("cuda", torch.bfloat16), batch(size)
    sparse = model.ffn.sparse(recipe)
    modules = [compiled(m) for m in (model, model.with_ffn(Apart(model.ffn)), model.with_ffn(sparse))]
    *dense, (ours, spread) = seconds([training(m, list(model.parameters()), x, dy) for m in modules])
    ours, best = ours + search_time(sparse), min(median for median, _ in dense)
    report.line("block", size, ours, spread, best, {"recipe": recipe})
    report.summary("block", {"d": size.d, "ff": size.ff}, best / ours, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    report = Report(args.out / "ffn24.jsonl")
    for size in SIZES:
        block(report, size, feed_forward(report, size))


if __name__ == "__main__":
    main()
