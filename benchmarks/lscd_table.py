"""Writes the tables of docs/kernels/lscd.md from benchmarks/results/lscd.jsonl: `python benchmarks/lscd_table.py`."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = (1, 8, 16, 32, 64, 128)
MEAN, DISPATCHED, SPUTNIK = "geomean_vs_cublaslt", "dispatched", "fp16 vs Sputnik"  # the latter two are no masks
ROOFLINE = """16 tokens, microseconds (speed-up; GB/s that are read; share of the roofline, which is a bit an entry and
two bytes a value, without padding, at 3 TB/s):"""
HEAD = "| " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |"


def tables() -> str:
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/lscd.jsonl").read_text().splitlines()]
    means = {(x["case"]["sparsity"], x["case"]["tokens"]): x for x in lines if x.get("summary") == MEAN}
    sputnik = {x["case"]["sparsity"]: x for x in lines if x.get("summary") == "geomean_vs_sputnik"}
    chosen = {
        (x["case"]["sparsity"], x["case"]["tokens"]): x for x in lines if x.get("summary") == "geomean_dispatched"
    }
    cells = {_key(x["case"]): x for x in lines if "summary" not in x}
    out = ["| sparsity | " + " | ".join(map(str, TOKENS)) + " tokens |", "|---|" + "---|" * len(TOKENS)]
    for s in SPARSITIES:
        row = (means[s, n] for n in TOKENS)
        out.append(f"| {s:.0%} | " + " | ".join(f"{x['value']:.2f}" + _must(x["must"]) for x in row) + " |")
    out += ["", "The same of prepared layers, which may choose dense:", "", out[0], out[1]]
    for s in SPARSITIES:
        row = (chosen.get((s, n)) for n in TOKENS)
        out.append(f"| {s:.0%} | " + " | ".join(f"{x['value']:.2f}" if x else "" for x in row) + " |")
    out += ["", ROOFLINE, "", f"| layer | dense us {HEAD}", "|---|---|" + "---|" * len(SPARSITIES)]
    uniform = [k for k in cells if k[1:] == (0.5, 16, "")]
    for shape, *_ in uniform:
        row = [cells[shape, s, 16, ""] for s in SPARSITIES]
        shown = (f"{x['ours']:.1f} ({x['ratio']:.2f}x, {x['gb_per_s']:.0f}, {x['roofline_share']:.0%})" for x in row)
        name = f"{shape[0]} x {shape[1]}"
        out.append(f"| {name} | {row[0]['baseline_value']:.1f} | " + " | ".join(shown) + " |")
    out += [
        "",
        "Other masks, 8192 x 8192, 16 tokens, speed-up:",
        "",
        f"| mask {HEAD}",
        "|---|" + "---|" * len(SPARSITIES),
    ]
    for mask in [m for m in dict.fromkeys(k[3] for k in cells) if m not in (DISPATCHED, SPUTNIK)]:
        row = (cells[(8192, 8192), s, 16, mask]["ratio"] for s in SPARSITIES)
        out.append(f"| {mask or 'uniform'} | " + " | ".join(f"{ratio:.2f}" for ratio in row) + " |")
    out += ["", "Sputnik's time / ours, float16, the seven layers, 8 to 64 tokens:", "", f"| {HEAD}"]
    out += ["|---|" + "---|" * len(SPARSITIES)]
    row = (f"{sputnik[s]['value']:.2f} ({sputnik[s]['must']:g})" if s in sputnik else "" for s in SPARSITIES)
    out.append("| geometric mean (must) | " + " | ".join(row) + " |")
    ratios = [x["ratio"] for k, x in cells.items() if k[3] == DISPATCHED]
    out += [
        "",
        f"The slowest of {len(ratios)} cells of prepared layers, against dense: {min(ratios):.3f}x (0.97).",
    ]
    return "\n".join([*out, "", *_decoder(), ""])


def _decoder() -> list[str]:
    """Of the decoder alone: weights a clock, and what memory delivers."""
    lines = map(json.loads, (ROOT / "benchmarks/results/lscd_decode.jsonl").read_text().splitlines())
    found = {(x["case"]["items"], x["case"]["sparsity"]): x for x in lines if "summary" not in x}
    out = ["Weights that a processor expands in a clock, and what its share of 3 TB/s delivers, packed so:", ""]
    out += [f"| items {HEAD}", "|---|" + "---|" * len(SPARSITIES)]
    for items in ("halves", "words"):
        row = (found[items, s] for s in SPARSITIES)
        out.append(f"| {items} | " + " | ".join(f"{x['ours']:.1f}, {x['baseline_value']:.1f}" for x in row) + " |")
    return out


def _key(case: dict) -> tuple:
    return (tuple(case["shape"]), case["sparsity"], case["tokens"], case.get("variant", ""))


def _must(bar: float | None) -> str:
    return "" if bar is None else f" ({bar:g})"


if __name__ == "__main__":
    path = ROOT / "docs/kernels/lscd.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + tables() + END + rest.split(END)[1])
