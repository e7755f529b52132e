"""Decoding with unstructured sparsity on one GPU: tokens per second and memory of whole models.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True    # else packing leaves holes, and fewer sequences fit
    python benchmarks/bench_llm_decode.py                                          # Llama-3-8B shapes, batch 1, 8, 16
    python benchmarks/bench_llm_decode.py --models opt-30b --sparsities 0.7 0.8    # the largest batch that fits

Random weights in transformers' own models, pruned by magnitude. One step of greedy decoding at the end of a full static
cache is captured as a CUDA graph, the very same way for both sides, and replayed; tokens per second are batch over
median step. Dense is torch's nn.Linear in bfloat16. What is not linear is the same code on both sides and as lean as in
a serving engine: one kernel each for a norm, a rotation and a gate, and attention without a mask, in which queries that
share keys go together (transformers' own launches 40 small kernels a layer, and copies the cache for every query).
For OPT the largest batch is asked for: the cache has 1,024 places, and of the sparse side no more than one dense matrix
exists at a time. Summaries are of the largest batches that fit into all of the GPU's memory, and into 90 % of it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

import gossamer
from gossamer.formats.bitmask import Bitmask
from gossamer.kernels import registry
from gossamer.nn import SparseLinear, sparse_layers
from results import append, environment

RESULTS = Path(__file__).parent / "results"
STEPS = 32
TOLERANCE = 5e-2  # relative (Frobenius), of the logits of two products in bfloat16, layer after layer
MARGIN = 1 << 30  # bytes left for what a step needs
SERVED = 0.9  # share of the GPU's memory that vLLM fills by default
MODELS: dict[str, Any] = {
    "llama-3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "qwen2.5-14b": Qwen2Config(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
    "opt-30b": OPTConfig(
        hidden_size=7168,
        ffn_dim=28672,
        num_hidden_layers=48,
        num_attention_heads=56,
        vocab_size=50272,
        word_embed_proj_dim=7168,
        max_position_embeddings=2048,
    ),
    "tiny": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}
FULL = 1024  # places in the cache where the largest batch is asked for
MUST = {("tokens_per_s_ratio", "llama-3-8b", 0.6): 1.22, ("linear_memory_ratio", "llama-3-8b", 0.6): 0.55}
MUST |= {("tokens_per_gpu_second_ratio", "opt-30b", 0.7): 2.2}


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float = 1.0, **more: Any
) -> tuple[Tensor, None]:
    """One token per sequence, which sees the whole cache; queries that share keys are rows of one product."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    found = nn.functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return found.reshape(batch, 1, heads, width), None


AttentionInterface.register("grouped", attention)
# Where the compiled core is missing, its importers keep the error, and with it all that is on the stack: not a model.
KERNELS = [registry[name] for name in registry]


def fuse(model: Any) -> Any:
    """One kernel for each norm, rotation and gate of Llama and its kin."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
        elif hasattr(module, "gate_proj"):
            module.forward = partial(_mlp, module)
    source = sys.modules[type(model).__module__]
    if hasattr(source, "apply_rotary_pos_emb") and model.device.type == "cuda":
        vars(source)["apply_rotary_pos_emb"] = _compiled(source.apply_rotary_pos_emb)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    gated = _compiled(_gated) if x.is_cuda else _gated
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    known = getattr(function, "_torchdynamo_orig_callable", None)
    return function if known else torch.compile(function, dynamic=False)


def weight(name: str, shape: Sequence[int], device: str) -> Tensor:
    """The same for the same name, in bfloat16."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)


