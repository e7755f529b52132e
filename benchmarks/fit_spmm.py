"""Fits the costs of `gossamer.spmm.model` to the newest lines of bench_spmm.py, and says how well they predict.

    python benchmarks/fit_spmm.py            # prints the figures; --write renews src/gossamer/spmm/costs.py

Costs are not negative and fitted to relative errors. The honest figure is "left out": each kind of matrix is predicted
with costs fitted to the other kinds alone; it goes to results/spmm.jsonl as "choice_within_15pct_left_out".
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

import spmm_lines
from gossamer.spmm import model
from gossamer.spmm.costs import Costs

COSTS = Path(model.__file__).parent / "costs.py"
STEPS = 12  # of reweighting: a time that is twice too short is as wrong as one twice too long
CAUTIONS = (0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
LAUNCH = 2.0  # microseconds that any kernel takes
RIDGE = 0.1  # keeps costs that little data speaks for small

Samples = dict[Hashable, list[tuple[str, tuple[float, ...], float]]]


def samples(lines: list[dict]) -> Samples:
    """Per key of COSTS: (kind of matrix, amounts, microseconds)."""
    found: Samples = {}
    for line in lines:
        stats, n, size = spmm_lines.stats_of(line), line["case"]["N"], spmm_lines.size_of(line)
        for text, took in line["candidates"].items():
            key, amounts = model.described(spmm_lines.way_of(text), stats, n, size)
            found.setdefault(key, []).append((line["case"]["kind"], amounts, took))
    return found


def fitted(all_samples: Samples, without: str | None = None) -> Costs:
    found = {}
    for key, rows in all_samples.items():
        kept = [r for r in rows if r[0] != without] or rows
        found[key] = _fit(np.array([a for _, a, _ in kept]), np.array([t for *_, t in kept]))
    return found


def _fit(amounts: np.ndarray, times: np.ndarray) -> tuple[float, ...]:
    """Minimises |log(predicted / measured)|, by least squares with weights that follow the last prediction."""
    weights = 1 / times
    costs, least = np.zeros(amounts.shape[1]), np.eye(amounts.shape[1])[0] * LAUNCH
    for _ in range(STEPS):
        rows, wanted = amounts * weights[:, None], np.maximum(times - LAUNCH, 0) * weights
        scale = np.maximum(np.sqrt((rows**2).mean(0)), 1e-9)
        ridge = np.eye(len(scale)) * RIDGE * np.sqrt(len(rows))
        costs = (
            nnls(np.vstack([rows / scale, ridge]), np.concatenate([wanted, np.zeros(len(scale))]))[0] / scale + least
        )
        predicted = amounts @ costs
        off = np.log(np.maximum(predicted, 1e-3) / times)
        # |log| instead of the square of a ratio: large errors count less, both directions alike.
        weights = 1 / np.sqrt(times * np.maximum(predicted, times / 4)) / np.sqrt(np.abs(off) + 0.05)
    return tuple(float(f"{c:.3g}") for c in costs)


def judged(lines: list[dict], costs: Mapping[str, Costs], caution: float = model.CAUTION) -> list[dict[str, float]]:
    """Of each line, what the choice by the costs for its kind took against the best way, and against the others."""
    found = []
    for line in lines:
        took = spmm_lines.allowed(line)
        chosen = took[spmm_lines.rechosen(line, costs[line["case"]["kind"]], caution)]
        found.append({"best": chosen / min(took.values()), "others": spmm_lines.best_other(line) / chosen})
    return found


def said(name: str, found: list[dict[str, float]]) -> float:
    share = sum(f["best"] <= 1.15 for f in found) / len(found)
    low = sorted(f["others"] for f in found)
    below = sum(o < 0.95 for o in low)
    print(f"{name}: within 15 % of the best way {share:.3f} of {len(found)}, mean loss", end=" ")
    print(
        f"{spmm_lines.geomean([f['best'] for f in found]):.3f}, against the others worst {low[0]:.2f}, {below} < 0.95"
    )
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew costs.py")
    parser.add_argument("--append", action="store_true", help="append the figure to the results")
    asked = parser.parse_args()
    lines = spmm_lines.newest()
    data, kinds = samples(lines), {x["case"]["kind"] for x in lines}
    said("as committed", judged(lines, dict.fromkeys(kinds, model.COSTS)))
    everything = {**model.COSTS, **fitted(data)}  # a way that no line knows keeps what it was given by hand
    said("fitted to all", judged(lines, dict.fromkeys(kinds, everything)))
    apart = {kind: {**model.COSTS, **fitted(data, kind)} for kind in kinds}
    for caution in CAUTIONS:
        said(f"left out, caution {caution}", judged(lines, apart, caution))
    share = said("left out", judged(lines, apart))
    if asked.append:
        spmm_lines.write("choice_within_15pct_left_out", {}, share, 0.85, len(lines))
    if asked.write:
        head = COSTS.read_text().partition("COSTS:")[0]
        body = "".join(f"    {key!r}: {costs!r},\n" for key, costs in sorted(everything.items(), key=str))
        COSTS.write_text(f"{head}COSTS: Costs = {{\n{body}}}\n".replace("'", '"'))


if __name__ == "__main__":
    main()
