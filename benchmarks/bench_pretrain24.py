"""2:4 pre-training of a Llama over bytes against dense: loss, flip rate, step time.

    python benchmarks/bench_pretrain24.py learn TEXTS OUTCOMES --seed 0 --seconds 150   # on a GPU, one seed a call
    python benchmarks/bench_pretrain24.py collect OUTCOMES...                           # lines, summaries, chart

`learn` trains all methods at once on one GPU, a process each, on the same bytes in the same order, for the same number
of steps: as many as the time allows, the bar's 13 tokens a parameter at most. `collect` adds one line for each run
and the summaries over the seeds. TEXTS is a folder with *.train.txt[.xz] and *.valid.txt[.xz]; test texts are not read.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from results import append, environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from pretrain import chart, text  # noqa: E402
from pretrain.loop import Run, Training, ends_dense  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LINES, CURVES = RESULTS / "pretrain24.jsonl", RESULTS / "pretrain24_curves.jsonl"
DEFAULT = ("dense", "s_ste", "fst", "sr_ste", "ste")
TOKENS_A_PARAMETER = 13
TIMED = 12  # steps that the speed is taken over


def learn(given: argparse.Namespace) -> None:
    """One process for each method; they compile, tell how long a step takes, and get the number of steps."""
    begin = time.monotonic()
    given.outcomes.parent.mkdir(parents=True, exist_ok=True)
    meet = Path(str(given.outcomes) + f".seed{given.seed}")
    meet.mkdir(exist_ok=True)
    for old in meet.iterdir():
        old.unlink()
    forwarded = ["--seed", str(given.seed), "--model", given.model, "--batch", str(given.batch)]
    forwarded += ["--warmup", str(given.warmup)] + (["--no-compile"] if given.no_compile else [])
    workers = [
        subprocess.Popen([sys.executable, __file__, "work", str(given.texts), str(given.outcomes), method, *forwarded])
        for method in given.methods
    ]
    try:
        told = [t for method, worker in zip(given.methods, workers, strict=True) if (t := _told(meet / method, worker))]
        left = given.seconds - (time.monotonic() - begin)
        wanted = -(-TOKENS_A_PARAMETER * told[0]["parameters"] // told[0]["tokens_a_step"])
        possible = int((left - given.reserve) / (1.15 * sum(t["step_seconds"] for t in told)))
        steps = max(4 * TIMED, min(wanted, possible, given.most_steps))
        print(f"{steps} steps of {wanted} for the bar, {left:.0f} s left", json.dumps(told), flush=True)
        (meet / "steps").write_text(str(steps))
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.kill()


def _told(file: Path, worker: subprocess.Popen) -> dict | None:
    """What a worker has to say before it trains; None where it failed, and the others go on without it."""
    while not file.exists():
        if worker.poll():
            print(f"{file.name} failed and is left out; its message stands above", flush=True)
            return None
        time.sleep(0.05)
    return json.loads(file.read_text())


def work(given: argparse.Namespace) -> None:
    """One method: compile and time alone, then train beside the others."""
    meet = Path(str(given.outcomes) + f".seed{given.seed}")
    train, valid = text.find(given.texts, "train"), text.find(given.texts, "valid")
    run = Run(given.method, None, given.model, 1000, given.batch, 1, 1e-3, given.warmup, given.seed)
    solo = _step_seconds(Training(run, train, compile=not given.no_compile), meet)
    steps = int(_when_there(meet / "steps"))
    run = Run(given.method, None, given.model, steps, given.batch, 1, 1e-3, min(given.warmup, steps // 4), given.seed)
    training, lines = Training(run, train, compile=not given.no_compile), []
    training.train(lines.append)
    found = {"valid_loss": training.evaluate(valid), "train_bytes": len(train), "valid_bytes": len(valid)}
    if ends_dense(training.sparse):
        found["one_shot_loss"] = training.one_shot(valid)
    training.finish()
    found["finished_loss"] = training.evaluate(valid)
    parameters = sum(p.numel() for p in training.net.parameters())
    outcome = vars(run) | {"tokens": run.tokens, "parameters": parameters, "step_seconds": solo} | found
    outcome |= {"curve": lines, "environment": environment(training.device.type)}
    with _alone(given.outcomes.with_suffix(".lock")):
        append(given.outcomes, outcome)


def _step_seconds(training: Training, meet: Path) -> float:
    """Of steps taken while the other methods wait; the first ones compile."""
    for _ in range(4):
        training.take_step()
    _synchronize(training)
    with _alone(meet / "lock"):
        training.take_step()
        _synchronize(training)
        begin = time.perf_counter()
        for _ in range(TIMED):
            training.take_step()
        _synchronize(training)
        seconds = (time.perf_counter() - begin) / TIMED
    told = {
        "step_seconds": seconds,
        "tokens_a_step": training.run.tokens // training.run.steps,
        "parameters": sum(p.numel() for p in training.net.parameters()),
    }
    part = meet / f"{training.run.method}.part"
    part.write_text(json.dumps(told))
    part.rename(meet / training.run.method)
    return seconds


def _synchronize(training: Training) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize()


def _when_there(file: Path) -> str:
    while not (file.exists() and file.read_text()):
        time.sleep(0.02)
    return file.read_text()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def collect(given: argparse.Namespace) -> None:
    """A line for each run, its curve, the summaries over all runs of these outcomes, the chart of the first seed."""
    runs = [json.loads(line) for file in given.outcomes for line in file.read_text().splitlines()]
    for run in runs:
        _check_equal(run, dense_of(run, runs))
        for line in measured(run, dense_of(run, runs)):
            append(LINES, line)
        append(CURVES, {key: run[key] for key in ("model", "method", "seed", "tokens", "curve")})
    for line in summaries(runs):
        append(LINES, line)
        print(json.dumps({key: line[key] for key in ("summary", "case", "value", "must", "n")}))
    _draw(runs, given.outcomes[0].with_suffix(".svg") if given.chart is None else given.chart)


def dense_of(run: dict, runs: list[dict]) -> dict:
    same = [r for r in runs if r["method"] == "dense" and (r["model"], r["seed"]) == (run["model"], run["seed"])]
    if not same:
        raise SystemExit(
            f"{run['method']}, seed {run['seed']} has no dense run; fix: collect it with its dense outcome"
        )
    return same[-1]


def _check_equal(run: dict, dense: dict) -> None:
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
    about |= {"step_seconds": run["step_seconds"]}
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
            found["step_time_ratio", method, model, None].append(dense["step_seconds"] / run["step_seconds"])
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
}


def _summary(name: str, case: dict, values: list[float], runs: list[dict]) -> dict:
    last, method = runs[-1]["environment"], case["method"]
    rising = name == "step_time_ratio" or (name == "late_flip_rate_vs_dense" and method == "ste")
    tokens = min(run["tokens"] / run["parameters"] for run in runs)
    return {
        "bench": "pretrain24",
        "summary": name,
        "case": case | {"tokens_a_parameter": round(tokens, 2)},
        "value": statistics.mean(values),
        "sense": ">=" if rising else "<=",
        "must": BARS.get((name, method, case.get("variant"))),
        "unit": "nats/byte" if name == "val_loss_gap" else "ratio",
        "n": len(values),
        "range": [min(values), max(values)],
        **{key: last[key] for key in ("machine", "commit", "date")},
    }


def _draw(runs: list[dict], out: Path) -> None:
    curves = {run["method"]: run["curve"] for run in runs if run["seed"] == runs[0]["seed"]}
    chart.draw(curves, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("learn", "work"):
        verb = verbs.add_parser(name)
        verb.add_argument("texts", type=Path)
        verb.add_argument("outcomes", type=Path)
        if name == "work":
            verb.add_argument("method")
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--model", default="10m")
        verb.add_argument("--batch", type=int, default=128, help="windows a step")
        verb.add_argument("--warmup", type=int, default=100)
        verb.add_argument("--no-compile", action="store_true")
        if name == "learn":
            verb.add_argument("--methods", nargs="+", default=list(DEFAULT))
            verb.add_argument("--seconds", type=float, default=600, help="of the whole call")
            verb.add_argument(
                "--reserve", type=float, default=15, help="seconds for the evaluation and late compilation"
            )
            verb.add_argument("--most-steps", type=int, default=1 << 30)
    verb = verbs.add_parser("collect")
    verb.add_argument("outcomes", type=Path, nargs="+")
    verb.add_argument("--chart", type=Path)
    given = parser.parse_args()
    {"learn": learn, "work": work, "collect": collect}[given.verb](given)


if __name__ == "__main__":
    main()