def pruned(a: Tensor, sparsity: float) -> Tensor:
    """In place, by magnitude; the threshold is the quantile of a million entries."""
    sample = a.flatten()[:: max(1, a.numel() // 1_000_000)][:1_000_000].abs().float()
    for part in a.split(4096):
        part.masked_fill_(part.abs() <= torch.quantile(sample, sparsity), 0)
    return a


def skeleton(config: Any) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="grouped").eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """What is pruned: every linear layer but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def fill(model: Any, device: str) -> Any:
    """Real parameters and buffers where they are on the meta device still."""
    for name, module in list(model.named_modules()):
        for own, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                module._parameters[own] = nn.Parameter(_value(f"{name}.{own}", p, device), requires_grad=False)
        if any(b.is_meta for b in module.buffers(recurse=False)):
            with torch.device(device):
                model.set_submodule(name, type(module)(config=model.config))  # a rotary embedding
    model.tie_weights()
    return fuse(model)


def _value(name: str, p: Tensor, device: str) -> Tensor:
    if p.ndim > 1:
        return weight(name, p.shape, device)
    return torch.full(p.shape, float(name.endswith("norm.weight")), dtype=p.dtype, device=device)


def sparse_linear(name: str, layer: nn.Linear, sparsity: float, device: str) -> SparseLinear:
    """From the layer's own weight if it has one, else from a new one."""
    dense = weight(f"{name}.weight", layer.weight.shape, device) if layer.weight.is_meta else layer.weight.detach()
    bias = None if layer.bias is None else torch.zeros(len(dense), dtype=dense.dtype, device=device)
    return SparseLinear.from_format(Bitmask.encode(pruned(dense, sparsity)), bias)


def make_sparse(model: Any, sparsity: float, device: str) -> Any:
    for name, layer in linears(model).items():
        model.set_submodule(name, sparse_linear(name, layer, sparsity, device))
    return fill(model, device)


class Cache:
    """Keys and values of `places` tokens, the last of which is being decoded."""

    def __init__(self, config: Any, batch: int, places: int, device: torch.device, generator: torch.Generator) -> None:
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = config.num_hidden_layers, 2, batch, heads, places, config.hidden_size // config.num_attention_heads
        self.held = [[_normal(shape[2:], device, generator) for _ in range(2)] for _ in range(shape[0])]
        self.places, self.last = places, torch.tensor([places - 1], device=device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> list[Tensor]:
        for held, new in zip(self.held[layer], (keys, values), strict=True):
            held.index_copy_(2, self.last, new)
        return self.held[layer]

    def get_seq_length(self, *_: Any) -> int:
        return self.places - 1


def _normal(shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)


class Decoder:
    """A step of greedy decoding of `batch` sequences, as a CUDA graph, at the last of `places` of the cache."""

    def __init__(self, model: Any, batch: int, places: int) -> None:
        self.model, device = model, model.device
        generator = torch.Generator(device).manual_seed(0)
        self.cache = Cache(model.config, batch, places, device, generator)
        self.ids = torch.randint(model.config.vocab_size, (batch, 1), generator=generator, device=device)
        self.position = torch.full((batch, 1), places - 1, device=device)
        self.mask = torch.zeros(1, 1, 1, places, dtype=torch.bfloat16, device=device)  # of four dimensions: left alone
        self.logits = torch.empty(0)

    def step(self) -> None:
        found = self.model(
            input_ids=self.ids,
            position_ids=self.position,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = found.logits[:, -1]
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))

    def captured(self) -> Callable[[], object]:
        for _ in range(2):
            self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def seconds(self) -> list[float]:
        """Of every step but for the first two."""
        cuda = self.model.device.type == "cuda"
        replay, found = self.captured() if cuda else self.step, []
        for _ in range(STEPS):
            begin = _mark(cuda)
            replay()
            found.append(_since(begin))
        return found[2:]


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _since(begin: Any) -> float:
    if isinstance(begin, float):
        return time.perf_counter() - begin
    end = _mark(True)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Speed:
    """Of one model and batch; `peak` bytes that torch held on the GPU."""

    batch: int
    median: float  # seconds of a step
    spread: float
    peak: int

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.median


@torch.inference_mode()
def measured(model: Any, batch: int, places: int) -> Speed:
    free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    low, median, high = statistics.quantiles(Decoder(model, batch, places).seconds(), n=4)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = Speed(batch, median, (high - low) / median, peak)
    say(f"batch {batch}: {median * 1e3:.2f} ms a step, {found.tokens_per_second:.0f} tokens/s, {peak / 1e9:.1f} GB")
    return found


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def logits(model: Any, places: int) -> Tensor:
    decoder = Decoder(model, 8, places)
    decoder.step()
    return decoder.logits.float()


def largest(model: Any, places: int, share: float) -> int:
    """Sequences whose cache fits beside the model, in this share of the GPU's memory."""
    config = model.config
    each = 2 * config.num_hidden_layers * config.hidden_size * 2 * places
    free()
    left, whole = torch.cuda.mem_get_info()
    left += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int((left - (1 - share) * whole - MARGIN) // each)


class Bench:
    """One model: measures, compares and appends lines."""

    def __init__(self, path: Path, name: str, config: Any, device: str, places: int) -> None:
        self.path, self.name, self.config, self.device, self.places = path, name, config, device, places
        self.dense: dict[Any, Speed] = {}

    def build(self, sparsity: float | None = None) -> Any:
        """Dense; pruned if a sparsity is given."""
        model = fill(skeleton(self.config), self.device)
        for layer in linears(model).values() if sparsity else ():
            pruned(layer.weight.detach(), sparsity)  # type: ignore[arg-type]
        return model

    def time_dense(self, batches: Sequence[int]) -> None:
        model = self.build()
        self.dense = {batch: measured(model, batch, self.places) for batch in batches}

    def prepared(self, model: Any, sparsity: float) -> dict[str, float]:
        """Prepares the model without dense copies and appends what its linear layers take."""
        free()
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = gossamer.prepare(model, dense_memory=0, lock=Path(folder) / "lock.json")
        took = time.perf_counter() - start
        say(f"prepared in {took:.1f} s\n{found}")
        layers = sparse_layers(model).values()
        held, dense = sum(m.held_bytes for m in layers), sum(2 * m.in_features * m.out_features for m in layers)
        self.summary("linear_memory_ratio", {"sparsity": sparsity}, held / dense, "<=", "of dense")
        return {"linear_gb": held / 1e9, "dense_linear_gb": dense / 1e9, "prepare_s": took}

    def sparse(self, sparsity: float, batches: Sequence[int]) -> None:
        model = self.build(sparsity)
        expected = logits(model, self.places)
        held = self.prepared(make_sparse(model, sparsity, self.device), sparsity)
        found = logits(model, self.places)
        error = float((found - expected).norm() / expected.norm())
        say(f"logits: relative error {error:.1e}")
        if not error < TOLERANCE:
            raise ArithmeticError(f"relative error {error:.1e} of the logits at {sparsity}")
        for batch in batches:
            ours, case = measured(model, batch, self.places), {"sparsity": sparsity, "batch": batch}
            self.line(case, ours, self.dense[batch], held | {"logits_error": error})
            ratio = ours.tokens_per_second / self.dense[batch].tokens_per_second
            self.summary("tokens_per_s_ratio", case, ratio, ">=", "x")

    def time_dense_largest(self) -> None:
        model = self.build()
        for share in (SERVED, 1.0):
            self.dense[share] = best_of(model, largest(model, self.places, share), self.places)

    def sparse_largest(self, sparsity: float) -> None:
        model = make_sparse(skeleton(self.config), sparsity, self.device)
        held = self.prepared(model, sparsity)
        for share, dense in self.dense.items():
            ours = best_of(model, largest(model, self.places, share), self.places)
            case = {"sparsity": sparsity, "memory": share}
            self.line(case | {"batch": ours.batch, "dense_batch": dense.batch}, ours, dense, held)
            ratio = ours.tokens_per_second / dense.tokens_per_second
            self.summary("tokens_per_gpu_second_ratio", case, ratio, ">=", "x")

    def line(self, case: dict, ours: Speed, dense: Speed, more: dict) -> None:
        line = {"bench": "llm_decode", "case": {"model": self.name, "context": self.places} | case}
        line |= {"ours": ours.tokens_per_second, "baseline": "dense bfloat16 in the same CUDA graph"}
        line |= {"baseline_value": dense.tokens_per_second, "unit": "tokens/s", "spread": ours.spread}
        line |= {"ratio": ours.tokens_per_second / dense.tokens_per_second, "step_ms": ours.median * 1e3}
        line |= {"peak_gb": ours.peak / 1e9, "dense_peak_gb": dense.peak / 1e9} | more
        append(self.path, line | environment(self.device))

    def summary(self, name: str, case: dict, value: float, sense: str, unit: str) -> None:
        must = MUST.get((name, self.name, case["sparsity"]))
        line = {"bench": "llm_decode", "summary": name, "case": {"model": self.name} | case, "value": value}
        append(self.path, line | {"sense": sense, "must": must, "unit": unit, "n": 1} | environment(self.device))
        say(f"{self.name} {case}: {name} {value:.3f} ({sense} {must})")


def best_of(model: Any, most: int, places: int) -> Speed:
    """Of `most` sequences and the next smaller numbers that kernels are made for, what gives the most tokens."""
    batches = {most, *(b for b in (most // 8 * 8, 32) if 0 < b < most)}
    found = [s for batch in sorted(batches) if (s := fitting(model, batch, places))]
    return max(found, key=lambda s: s.tokens_per_second)


def fitting(model: Any, batch: int, places: int) -> Speed | None:
    try:
        return measured(model, batch, places)
    except torch.OutOfMemoryError:
        say(f"batch {batch} does not fit")
    return fitting(model, batch - 1, places) if batch > 1 else None


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="decoding with unstructured sparsity on one GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="*", default=["llama-3-8b"], choices=list(MODELS))
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.6, 0.5, 0.7])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, help="so many blocks only, for a quick look")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # of the small functions that are compiled: one per batch and side
    for name in args.models:
        config = MODELS[name]
        if args.layers:
            config.num_hidden_layers = args.layers
            name += f", {args.layers} layers"
        large = config.model_type == "opt"
        places = FULL if large else args.context
        bench = Bench(args.out / "llm_decode.jsonl", name, config, args.device, places)
        bench.time_dense_largest() if large else bench.time_dense(args.batches)
        for sparsity in args.sparsities:
            bench.sparse_largest(sparsity) if large else bench.sparse(sparsity, args.batches)


if __name__ == "__main__":
    sys.exit(main())
