"""2:4 pre-training of a Llama over bytes against dense: loss, flip rate, step time.

    python benchmarks/bench_pretrain24.py probe TEXTS OUTCOMES --method fst   # a decay for `learn --decay`
    python benchmarks/bench_pretrain24.py learn TEXTS OUTCOMES --seeds 0 1 2 --probe fst sr_ste
    python benchmarks/bench_pretrain24.py speed TEXTS OUTCOMES              # seconds a step, each method alone
    python benchmarks/bench_pretrain24.py collect OUTCOMES...               # lines, summaries, chart
    python benchmarks/bench_pretrain24.py learn TEXTS OUTCOMES --methods s_ste fst --products dense sparse
    python benchmarks/bench_pretrain24.py products OUTCOMES...              # lines of such runs
    python benchmarks/bench_pretrain24.py larger METHOD.jsonl... --planned 1000 --environment FILE --chart FILE
    python benchmarks/bench_pretrain24.py scale TEXTS OUTCOMES --ranks 2    # on one host of several GPUs

`learn` runs every method on every seed, seed by seed, one run after the other on each GPU there is: the same bytes in
the same order for all methods of a seed, as many as the bar asks for. `collect` adds one line for each run and the
summaries over the seeds. `scale` compares one GPU with several under DDP and FSDP2. TEXTS is a folder with
*.train.txt[.xz] and *.valid.txt[.xz]; test texts are not read.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain24_clock import locked, seconds
from pretrain24_lines import TOKENS_A_PARAMETER
from results import append, environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from gossamer.train import Sparsifier, suggest_decay  # noqa: E402
from pretrain import text  # noqa: E402
from pretrain.llama import SHAPES, Llama  # noqa: E402
from pretrain.loop import METHODS, Run, Training, ends_dense  # noqa: E402
from pretrain24_collect import collect, larger, products  # noqa: E402
from pretrain24_scale import rank, scale  # noqa: E402

DEFAULT = ("dense", "s_ste", "fst", "sr_ste", "ste")
TIMED = 20  # steps that the speed is taken over


def learn(given: argparse.Namespace) -> None:
    """Every method on every seed; a worker for each GPU takes the next run when it has ended one."""
    jobs = given.outcomes.with_suffix(".jobs")
    shutil.rmtree(jobs, ignore_errors=True)
    jobs.mkdir(parents=True)
    given.until = time.time() + given.seconds
    for worker in [_worker(given, gpu) for gpu in _gpus()]:
        worker.wait()
    missing = [name for name, _ in _jobs(given) if not (jobs / f"{name}.done").exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)} did not end; fix: see above, or give more --seconds")


def _jobs(given: argparse.Namespace) -> Sequence[tuple[str, Callable[[Tensor, Tensor], dict[str, Any]]]]:
    """What there is to do, in order: the decays, then the runs seed by seed; each of the texts, to an outcome."""
    probes = [(f"probe.{m}", partial(_probed, given, m)) for m in given.probe]
    ways = [(s, m, p) for s in given.seeds for m in given.methods for p in _products(given, m)]
    return probes + [(f"{s}.{m}.{p}", partial(_run, given, m, p, s)) for s, m, p in ways]


def _products(given: argparse.Namespace, method: str) -> list[str]:
    return ["dense"] if method == "dense" else given.products


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be for each; one that is empty without a GPU."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())] or [""]


def _worker(given: argparse.Namespace, gpu: str) -> subprocess.Popen:
    """`python this work ...` on one GPU; a run that kills its process costs that run alone."""
    options = {"until": given.until, "model": given.model, "batch": given.batch, "warmup": given.warmup}
    options |= {"tokens": given.tokens, "every": given.every, "probe-steps": given.probe_steps, "lr": given.lr}
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    for name in ("seeds", "methods", "probe", "products"):
        more += [f"--{name}", *map(str, values)] if (values := getattr(given, name)) else []
    more += ["--decay", *(f"{m}={d}" for m, d in given.decays)] if given.decays else []
    more += ["--no-compile"] if given.no_compile else []
    command = [sys.executable, __file__, "work", str(given.texts), str(given.outcomes), *more]
    quoted = shlex.join(command)
    again = f"for i in 1 2 3; do {quoted} && break; done"
    return subprocess.Popen(["bash", "-c", again], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu})


def work(given: argparse.Namespace) -> None:
    """What nobody has begun, one job after the other, while the time suffices for one more."""
    train, valid = text.find(given.texts, "train"), text.find(given.texts, "valid")
    jobs, longest = given.outcomes.with_suffix(".jobs"), 0.0
    for name, job in _jobs(given):
        if time.time() + longest > given.until:
            return
        try:
            (jobs / name).open("x").close()
        except FileExistsError:
            continue
        begin = time.time()
        outcome = job(train, valid)
        with locked(given.outcomes.with_suffix(".lock")):
            append(given.outcomes, outcome)
        (jobs / f"{name}.done").write_text(json.dumps(outcome.get("decay")))
        gc.collect()  # a captured step and its run hold each other
        longest = max(longest, time.time() - begin)
        print(f"{name}: {outcome.get('finished_loss', outcome.get('tried'))}, {time.time() - begin:.1f} s", flush=True)


def _decay(given: argparse.Namespace, method: str) -> float | None:
    """What --decay says, or what the probe finds, which may still be at work; None: the method's own."""
    found, probe = dict(given.decays).get(method), given.outcomes.with_suffix(".jobs") / f"probe.{method}"
    if found is not None or not probe.exists():
        return found
    done, patience = probe.with_suffix(f".{method}.done"), probe.stat().st_mtime + 120
    while not done.exists() and time.time() < patience:
        time.sleep(0.1)
    return json.loads(done.read_text()) if done.exists() else None


