"""Outcomes of bench_pretrain24.py, whose command line puts `examples` on the path, into committed lines and charts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain import chart
from pretrain24_lines import check_equal, dense_of, measured, same_loss, scaling, speeds, summaries
from results import append

RESULTS = Path(__file__).parent / "results"
LINES, CURVES = RESULTS / "pretrain24.jsonl", RESULTS / "pretrain24_curves.jsonl"
SHOWN = ("summary", "case", "value", "range", "must", "n")


def collect(given: argparse.Namespace) -> None:
    """A line for each run, its curve, the summaries over all these outcomes, the chart of the first seed."""
    found = _found(given.outcomes)
    runs = [f for f in found if "curve" in f]
    for run in runs:
        check_equal(run, dense_of(run, runs))
        for line in measured(run, dense_of(run, runs)):
            append(LINES, line)
        append(CURVES, {key: run[key] for key in ("model", "method", "seed", "tokens", "curve")})
    timed, scaled = [f for f in found if "step_seconds" in f], [f for f in found if "wrap" in f]
    probed = [f for f in found if "tried" in f]
    _keep([*probed, *summaries(runs), *speeds(timed), *scaling(scaled)])
    if runs:
        first = {run["method"]: run["curve"] for run in runs if run["seed"] == runs[0]["seed"]}
        chart.draw(first, given.chart or given.outcomes[0].with_suffix(".svg"))


def products(given: argparse.Namespace) -> None:
    """Runs with dense and with sparse products held against each other: their losses and curves."""
    runs = [f for f in _found(given.outcomes) if "curve" in f]
    for run in runs:
        append(CURVES, {key: run[key] for key in ("model", "method", "products", "seed", "tokens", "curve")})
    _keep(same_loss(runs))


def larger(given: argparse.Namespace) -> None:
    """Curves and last losses of runs of examples/pretrain_24.py, ended or not, their logs named METHOD.jsonl."""
    about, curves = json.loads(given.environment.read_text()), {}
    for log in given.logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        curve, end = [x for x in lines if "loss" in x], lines[-1]
        case = {"model": given.model, "method": log.stem, "seed": 0}
        append(CURVES, case | {"tokens": end["tokens"], "steps_planned": given.planned, "curve": curve})
        ends = {"step": end["step"], "steps_planned": given.planned, "tokens": end["tokens"]}
        line = {"bench": "pretrain24", "case": case | {"variant": "larger"}, "ours": end["valid_loss"], "about": ends}
        append(LINES, line | {"unit": "nats/byte", **about})
        curves[log.stem] = curve
    chart.draw(curves, given.chart)


def _found(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _keep(lines: Iterable[dict[str, Any]]) -> None:
    for line in lines:
        append(LINES, line)
        print(json.dumps({key: line[key] for key in SHOWN if key in line}))
