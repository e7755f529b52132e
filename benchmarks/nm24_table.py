"""Writes the tables of docs/kernels/nm24.md from the newest lines of nm24_gemm.jsonl and ffn24.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
RECIPES = {"s_ste": "F (S-STE)", "transposable": "F, D", "fst": "F, D, G (FST)", "block": "the block, F, D, G"}
DENSE, LSCD, SCALED, LINEAR = "dense", "cuda_lscd", "torch._scaled_mm", "torch.nn.Linear"
Cells = dict[tuple, dict]


def lines(bench: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{bench}.jsonl").read_text().splitlines()]


def cells(found: Sequence[dict]) -> Cells:
    """The newest line of each (what was measured, against what, shape, tokens)."""
    plain = [x for x in found if "shape" in x["case"] and "summary" not in x]
    return {(_what(x["case"]), x["baseline"], tuple(x["case"]["shape"]), x["case"]["tokens"]): x for x in plain}


def _what(case: dict) -> str:
    """Lines of 8 bits share their variant with those of 16; the older ones against `cuda_lscd` with those of decode."""
    eight = ", 8 bits" if case["dtype"].startswith("float8") else ""
    return case["variant"].removesuffix(", against cuda_lscd") + eight


def table(found: Cells, *columns: tuple[str, str], named: bool = False) -> list[str]:
    """Ratios by weight and tokens, of each (what, against what) in turn; `named`: with the kernel that ran."""
    tokens = [sorted({k[3] for k in found if k[:2] == column}) for column in columns]
    shapes = list(dict.fromkeys(k[2] for k in found if k[:2] in columns))
    head = [f"{n:,}" if i == 0 else f"rows: {n:,}" for i, each in enumerate(tokens) for n in each]
    out = ["| weight | " + " | ".join(head) + " |", "|" + "---|" * (1 + len(head))]
    for shape in shapes:
        row = [found[*column, shape, n] for column, each in zip(columns, tokens, strict=True) for n in each]
        shown = (f"{x['ratio']:.2f}" + (f" {x['kernel']}" if named else "") for x in row)
        out.append(f"| {shape[0]} x {shape[1]} | " + " | ".join(shown) + " |")
    return [*out, ""]


def products() -> list[str]:
    found = lines("nm24_gemm")
    by_cell = cells(found)
    means = {(x["summary"], x["case"].get("variant", "")): x["value"] for x in found if "summary" in x}
    rows = [x["ratio"] for k, x in by_cell.items() if k[0] == "prefill, graph, scales of rows, 8 bits"]
    slower = sum(ratio < 1 for ratio in rows)
    whole = [x for k, x in by_cell.items() if k[0] == "prefill, graph, 8 bits"]
    ones = "" if all("scales" in x for x in whole) else ", measured with scales of 1, which cuSPARSELt was not given"
    return [
        f"Decode, bfloat16, dense / `cuda_nm24` by tokens (geometric mean {means['decode_geomean', '']:.2f}):",
        "",
        *table(by_cell, ("decode", DENSE)),
        "Decode, the same weight as a bitmask in `cuda_lscd` / `cuda_nm24`:",
        "",
        *table(by_cell, ("decode", LSCD)),
        "Prefill in a CUDA graph, bfloat16, dense / `cuda_nm24_vendor` (geometric mean at 4,096 tokens and more",
        f"{means['prefill_geomean', '']:.2f}; eager {means['prefill_geomean', 'eager']:.2f}):",
        "",
        *table(by_cell, ("prefill, graph", DENSE)),
        "Prefill in a CUDA graph, float8_e4m3fn, `torch._scaled_mm` / ours: one scale for each operand (geometric mean",
        f"{means['fp8_geomean', '']:.2f}{ones}), or one for each row, which takes a pass after the product",
        f"({means['fp8_geomean', 'scales of rows']:.2f}; slower than dense in {slower} of {len(rows)}):",
        "",
        *table(by_cell, ("prefill, graph, 8 bits", SCALED), ("prefill, graph, scales of rows, 8 bits", SCALED)),
        *chosen(by_cell, means),
        *prepared(by_cell, means),
    ]


def chosen(by_cell: Cells, means: dict[tuple[str, str], float]) -> list[str]:
    """Of 8 bits, given the dense matrix, too."""
    out = []
    for scales, text in (("", "one scale for each operand"), (", scales of rows", "a scale for each row")):
        worst = means.get(("worst_dispatched", f"graph, 8 bits{scales}"))
        if worst is not None:
            out += [
                f"The same given the dense matrix, too, {text}: what was taken, and the ratio (the least {worst:.3f}):",
                "",
                *table(by_cell, (f"dispatched, graph{scales}, 8 bits", SCALED), named=True),
            ]
    return out


def prepared(by_cell: Cells, means: dict[tuple[str, str], float]) -> list[str]:
    out = []
    for how, text in (("graph", "in a CUDA graph"), ("eager", "eager, one after the other")):
        worst = means.get(("worst_dispatched", how))
        if worst is None:
            continue
        out += [
            f"Layers as `gossamer.prepare` leaves them, {text}: `nn.Linear` / ours, and what ran",
            f"(the slowest {worst:.3f}):",
            "",
            *table(by_cell, (f"dispatched, {how}", LINEAR), named=True),
        ]
    return out


def host() -> list[str]:
    found = [x for x in lines("nm24_gemm") if "summary" not in x and x["case"].get("variant") == "host, call"]
    call = found[-1]
    return [
        f"A call with 512 tokens and a weight of 4096 x 4096 takes {call['ours']:.1f} us of the host's time",
        f"(asked for: 15), `{call['baseline']}` {call['baseline_value']:.1f} on the same host.",
    ]


def training() -> list[str]:
    found = lines("ffn24")
    newest = {(x["case"]["d"], x["case"]["ff"], x["case"]["variant"]): x for x in found if "summary" not in x}
    bars = {(x["case"]["d"], x["case"]["ff"], x["summary"]): x["must"] for x in found if "summary" in x}
    out = [
        "Forward and backward of a feed-forward block and of a whole transformer block, 16,384 tokens in bfloat16,",
        "pruning, compressing and sampling included, against `torch.compile` of the dense one; variants take turns:",
        "",
        "| d, ff | sparse products | ms | dense ms | speedup | asked for |",
        "|---|---|---|---|---|---|",
    ]
    for d, ff in sorted({k[:2] for k in newest}, reverse=True):
        for recipe, name in RECIPES.items():
            x = newest[d, ff, recipe]
            act = "SwiGLU" if x["case"]["act"] == "silu" else "GELU"
            times = f"{x['ours']:.2f} | {x['baseline_value']:.2f} | {x['ratio']:.3f}"
            out.append(f"| {d}, {ff} {act} | {name} | {times} | {bars[d, ff, recipe]:.2f} |")
    return out


if __name__ == "__main__":
    path = ROOT / "docs/kernels/nm24.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + "\n".join([*products(), *training(), "", *host(), ""]) + END + rest.split(END)[1])
