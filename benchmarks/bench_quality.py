"""Perplexity at equal stored bytes: every method on one real Llama, batched by layer type.

    python benchmarks/bench_quality.py ids ../shared/data MODEL ids.safetensors       # tokens to calibrate and evaluate
    python benchmarks/bench_quality.py run MODEL ids.safetensors --device cuda

MODEL is a Hugging Face folder or a .gguf file. Appends to benchmarks/results/quality.jsonl and compress_time.jsonl.
gap = ln(perplexity) - ln(perplexity of the dense model); every stored byte counts, values are bf16 (int8 and int6: one
bf16 scale per output).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer import choose, evaluate, methods, texts
from gossamer.formats import nbytes
from gossamer.stats import Stats
from results import append, environment

LENGTH = 1024
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# name -> (method, knobs); compared against `svd`, or in AGAINST with what is named there.
VARIANTS: dict[str, tuple[str, dict]] = {
    "svd": ("svd", {}),
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "per_matrix": ("cospadi", {"share": False}),
    "shared": ("cospadi", {"share": True}),
    "per_matrix_rho2": ("cospadi", {"share": False, "rho": 2.0}),
    # Free codes with the rounds that 2:4 ones get, which by themselves they do not.
    "per_matrix_rho2_long": ("cospadi", {"share": False, "rho": 2.0, "iterations": 120, "steps": 6}),
    "2:4": ("cospadi", {"share": False, "codes": "nm24"}),
    "shared_rho2": ("cospadi", {"share": True, "rho": 2.0}),
    "shared_2:4": ("cospadi", {"share": True, "codes": "nm24"}),
    "inputs": ("cospadi", {"share": False, "rho": 2.0, "side": "in"}),
    "2:4_inputs": ("cospadi", {"share": False, "codes": "nm24", "side": "in"}),
    "ksvd": ("cospadi", {"share": False, "rho": 2.0, "side": "in", "solver": "ksvd"}),
}
BARS = {
    ("gap_vs_svd", "per_matrix"): {0.2: 0.40, 0.3: 0.48, 0.4: 0.54},
    ("gap_vs_svd", "shared"): {0.2: 0.24, 0.3: 0.33, 0.4: 0.48},
    ("gap_vs_ksvd", "inputs"): {0.2: 1.0, 0.3: 1.0, 0.4: 1.0},
    ("gap_vs_free", "2:4"): {0.2: 1.15, 0.3: 1.15, 0.4: 1.15},
    ("gap_vs_free", "2:4_inputs"): {0.2: 1.15, 0.3: 1.15, 0.4: 1.15},
}
# The same k and s as the paper's solver; the same rho as 2:4 has.
AGAINST = {
    "inputs": ("gap_vs_ksvd", "ksvd"),
    "2:4": ("gap_vs_free", "per_matrix_rho2"),
    "2:4_inputs": ("gap_vs_free", "inputs"),
    "shared_2:4": ("gap_vs_free", "shared_rho2"),
}


def write_ids(data: Path, model: str, out: Path, samples: int, windows: int, seed: int = 42) -> None:
    """Half novels, half Wikipedia leads to calibrate on, at random places; WikiText-2's test set to evaluate on."""
    tokenizer = AutoTokenizer.from_pretrained(*_source(model)[0], **_source(model)[1])
    generator = torch.Generator().manual_seed(seed)
    picked = []
    for name in ("novels/novels.train.txt.xz", "wiki_leads/wiki.train.txt.xz"):
        text = read(data / name)[:12_000_000]
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        pool = tokens[: tokens.numel() // LENGTH * LENGTH].view(-1, LENGTH)
        picked.append(pool[torch.randperm(len(pool), generator=generator)[: samples // 2]])
    raw = texts.join_wikitext(read(data / "wikitext2/wiki.test.raw.xz"))
    test = evaluate.encode_text(tokenizer, raw)[: windows * LENGTH]
    save_file({"calibration": torch.cat(picked).int(), "evaluation": test.int()}, out)


def read(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def _source(model: str) -> tuple[tuple[str], dict]:
    path = Path(model)
    return ((str(path.parent),), {"gguf_file": path.name}) if path.suffix == ".gguf" else ((model,), {})


class Bench:
    def __init__(self, model: str, ids: dict[str, Tensor], device: str) -> None:
        where, knobs = _source(model)
        self.model = AutoModelForCausalLM.from_pretrained(*where, **knobs, dtype=torch.float32).eval().to(device)
        self.blocks = self.model.model.layers
        self.weights = {n: m.weight.detach().clone() for n, m in self._linears()}
        self.evaluation = ids["evaluation"].long().to(device)
        self.device = device
        self.stats = self._calibrate(ids["calibration"].long().to(device))
        self.dense = math.log(self.perplexity())

    def _linears(self) -> Iterator[tuple[str, nn.Linear]]:
        for i, block in enumerate(self.blocks):
            for group in GROUPS:
                yield from ((f"{i}.{name}", block.get_submodule(name)) for name in group)

    @torch.inference_mode()
    def _calibrate(self, ids: Tensor) -> dict[str, Stats]:
        grams: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self.device))

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                x = inputs[0].flatten(0, -2)
                grams[name] = grams[name] + (x.mT @ x).double()

            return hook

        firsts = [(f"{i}.{g[0]}", b.get_submodule(g[0])) for i, b in enumerate(self.blocks) for g in GROUPS]
        hooks = [m.register_forward_pre_hook(watch(n)) for n, m in firsts]
        for batch in ids.split(4):
            self.model.model(batch)
        for hook in hooks:
            hook.remove()
        return {n: Stats(g, ids.numel()) for n, g in grams.items()}

    def perplexity(self) -> float:
        return evaluate.perplexity(self.model, self.evaluation, window=LENGTH).value

    def fit(self, name: str, ratio: float, layers: list[int]) -> dict:
        """Fit a variant, put the decoded weights into the model, evaluate, put the dense ones back."""
        method = methods.create(VARIANTS[name][0], **VARIANTS[name][1])
        stored = seconds = total = 0.0
        errors = defaultdict(list)
        for group in GROUPS:
            weights = [[self.weights[f"{i}.{n}"] for n in group] for i in layers]
            stats = [self.stats[f"{i}.{group[0]}"] for i in layers]
            start = self._now()
            found = method.fit_many(weights, stats, ratio)
            seconds += self._now() - start
            stored += sum(nbytes(f) for f in found)
            total += sum(2 * w.numel() for ws in weights for w in ws)
            for i, ws, fs, st in zip(layers, weights, found, stats, strict=True):
                for n, w, f in zip(group, ws, fs, strict=True):
                    decoded = f.decode(torch.float32)
                    errors[n.rpartition(".")[2]].append(st.relative_error(w, decoded))
                    self.blocks[i].get_submodule(n).weight.data = decoded
        gap = math.log(self.perplexity()) - self.dense
        self.restore()
        mean = {n: sum(v) / len(v) for n, v in errors.items()}
        return {"gap": gap, "ratio": 1 - stored / total, "seconds": seconds, "error": mean}

    def rounded(self, bits: int) -> dict:
        """Round to nearest, one scale per output, in place of a method."""
        for name, linear in self._linears():
            linear.weight.data = choose.rounded(self.weights[name], bits)
        gap = math.log(self.perplexity()) - self.dense
        self.restore()
        numel = sum(w.numel() for w in self.weights.values())
        scales = sum(w.shape[0] for w in self.weights.values())
        return {"gap": gap, "ratio": 1 - (numel * bits / 8 + 2 * scales) / (2 * numel), "seconds": 0.0}

    def restore(self) -> None:
        for name, linear in self._linears():
            linear.weight.data = self.weights[name]

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def run(args: argparse.Namespace) -> None:
    bench = Bench(args.model, load_file(args.ids), args.device)
    layers = args.layers or list(range(len(bench.blocks)))
    shared = {"model": args.name} | ({"layers": layers} if args.layers else {})
    if (windows := bench.evaluation.numel() // LENGTH) != 64:
        shared["windows"] = windows
    print(f"dense: {math.exp(bench.dense):.3f}", flush=True)
    record(args, "ppl", shared | {"method": "dense", "cr": 0.0}, math.exp(bench.dense), "perplexity")
    for bits in args.bits:
        row = bench.rounded(bits)
        show(f"int{bits}", row, bench.dense)
        case = shared | {"method": f"int{bits}", "cr": round(row["ratio"], 4)}
        record(args, "ppl", case, math.exp(bench.dense + row["gap"]), "perplexity")
    for ratio in args.ratios:
        rows = {}
        for name in args.variants:
            if name == args.warm:
                bench.fit(name, ratio, layers)  # libraries load and choose their kernels on first use
            row = rows[name] = bench.fit(name, ratio, layers)
            show(f"{name} {ratio}", row, bench.dense)
            case = shared | {"method": VARIANTS[name][0], "variant": name, "cr": ratio}
            record(args, "ppl", case, math.exp(bench.dense + row["gap"]), "perplexity", stored_ratio=row["ratio"])
            record(args, "minutes", case | {"device": args.device}, row["seconds"] / 60, "minutes", "compress_time")
        for name, row in rows.items():
            versus(args, shared, rows, name, row, ratio)


def versus(args: argparse.Namespace, shared: dict, rows: dict, name: str, row: dict, ratio: float) -> None:
    pairs = [("gap_vs_svd", "svd")] + ([AGAINST[name]] if name in AGAINST else [])
    for summary, other in pairs:
        if name == other or other not in rows or VARIANTS[name][0] != "cospadi":
            continue
        value = row["gap"] / rows[other]["gap"]
        must = BARS.get((summary, name), {}).get(ratio)
        print(f"   {summary} {name} {ratio}: {value:.3f} (bar {must})", flush=True)
        case = shared | {"cr": ratio, "variant": name}
        record(args, summary, case, value, "gap ratio", must=must)
        if other == "ksvd":
            faster = rows[other]["seconds"] / row["seconds"]
            print(f"   {faster:.0f} times as fast", flush=True)
            case |= {"device": args.device}
            record(args, "speedup_vs_ksvd", case, faster, "x", "compress_time", must=100.0, sense=">=")


def show(label: str, row: dict, dense: float) -> None:
    errors = {k: round(v, 4) for k, v in row.get("error", {}).items()}
    print(
        f"{label:22} ppl {math.exp(dense + row['gap']):9.3f} gap {row['gap']:.4f} stored ratio {row['ratio']:.4f} "
        f"{row['seconds']:.1f} s  {json.dumps(errors)}",
        flush=True,
    )


def record(
    args: argparse.Namespace,
    summary: str,
    case: dict,
    value: float,
    unit: str,
    bench: str = "quality",
    must: float | None = None,
    sense: str = "<=",
    **extra: float,
) -> None:
    line = {"bench": bench, "summary": summary, "case": case, "value": round(value, 6), "sense": sense, "must": must}
    append(args.out / f"{bench}.jsonl", line | {"unit": unit, "n": 1} | extra | environment(args.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    ids = verbs.add_parser("ids")
    ids.add_argument("data", type=Path)
    ids.add_argument("model")
    ids.add_argument("out", type=Path)
    ids.add_argument("--samples", type=int, default=256, help="calibration windows of 1,024 tokens")
    ids.add_argument("--windows", type=int, default=64, help="evaluation windows of 1,024 tokens")
    go = verbs.add_parser("run")
    go.add_argument("model")
    go.add_argument("ids", type=Path)
    go.add_argument("--name", default="SmolLM2-135M")
    go.add_argument("--device", default="cpu")
    go.add_argument("--ratios", type=float, nargs="*", default=[0.2, 0.3, 0.4, 0.5])
    go.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    go.add_argument("--layers", type=int, nargs="*", help="replace only these blocks")
    go.add_argument("--warm", choices=list(VARIANTS), help="fit this variant once before it is timed")
    go.add_argument("--bits", type=int, nargs="*", default=[8, 6])
    go.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.verb == "run":
        run(args)
    else:
        write_ids(args.data, args.model, args.out, args.samples, args.windows)


if __name__ == "__main__":
    main()
