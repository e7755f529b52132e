"""A real language model, pruned, on one GPU: is what the kernels compute what the pruned weights say?

    python benchmarks/bench_llm_real.py [MODEL]          # a GGUF file or a Hugging Face folder; else the demo's model

Prunes SmolLM2-135M by each method to 60 % zeros, prepares it without dense copies, and compares a prompt and single
steps with the same pruned weights, dense: both in bfloat16, both against float32. Then both write a text with
transformers' `generate` and a static cache, for 1 and 16 sequences. Summary "error_vs_dense": the sparse model's
distance from float32 over the dense one's (logits, relative Frobenius norm), the larger of prompt and steps.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gossamer
from gossamer import texts
from gossamer.checkpoint import densify
from gossamer.demo import smollm2
from gossamer.evaluate import encode_text
from gossamer.hub.source import open_model
from results import append, environment

RESULTS = Path(__file__).parent / "results"
METHODS = ("magnitude", "wanda", "sparsegpt")
RATIO = 1 - (0.4 + 1 / 16)  # 40 % of the values of 16 bits, and a bit of the mask for each
MUST = 1.1  # both models only round, each in its own order


@torch.inference_mode()
def logits(model: Any, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Of a prompt [B, N - steps], and of the `steps` tokens after it, one at a time."""
    out = model(input_ids=ids[:, :-steps], use_cache=True)
    prompt, single = out.logits, []
    for token in ids[:, -steps:].split(1, dim=1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        single.append(out.logits)
    return prompt.float(), torch.cat(single, 1).float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def write(model: Any, prompt: Tensor, tokens: int, compiled: bool) -> tuple[Tensor, float]:
    """Greedy tokens after the prompt, and how many a second; the first run, which compiles, is not timed."""
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
    how |= {"disable_compile": not compiled, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    for _ in range(2):
        start = time.perf_counter()
        out = model.generate(prompt, **how)
        torch.cuda.synchronize() if prompt.is_cuda else None
        seconds = time.perf_counter() - start
    return out[:, prompt.shape[1] :], tokens * len(prompt) / seconds


def run(method: str, model: Any, tokenizer: Any, args: argparse.Namespace, ids: Tensor) -> float:
    """Both models through everything; writes the lines of one method, returns its larger `error_vs_dense`."""
    sizes = {"samples": args.samples, "length": args.length, "device": args.device}
    sparse = gossamer.compress(
        copy.deepcopy(model), texts.calibration(), tokenizer=tokenizer, method=method, ratio=RATIO, **sizes
    ).to(args.device)
    exact = densify(copy.deepcopy(sparse), torch.float32).float()
    dense = copy.deepcopy(exact).bfloat16()
    sparse = sparse.bfloat16()
    gossamer.prepare(sparse, tokens=[1, 16, ids[:, : -args.steps].numel()], dtype=torch.bfloat16, dense_memory=0)
    worst = 0.0
    for part, truth, plain, ours in zip(
        ("prompt", "steps"),
        logits(exact, ids, args.steps),
        logits(dense, ids, args.steps),
        logits(sparse, ids, args.steps),
        strict=True,
    ):
        errors = distance(ours, truth), distance(plain, truth)
        worst = max(worst, errors[0] / errors[1])
        same = float((ours.argmax(-1) == truth.argmax(-1)).float().mean())
        emit(args, {"method": method, "part": part, "quantity": "error"}, *errors, "relative", {"same_token": same})
    for batch in args.batches:
        prompt = ids[:1, :32].expand(batch, -1).contiguous()
        found, rate = write(sparse, prompt, args.tokens, args.compiled)
        expected, base = write(dense, prompt, args.tokens, args.compiled)
        case = {"method": method, "batch": batch, "quantity": "generate", "compiled": args.compiled}
        emit(args, case, rate, base, "tokens/s", {"same_token": float((found == expected).float().mean())})
    return worst


def emit(args: argparse.Namespace, case: dict, ours: float, base: float, unit: str, more: dict) -> None:
    line = {"bench": "llm_real", "case": case, "ours": ours, "baseline": "the same weights, dense", "unit": unit}
    line |= {"baseline_value": base, "ratio": ours / base, **more}
    append(args.out / "llm_real.jsonl", line | environment(args.device))
    print(case, f"{ours:.4g} {unit}, dense {base:.4g}: {ours / base:.3f}", more, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="a real language model, pruned, on one GPU")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--compiled", action="store_true", help="generate compiles the step, as it does by default")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model, tokenizer = open_model(args.model, "float32") if args.model else smollm2()
    ids = encode_text(tokenizer, texts.evaluation())[: 4 * (160 + args.steps)].view(4, -1).to(args.device)
    for method in args.methods:
        worst = run(method, model, tokenizer, args, ids)
        line = {"bench": "llm_real", "summary": "error_vs_dense", "case": {"method": method}, "value": worst}
        line |= {"sense": "<=", "must": MUST, "unit": "x", "n": 2}
        append(args.out / "llm_real.jsonl", line | environment(args.device))


if __name__ == "__main__":
    main()
