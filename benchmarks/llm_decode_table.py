"""Writes the tables of docs/llm_decode.md from benchmarks/results/llm_decode.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def tables() -> str:
    text = (ROOT / "benchmarks/results/llm_decode.jsonl").read_text()
    lines = [x for x in map(json.loads, text.splitlines()) if "summary" not in x]
    newest = {_key(x["case"]): x for x in lines}
    fixed = sorted((k, x) for k, x in newest.items() if not k[3])
    largest = sorted((k, x) for k, x in newest.items() if k[3])
    out = [
        "| model | sparsity | batch | dense, ms a step | sparse | tokens/s | times dense | linear layers, of dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    out += [_fixed(*entry) for entry in fixed]
    out += [
        "",
        "| model | sparsity | memory filled | dense: batch, tokens/s | sparse: batch, tokens/s | times dense |",
        "|---|---|---|---|---|---|",
    ]
    out += [*(_largest(*entry) for entry in largest), "", *_peak(newest["llama-3-8b", 0.6, 1, 0])]
    return "\n".join([*out, ""])


def _peak(x: dict) -> list[str]:
    return [
        f"At 60 % the Llama model takes {x['peak_gb']:.1f} GB at batch 1 where the dense one takes "
        f"{x['dense_peak_gb']:.1f}. The logits of the sparse model",
        f"differ from those of the same pruned weights, dense, by {x['logits_error']:.1e} (relative, Frobenius): 32 "
        "layers of random weights",
        "enlarge the rounding of bfloat16.",
    ]


def _key(case: dict) -> tuple:
    memory = case.get("memory", 0)
    return case["model"], case["sparsity"], 0 if memory else case["batch"], memory


def _fixed(key: tuple, x: dict) -> str:
    model, sparsity, batch, _ = key
    dense = f"{1e3 * batch / x['baseline_value']:.2f} | {x['step_ms']:.2f} | {x['ours']:.0f}"
    return f"| {model} | {sparsity:.0%} | {batch} | {dense} | {x['ratio']:.2f} | {_memory(x)} |"


def _largest(key: tuple, x: dict) -> str:
    model, sparsity, _, memory = key
    dense = f"{x['case']['dense_batch']}, {x['baseline_value']:.0f}"
    ours = f"{x['case']['batch']}, {x['ours']:.0f}"
    return f"| {model} | {sparsity:.0%} | {memory:.0%} | {dense} | {ours} | {x['ratio']:.2f} |"


def _memory(x: dict) -> str:
    return f"{x['linear_gb'] / x['dense_linear_gb']:.2f}"


if __name__ == "__main__":
    path = ROOT / "docs/llm_decode.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + tables() + END + rest.split(END)[1])
