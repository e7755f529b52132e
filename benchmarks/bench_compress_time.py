"""Time and peak memory of one whole compression through `gossamer.compress`.

    python benchmarks/bench_compress_time.py MODEL --method cospadi --ratio 0.3

Summaries: "minutes" (the solver's own time, all layers), "wall_minutes" (calibration included) and "peak_memory" (peak
resident set of the process / bytes of the model as loaded). The K-SVD reference on the GPU is in bench_quality.py.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from gossamer import texts
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "compress_time.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", default="SmolLM2-135M")
    parser.add_argument("--method", default="cospadi")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--windows", type=int, default=64, help="of 1,024 calibration tokens")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    reports: list = []
    start = time.perf_counter()
    gossamer.compress(
        model,
        texts.calibration(),
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        method=args.method,
        ratio=args.ratio,
        samples=args.windows,
        report=reports.append,
    )
    wall = time.perf_counter() - start
    # Every layer of a group reports the time of its group.
    jobs = {(r.seconds, r.name.rsplit(".", 2)[0]): r.seconds for r in reports[0].layers}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    case = {"model": args.name, "device": "cpu", "method": args.method, "cr": args.ratio, "windows": args.windows}
    for summary, value, must, unit in (
        ("minutes", sum(jobs.values()) / 60, 8.0, "minutes"),
        ("wall_minutes", wall / 60, None, "minutes"),
        ("peak_memory", peak / size, 3.0, "model sizes"),
    ):
        print(f"{summary}: {value:.3f} {unit}", flush=True)
        line = {"bench": "compress_time", "summary": summary, "case": case, "value": round(value, 4), "sense": "<="}
        append(RESULTS, line | {"must": must, "unit": unit, "n": 1} | environment())


if __name__ == "__main__":
    main()
