"""What bench_pretrain24.py writes down of its outcomes: measured lines, and summaries over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

TOKENS_A_PARAMETER, SEEDS = 13, 3  # of the bar


def dense_of(run: dict, runs: list[dict]) -> dict:
    same = [r for r in runs if r["method"] == "dense" and (r["model"], r["seed"]) == (run["model"], run["seed"])]
    if not same:
        raise SystemExit(
            f"{run['method']}, seed {run['seed']} has no dense run; fix: collect it with its dense outcome"
        )
    return same[-1]


def check_equal(run: dict, dense: dict) -> None:
    if run["steps"] != dense["steps"] or run["batch"] != dense["batch"]:
        raise SystemExit(f"{run['method']} and dense of seed {run['seed']} saw other data; fix: run them in one call")


def late(run: dict) -> float:
    """The mean flip rate over the last tenth of the steps."""
    rates = [line["flip_rate"] for line in run["curve"] if line["step"] > 0.9 * run["steps"]]
    return statistics.mean(rates or [run["curve"][-1]["flip_rate"]])


def early_mu(run: dict, dense: dict) -> float:
    """mu after the warm-up: flip rates against dense over the hundred steps behind it."""
    both = zip(run["curve"], dense["curve"], strict=True)
    rates = [(a["flip_rate"], b["flip_rate"]) for a, b in both if 0 <= a["step"] - run["warmup"] <= 100]
    return sum(a for a, _ in rates) / sum(b for _, b in rates)


def measured(run: dict, dense: dict) -> list[dict]:
    """One line for each way to evaluate the run; `ratio` is dense's loss over ours."""
    variants = {"dense_eval": run["finished_loss"]} if "one_shot_loss" in run else {"deployable": run["finished_loss"]}
    if "one_shot_loss" in run:
        variants["one_shot"] = run["one_shot_loss"]
    shared = {"unit": "nats/byte", "spread": None, **run["environment"]}
    about = {key: run[key] for key in ("steps", "tokens", "parameters", "train_bytes", "valid_bytes")}
    about |= {"epochs": run["tokens"] / run["train_bytes"], "late_flip_rate": late(run), "mu": early_mu(run, dense)}
    about |= {"train_seconds": run["train_seconds"], "decay": run["decay"]}
    return [
        {
            "bench": "pretrain24",
            "case": {"model": run["model"], "method": run["method"], "seed": run["seed"], "variant": variant},
            "ours": value,
            "baseline": "dense, same seed, data and steps",
            "baseline_value": dense["finished_loss"],
            "ratio": dense["finished_loss"] / value,
            "about": about,
            **shared,
        }
        for variant, value in variants.items()
    ]


def summaries(runs: list[dict]) -> Iterator[dict]:
    """The figures of the bars: means over the seeds, the spread beside them."""
    found: dict[tuple, list[float]] = defaultdict(list)
    for run in runs:
        dense = dense_of(run, runs)
        model, method = run["model"], run["method"]
        variant = "dense_eval" if "one_shot_loss" in run else "deployable"
        if method != "dense":
            found["val_loss_gap", method, model, variant].append(run["finished_loss"] - dense["finished_loss"])
            found["late_flip_rate_vs_dense", method, model, None].append(late(run) / late(dense))
            gained = dense["one_shot_loss"] - run["finished_loss"]
            found["gain_over_one_shot", method, model, variant].append(gained)
        if "one_shot_loss" in run:
            found["val_loss_gap", method, model, "one_shot"].append(run["one_shot_loss"] - dense["finished_loss"])
    for (name, method, model, variant), values in found.items():
        yield _summary(
            name, {"method": method, "model": model} | ({"variant": variant} if variant else {}), values, runs
        )


BARS = {
    ("val_loss_gap", "s_ste", "deployable"): 0.03,
    ("val_loss_gap", "fst", "dense_eval"): 0.02,
    ("late_flip_rate_vs_dense", "s_ste", None): 1.2,
    ("late_flip_rate_vs_dense", "ste", None): 1.5,
    **{("gain_over_one_shot", m, "deployable"): 0.05 for m in ("s_ste", "ste", "sr_ste")},
    ("gain_over_one_shot", "fst", "dense_eval"): 0.05,
}


