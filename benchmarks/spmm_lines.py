"""The figures of bench_spmm.py's newest lines, and what the model would choose among their candidates."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import torch

from gossamer.spmm import Way, model
from gossamer.spmm.costs import Costs
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "spmm.jsonl"
WIDTHS = (8, 32, 128, 512)
PRECISIONS = {"fp16": (torch.float16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
ERRORS = {"fp16": 2e-3, "tf32": 1e-3, "fp32": 1e-5}
MUST = {"fp16": {8: 1.9, 32: 1.8, 128: 2.0, 512: 2.1}, "tf32": dict.fromkeys(WIDTHS, 1.2)}
STATS = 7  # that a line tells of its matrix
CHOICES = ("default", "predicted", "measured", "measured_free")
LIKE = 1.2  # that 16 bits must reach against cuSPARSE in 16 bits
SPECIAL = (
    ("band512_vs_bsr", "band512_16k", 3.0, ("bsr",), WIDTHS),
    ("band512_vs_blocked_ell", "band512_16k", 1.0, ("ell",), WIDTHS[1:]),
    ("shuffled_blocks_vs_cusparse", "blockdiag64_shuffled", 3.0, ("cusparse",), (512,)),
)


def newest() -> list[dict]:
    """The last line of each case, of those that have all statistics: older ones are of other kernels."""
    lines = [json.loads(x) for x in RESULTS.read_text().splitlines()]
    return list({json.dumps(x["case"]): x for x in lines if len(x.get("stats", ())) == STATS}.values())


def stats_of(line: dict) -> model.Stats:
    shape, nnz, longest, filled, gathered, *rest = line["stats"]
    return model.Stats(tuple(shape), nnz, longest, filled, {int(h): tuple(g) for h, g in gathered.items()}, *rest)


def size_of(line: dict) -> int:
    return 2 if line["case"]["precision"] == "fp16" else 4


def rechosen(line: dict, costs: Costs | None = None, caution: float = model.CAUTION) -> str:
    """What the model chooses today among the candidates of a line."""
    ways = map(way_of, allowed(line))
    return str(next(iter(model.ranked(ways, stats_of(line), line["case"]["N"], size_of(line), costs, caution))))


def allowed(line: dict) -> dict[str, float]:
    """Microseconds of the candidates that repeat themselves to the bit."""
    return {k: v for k, v in line["candidates"].items() if k not in line["left_out"]}


def way_of(text: str) -> Way:
    """The inverse of str(way)."""
    kernel, _, knobs = text.removesuffix("]").partition("[")
    pairs = [x.partition("=") for x in knobs.split(",") if x]
    found = {k: int(v) if v else True for k, _, v in pairs}
    for name, knob in (("cuda_windows", "masked"), ("cuda_rows", "double")):
        if kernel == name:
            found.setdefault(knob, False)
    return Way(kernel, tuple(found.items()))


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summarise() -> None:
    """Figures by what the default and measuring chose, and by what the model chooses today ("predicted")."""
    lines = newest()
    took = {
        id(x): {
            "default": x["candidates"][x["default"]],
            "predicted": x["candidates"][rechosen(x)],
            "measured": x["candidates"][x["measured"]],
            "measured_free": x["candidates"][x["measured_free"]],
            "best": min(allowed(x).values()),
        }
        for x in lines
    }
    for precision, n, choice in itertools.product(PRECISIONS, WIDTHS, CHOICES):
        own = [x for x in lines if x["case"]["precision"] == precision and x["case"]["N"] == n]
        if not own:
            continue
        sums = {"geomean_vs_cusparse": geomean([x["baseline_value"] / took[id(x)][choice] for x in own])}
        if precision == "fp16":
            like = [min(v for k, v in x["baselines"].items() if "fp16_alg" in k) / took[id(x)][choice] for x in own]
            sums["geomean_vs_cusparse_fp16"] = geomean(like)
        ratios = {x["case"]["matrix"]: best_other(x) / took[id(x)][choice] for x in own}
        sums["worst_vs_best_of_cusparse_dense"] = min(ratios.values())
        for name, value in sums.items():
            must = 0.95 if name.startswith("worst") else MUST.get(precision, {}).get(n)
            must = LIKE if name.endswith("fp16") else must
            write(name, {"N": n, "precision": precision, "choice": choice}, value, must, len(own))
        low = {k: round(v, 2) for k, v in sorted(ratios.items(), key=lambda i: i[1]) if v < 0.95}
        print(precision, n, choice, {k: round(v, 2) for k, v in sums.items()}, "below:", low)
    special(lines, took)
    preparation(lines, took)
    for precision, must in ERRORS.items():
        errors = [x["error"] for x in lines if x["case"]["precision"] == precision]
        write("worst_error", {"precision": precision}, max(errors), must, len(errors), "<=")
    errors = [x["error_bf16"] for x in lines if "error_bf16" in x]
    if errors:
        write("worst_error", {"precision": "bf16"}, max(errors), ERRORS["fp16"], len(errors), "<=")
    differ = sum(any(way in allowed(x) for way in x["unstable"]) for x in lines)
    write("cells_where_two_runs_differ", {}, differ, 0, len(lines), "<=")
    print("cells where two runs differ:", differ)
    within = [t["predicted"] <= 1.15 * t["best"] for t in took.values()]
    write("choice_within_15pct", {}, sum(within) / len(within), 0.85, len(within))
    print("choice within 15 %:", sum(within) / len(within), "of", len(within))


def preparation(lines: list[dict], took: dict[int, dict[str, float]]) -> None:
    """What the default's choosing costs, and after how many products it and packing are repaid, against cuSPARSE."""
    choosing = sorted(x["choosing_ms"] for x in lines)
    for name, value in (("median", choosing[len(choosing) // 2]), ("worst", choosing[-1])):
        write("choosing_ms", {"of": name}, value, None, len(choosing), "<=", "ms")
        print("choosing", name, value, "ms")
    for precision, n in itertools.product(PRECISIONS, WIDTHS):
        own = [x for x in lines if x["case"]["precision"] == precision and x["case"]["N"] == n]
        gains = [(x, x["baseline_value"] - took[id(x)]["default"]) for x in own]
        counts = sorted(1e3 * (x["packing_ms"] + x["choosing_ms"]) / g if g > 0 else math.inf for x, g in gains)
        if counts and math.isfinite(value := counts[len(counts) // 2]):
            write("repaid_after", {"N": n, "precision": precision}, value, None, len(counts), "<=", "products")
            print("repaid after", precision, n, round(value), "products (median)")


def special(lines: list[dict], took: dict[int, dict[str, float]]) -> None:
    """Single matrices that have a bar of their own, in 16 bits."""
    for line, (name, matrix, must, labels, widths) in itertools.product(lines, SPECIAL):
        case = line["case"]
        if case["matrix"] != matrix or case["precision"] != "fp16":
            continue
        other = min(v for k, v in line["baselines"].items() if any(label in k for label in labels))
        for choice in CHOICES[:3]:
            value = other / took[id(line)][choice]
            write(name, {"N": case["N"], "choice": choice}, value, must if case["N"] in widths else None, 1)
            print(name, case["N"], choice, round(value, 2))


def best_other(line: dict) -> float:
    """The best of cuSPARSE, of any format and no higher precision than asked for, and of dense."""
    precision = line["case"]["precision"]
    able = [v for k, v in line["baselines"].items() if precision == "fp16" or "fp32" in k]
    return min([*able, *(v for k, v in line["candidates"].items() if k.startswith("dense"))])


def write(name: str, case: dict, value: float, must: float | None, n: int, sense: str = ">=", unit: str = "") -> None:
    """A summary line; its machine is that of the lines that it sums."""
    kept = {k: environment()[k] for k in ("commit", "date")} | {"machine": newest()[-1]["machine"]}
    line = {
        "bench": "spmm",
        "summary": name,
        "case": case,
        "value": float(f"{value:.4g}"),
        "sense": sense,
        "must": must,
    }
    append(RESULTS, line | {"unit": unit, "n": n} | kept)