def _run(
    given: argparse.Namespace, method: str, products: str, seed: int, train: Tensor, valid: Tensor
) -> dict[str, Any]:
    """One run from its first weights to its last."""
    decay = _decay(given, method)
    run = Run(method, decay, given.model, 1, given.batch, 1, given.lr, given.warmup, seed, given.every, products)
    steps = int(-(-given.tokens * _parameters(given.model) // run.tokens))
    run = replace(run, steps=steps, warmup=min(given.warmup, steps // 4))
    training, lines, clock = Training(run, train, compile=not given.no_compile), [], [time.perf_counter()]

    def log(line: dict[str, Any]) -> None:
        lines.append(line)
        clock.append(time.perf_counter())

    training.train(log)
    found = {"train_seconds": time.perf_counter() - clock[0], "valid_loss": training.evaluate(valid)}
    if ends_dense(training.sparse):
        found["one_shot_loss"] = training.one_shot(valid)
    training.finish()
    found["finished_loss"] = training.evaluate(valid)
    # Dense tails apart, and another program may have had the GPU for a while: the fastest stretch between two lines.
    spans = [b - a for a, b, line in zip(clock, clock[1:], lines, strict=False) if line["step"] < 0.8 * steps]
    found |= {"step_seconds": [min(spans) / run.every] if spans else [], "graphs": training.captured is not None}
    found |= {"train_bytes": len(train), "valid_bytes": len(valid), "parameters": _parameters(run.model)}
    about = {"tokens": run.tokens, "curve": lines, "environment": environment(training.device.type)}
    return vars(run) | found | about


def speed(given: argparse.Namespace) -> None:
    """Seconds a step of each method with the GPU to itself."""
    train = text.find(given.texts, "train")
    for method, way in [(m, p) for m in given.methods for p in _products(given, m)]:
        run = Run(method, None, given.model, 10 * TIMED, given.batch, warmup=TIMED, every=10**9, products=way)
        training = Training(run, train, compile=not given.no_compile, graphs=not given.no_graphs)
        begin = time.perf_counter()
        seconds(training, 4)
        ready = time.perf_counter() - begin
        times = [seconds(training, TIMED) for _ in range(given.repeats)]
        about = {"model": run.model, "method": method, "batch": run.batch, "graphs": training.captured is not None}
        about |= {"products": way, "step_seconds": times, "ready_seconds": ready}
        about |= {"loss": float(training.take_step())}
        append(given.outcomes, about | {"environment": environment(training.device.type)})
        spans = [round(1e3 * t, 2) for t in times]
        print(method, way, f"{spans} ms a step, ready in {ready:.1f} s, {about['loss']:.4f} nats", flush=True)
        if given.profile and training.device.type == "cuda":
            _profile(training, given.outcomes.with_suffix(f".{method}.{way}.profile"))
        del training
        gc.collect()


def _profile(training: Training, file: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        seconds(training, 3)
    table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    file.write_text(table)


def _parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(SHAPES[model]).parameters())


def probe(given: argparse.Namespace) -> None:
    """suggest_decay() on the warm-up of the run that `learn` would do."""
    line = _probed(given, given.method, text.find(given.texts, "train"))
    append(given.outcomes, line)
    print(f"decay {line['decay']:.3g}: mu {line['mu']:.3f}", line["tried"])


def _probed(given: argparse.Namespace, method: str, train: Tensor, _: Tensor | None = None) -> dict[str, Any]:
    run = Run(method, None, given.model, given.probe_steps, given.batch, warmup=given.warmup)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def built() -> Llama:
        torch.manual_seed(run.seed)
        return Llama(SHAPES[run.model]).to(device)

    def warm_up(net: Llama, sparse: Sparsifier, steps: int) -> None:
        training = Training(run, train, compile=not given.no_compile, made=(net, sparse))
        for _ in range(steps):
            training.take_step()

    found = suggest_decay(
        built, warm_up, method=METHODS[method](), steps=run.steps, filter="*.mlp.*", bounds=(1e-6, 1e-2), tries=6
    )
    case = {"model": run.model, "method": method, "steps": run.steps, "batch": run.batch, "variant": "probe"}
    tried = {f"{decay:.3g}": mu for decay, mu in found.tried.items()}
    found = {"decay": found.decay, "mu": found.mu, "feasible": found.feasible, "tried": tried}
    return {"bench": "pretrain24", "case": case, **found, **environment(device.type)}


def _pair(given: str) -> tuple[str, float]:
    method, _, value = given.partition("=")
    return method, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    known = (learn, work, speed, collect, products, larger, probe, scale, rank)
    made = {f.__name__: verbs.add_parser(f.__name__, help=f.__doc__) for f in known}
    for name in ("learn", "work", "speed", "probe", "scale", "rank"):
        made[name].add_argument("texts", type=Path)
        made[name].add_argument("outcomes", type=Path)
        made[name].add_argument("--model", default="10m")
        made[name].add_argument("--batch", type=int, default=128, help="windows a step")
        made[name].add_argument("--no-compile", action="store_true")
    made["probe"].add_argument("--method", default="fst")
    for name in ("learn", "work", "probe"):
        made[name].add_argument("--warmup", type=int, default=100)
        made[name].add_argument("--probe-steps", type=int, default=120, help="of each try")
    for name in ("learn", "work", "speed"):
        made[name].add_argument("--methods", nargs="+", default=list(DEFAULT))
        made[name].add_argument("--products", nargs="+", default=["dense"], choices=["dense", "sparse"])
    for name in ("learn", "work"):
        made[name].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        made[name].add_argument("--probe", nargs="*", default=[], help="methods whose decay is probed for first")
        made[name].add_argument("--decay", type=_pair, nargs="+", default=[], dest="decays", help="METHOD=DECAY")
        made[name].add_argument("--tokens", type=float, default=TOKENS_A_PARAMETER, help="a parameter")
        made[name].add_argument("--every", type=int, default=50, help="steps between measures")
        made[name].add_argument("--lr", type=float, default=1e-3)
    for name in ("scale", "rank"):
        made[name].add_argument("--steps", type=int, default=60)
    made["rank"].add_argument("methods", nargs="+")
    made["scale"].add_argument("--methods", nargs="+", default=["s_ste"])
    made["scale"].add_argument("--ranks", type=int, nargs="+", default=[2])
    made["speed"].add_argument("--repeats", type=int, default=3)
    made["speed"].add_argument("--no-graphs", action="store_true", help="launch every kernel from Python")
    made["speed"].add_argument("--profile", action="store_true", help="write what the GPU did beside the outcomes")
    made["learn"].add_argument("--seconds", type=float, default=3600, help="no run begins that would not end by then")
    made["work"].add_argument("--until", type=float, help="the same, as seconds since 1970")
    for name in ("collect", "products"):
        made[name].add_argument("outcomes", type=Path, nargs="+")
    made["collect"].add_argument("--chart", type=Path)
    made["larger"].add_argument("logs", type=Path, nargs="+")
    made["larger"].add_argument("--model", default="124m")
    made["larger"].add_argument("--planned", type=int, required=True, help="steps")
    made["larger"].add_argument("--environment", type=Path, required=True, help="JSON: machine, versions, commit, ...")
    made["larger"].add_argument("--chart", type=Path, required=True)
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # methods x phases share the code of a block
    globals()[given.verb](given)


if __name__ == "__main__":
    main()