def speeds(timed: list[dict]) -> Iterator[dict]:
    """Dense's seconds a step over each method's, the fastest of the repeats of both; below 1: slower than dense."""
    found: dict[tuple, list[float]] = defaultdict(list)
    for t in timed:
        if t["graphs"]:
            found[t["model"], t["batch"], t["method"], t.get("products", "dense")] += t["step_seconds"]
    for (model, batch, method, products), seconds in found.items():
        dense = found.get((model, batch, "dense", "dense"))
        if method == "dense" or not dense or not seconds:
            continue
        sparse = products == "sparse"
        itself = {f"{method}, dense products": min(s)} if (s := found.get((model, batch, method, "dense"))) else {}
        yield {
            "bench": "pretrain24",
            "summary": "step_time_ratio",
            "case": {"method": method, "model": model} | ({"variant": "sparse products"} if sparse else {}),
            "value": min(dense) / min(seconds),
            "sense": ">=",
            "must": None,
            "unit": "ratio",
            "n": len(seconds),
            "range": [min(dense) / max(seconds), max(dense) / min(seconds)],
            "step_seconds": {"dense": min(dense), method: min(seconds)} | (itself if sparse else {}),
            "windows_a_step": batch,
            **{key: timed[-1]["environment"][key] for key in ("machine", "commit", "date")},
        }


def same_loss(runs: list[dict]) -> Iterator[dict]:
    """Validation losses with sparse products less those with dense ones, of the same method, seed and steps."""
    keys = ("model", "method", "seed", "steps", "batch")
    dense = {tuple(r[k] for k in keys): r for r in runs if r["products"] == "dense"}
    for run in [r for r in runs if r["products"] == "sparse"]:
        other = dense.get(tuple(run[k] for k in keys))
        if other is None:
            raise SystemExit(f"{run['method']}, seed {run['seed']}, ran with sparse products only; fix: run both")
        gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(run["curve"], other["curve"], strict=True)]
        yield {
            "bench": "pretrain24",
            "summary": "loss_difference",
            "case": {k: run[k] for k in ("model", "method", "steps")} | {"variant": "sparse products"},
            "value": abs(run["finished_loss"] - other["finished_loss"]),
            "sense": "<=",
            "must": None,
            "unit": "nats/byte",
            "n": 1,
            "losses": {"sparse": run["finished_loss"], "dense": other["finished_loss"]},
            "largest_gap_of_the_curves": max(gaps),
            "step_seconds": {"sparse": run["step_seconds"], "dense": other["step_seconds"]},
            **{key: run["environment"][key] for key in ("machine", "commit", "date")},
        }


def _summary(name: str, case: dict, values: list[float], runs: list[dict]) -> dict:
    last, method = runs[-1]["environment"], case["method"]
    rising = name == "gain_over_one_shot" or (name == "late_flip_rate_vs_dense" and method == "ste")
    tokens = min(run["tokens"] / run["parameters"] for run in runs)
    full = tokens >= TOKENS_A_PARAMETER and len(values) >= SEEDS
    return {
        "bench": "pretrain24",
        "summary": name,
        "case": case if full else case | {"tokens_a_parameter": round(tokens, 2)},  # a pilot stands for itself
        "value": statistics.mean(values),
        "sense": ">=" if rising else "<=",
        "must": BARS.get((name, method, case.get("variant"))) if full else None,
        "unit": "ratio" if name.startswith("late") else "nats/byte",
        "n": len(values),
        "range": [min(values), max(values)],
        **{key: last[key] for key in ("machine", "commit", "date")},
    }


def scaling(found: list[dict]) -> Iterator[dict]:
    """Efficiency: tokens a second over those of one GPU, a rank. Loss: the difference from one GPU's."""
    for run in [f for f in found if f["wrap"] != "alone"]:
        same = ("model", "method", "steps")
        one = next(f for f in found if f["wrap"] == "alone" and all(f[key] == run[key] for key in same))
        case = {key: run[key] for key in ("model", "method", "ranks", "wrap", "steps")}
        about = {key: run["environment"][key] for key in ("machine", "commit", "date")}
        about = {"loss": run["loss"], "tokens_a_second": run["tokens_a_second"], "masks": run["masks"], **about}
        about = {"must": None, "n": 1, **about}
        gone = {"value": abs(run["loss"] - one["loss"]), "sense": "<=", "unit": "nats/byte"}
        yield {"bench": "pretrain24", "summary": "loss_difference", "case": case, **gone, **about}
        if run["ranks"] > 1:
            value = run["tokens_a_second"] / one["tokens_a_second"] / run["ranks"]
            gained = {"value": value, "sense": ">=", "unit": "ratio"}
            yield {"bench": "pretrain24", "summary": "scaling_efficiency", "case": case, **gained, **about}
