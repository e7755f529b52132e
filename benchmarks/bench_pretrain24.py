"""2:4 pre-training of a Llama over bytes against dense: loss, flip rate, step time.

    python benchmarks/bench_pretrain24.py learn TEXTS OUTCOMES --seed 0 --seconds 150   # on a GPU, one seed a call
    python benchmarks/bench_pretrain24.py collect OUTCOMES...                           # lines, summaries, chart
    python benchmarks/bench_pretrain24.py probe TEXTS --method fst                      # a decay for `learn --decay`
    python benchmarks/bench_pretrain24.py scale TEXTS --ranks 1 2 4                     # on one host of several GPUs

`learn` trains all methods at once on one GPU, a process each, on the same bytes in the same order, for the same number
of steps: as many as the time allows, the bar's 13 tokens a parameter at most. `collect` adds one line for each run
and the summaries over the seeds. `scale` compares one GPU with several under DDP and FSDP2. TEXTS is a folder with
*.train.txt[.xz] and *.valid.txt[.xz]; test texts are not read.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain24_lines import TOKENS_A_PARAMETER, check_equal, dense_of, measured, scaling, summaries
from results import append, environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from gossamer.train import Sparsifier, suggest_decay  # noqa: E402
from pretrain import chart, text  # noqa: E402
from pretrain.llama import SHAPES, Llama  # noqa: E402
from pretrain.loop import METHODS, Run, Training, ends_dense, join  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LINES, CURVES = RESULTS / "pretrain24.jsonl", RESULTS / "pretrain24_curves.jsonl"
DEFAULT = ("dense", "s_ste", "fst", "sr_ste", "ste")
TIMED = 20  # steps that the speed is taken over


class Meeting:
    """Files by which processes wait for each other: a worker says, the parent hears all and answers."""

    def __init__(self, outcomes: Path, seed: int) -> None:
        self.folder = outcomes.with_suffix(f".seed{seed}")

    def say(self, name: str, value: object) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps(value))
        part.rename(self.folder / name)

    def hear(self, name: str, speaker: subprocess.Popen | None = None) -> Any:
        """None where the speaker died."""
        while not (self.folder / name).exists():
            if speaker is not None and speaker.poll():
                return None
            time.sleep(0.02)
        return json.loads((self.folder / name).read_text())


def learn(given: argparse.Namespace) -> None:
    """A process for each method. They compile, are timed one by one and all at once, and are told how many steps."""
    begin, meeting = time.monotonic(), Meeting(given.outcomes, given.seed)
    shutil.rmtree(meeting.folder, ignore_errors=True)
    meeting.folder.mkdir(parents=True)
    workers = {method: _start(given, method) for method in given.methods}
    try:
        for stage in ("compiled", "alone", "together"):
            told = {m: meeting.hear(f"{m}.{stage}", w) for m, w in workers.items()}
            workers = {m: w for m, w in workers.items() if told[m] is not None}  # a method that fails is left out
            if stage != "together":
                meeting.say(f"after.{stage}", True)
        slowest = max(t["seconds"] for t in told.values() if t)
        left = given.seconds - (time.monotonic() - begin)
        possible = int((left - given.reserve) / (1.05 * slowest))
        wanted = next(t["wanted"] for t in told.values() if t)
        steps = max(4 * TIMED, min(wanted, possible))
        print(f"{steps} steps of {wanted} for the bar, {left:.0f} s left, {1e3 * slowest:.1f} ms a step", flush=True)
        meeting.say("steps", steps)
        for worker in workers.values():
            worker.wait()
    finally:
        for worker in workers.values():
            worker.kill()


def _start(given: argparse.Namespace, method: str) -> subprocess.Popen:
    options = {"seed": given.seed, "model": given.model, "batch": given.batch, "warmup": given.warmup}
    options |= {"decay": decay} if (decay := dict(given.decays).get(method)) else {}
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    more += ["--no-compile"] if given.no_compile else []
    return subprocess.Popen([sys.executable, __file__, "work", str(given.texts), str(given.outcomes), method, *more])


def work(given: argparse.Namespace) -> None:
    """One method: compile and take times, then train beside the others."""
    meeting = Meeting(given.outcomes, given.seed)
    train, valid = text.find(given.texts, "train"), text.find(given.texts, "valid")
    run = Run(given.method, given.decay, given.model, 1000, given.batch, 1, 1e-3, given.warmup, given.seed)
    alone = _timed(Training(run, train, compile=not given.no_compile), meeting)
    steps = meeting.hear("steps")
    run = replace(run, steps=steps, warmup=min(given.warmup, steps // 4))
    training, lines = Training(run, train, compile=not given.no_compile), []
    training.train(lines.append)
    found = {"valid_loss": training.evaluate(valid), "train_bytes": len(train), "valid_bytes": len(valid)}
    if ends_dense(training.sparse):
        found["one_shot_loss"] = training.one_shot(valid)
    training.finish()
    found["finished_loss"] = training.evaluate(valid)
    outcome = vars(run) | {"tokens": run.tokens, "parameters": _parameters(training), "step_seconds_alone": alone}
    outcome |= found | {"curve": lines, "environment": environment(training.device.type)}
    with _locked(given.outcomes.with_suffix(".lock")):
        append(given.outcomes, outcome)


def _timed(training: Training, meeting: Meeting) -> float:
    """Seconds a step with the GPU to itself; says the seconds when all methods share it, too."""
    method = training.run.method
    _seconds(training, 4)  # compiles
    meeting.say(f"{method}.compiled", True)
    meeting.hear("after.compiled")
    with _locked(meeting.folder / "lock"):
        alone = _seconds(training, TIMED)
    meeting.say(f"{method}.alone", True)
    meeting.hear("after.alone")
    wanted = -(-TOKENS_A_PARAMETER * _parameters(training) * training.run.steps // training.run.tokens)
    meeting.say(f"{method}.together", {"seconds": _seconds(training, TIMED), "wanted": wanted})
    return alone


def _seconds(training: Training, steps: int) -> float:
    _synchronize(training)
    begin = time.perf_counter()
    for _ in range(steps):
        training.take_step()
    _synchronize(training)
    return (time.perf_counter() - begin) / steps


def _parameters(training: Training) -> int:
    return sum(p.numel() for p in training.net.parameters())


def _synchronize(training: Training) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def collect(given: argparse.Namespace) -> None:
    """A line for each run, its curve, the summaries over all runs of these outcomes, the chart of the first seed."""
    runs = [json.loads(line) for file in given.outcomes for line in file.read_text().splitlines()]
    for run in runs:
        check_equal(run, dense_of(run, runs))
        for line in measured(run, dense_of(run, runs)):
            append(LINES, line)
        append(CURVES, {key: run[key] for key in ("model", "method", "seed", "tokens", "curve")})
    for line in summaries(runs):
        append(LINES, line)
        print(json.dumps({key: line[key] for key in ("summary", "case", "value", "must", "n")}))
    first = {run["method"]: run["curve"] for run in runs if run["seed"] == runs[0]["seed"]}
    chart.draw(first, given.chart or given.outcomes[0].with_suffix(".svg"))


def probe(given: argparse.Namespace) -> None:
    """suggest_decay() on the warm-up of the run that `learn` would do."""
    train = text.find(given.texts, "train")
    run = Run(given.method, None, given.model, given.steps, given.batch, warmup=given.warmup, seed=given.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def built() -> Llama:
        torch.manual_seed(run.seed)
        return Llama(SHAPES[run.model]).to(device)

    def warm_up(net: Llama, sparse: Sparsifier, steps: int) -> None:
        training = Training(run, train, compile=not given.no_compile, made=(net, sparse))
        for _ in range(steps):
            training.take_step()

    found = suggest_decay(built, warm_up, method=METHODS[run.method](), steps=run.steps, filter="*.mlp.*")
    case = {"model": run.model, "method": run.method, "steps": run.steps, "batch": run.batch, "seed": run.seed}
    line = {"bench": "pretrain24", "case": case | {"variant": "probe"}, "decay": found.decay, "mu": found.mu}
    tried = {f"{decay:.3g}": mu for decay, mu in found.tried.items()}
    append(LINES, line | {"feasible": found.feasible, "tried": tried, **environment(device.type)})
    print(f"decay {found.decay:.3g}: mu {found.mu:.3f}", tried)


def scale(given: argparse.Namespace) -> None:
    """Tokens a second and the loss after the same steps, on one rank and on several."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        ways = [(1, "ddp"), *((ranks, wrap) for ranks in given.ranks if ranks > 1 for wrap in ("ddp", "fsdp"))]
        for ranks, wrap in ways:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += [__file__, "rank", str(given.texts), str(outcomes), given.method, "--wrap", wrap]
            command += ["--model", given.model, "--batch", str(given.batch), "--steps", str(given.steps)]
            subprocess.run(command + (["--no-compile"] if given.no_compile else []), check=True)
        found = [json.loads(line) for line in outcomes.read_text().splitlines()]
    for line in scaling(found):
        append(LINES, line)
        print(json.dumps({key: line[key] for key in ("summary", "case", "value")}))


def rank(given: argparse.Namespace) -> None:
    """One rank of a scaling run: the first quarter of the steps warms up."""
    mine, ranks = join()
    run = Run(given.method, None, given.model, given.steps, given.batch, warmup=given.steps // 4, seed=0)
    training = Training(run, text.find(given.texts, "train"), wrap=given.wrap, compile=not given.no_compile)
    _seconds(training, run.steps // 4)
    seconds = _seconds(training, run.steps - run.steps // 4)
    loss = training.evaluate(text.find(given.texts, "valid"), most=4 * run.batch)
    if mine == 0:
        case = {"model": run.model, "method": run.method, "ranks": ranks, "wrap": given.wrap}
        found = {"tokens_a_second": run.tokens / run.steps / seconds, "loss": loss, "steps": run.steps}
        append(given.outcomes, case | found | {"environment": environment(training.device.type)})
    dist.destroy_process_group()


def _pair(given: str) -> tuple[str, float]:
    method, _, value = given.partition("=")
    return method, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = {
        f.__name__: verbs.add_parser(f.__name__, help=f.__doc__) for f in (learn, work, collect, probe, scale, rank)
    }
    for name in ("learn", "work", "probe", "scale", "rank"):
        made[name].add_argument("texts", type=Path)
    for name in ("learn", "work", "rank"):
        made[name].add_argument("outcomes", type=Path)
    for name in ("work", "rank"):
        made[name].add_argument("method")
    for name in ("probe", "scale"):
        made[name].add_argument("--method", default="fst" if name == "probe" else "s_ste")
    for name in ("learn", "work", "probe", "scale", "rank"):
        made[name].add_argument("--model", default="10m")
        made[name].add_argument("--batch", type=int, default=128, help="windows a step")
        made[name].add_argument("--no-compile", action="store_true")
    for name in ("learn", "work", "probe"):
        made[name].add_argument("--seed", type=int, default=0)
        made[name].add_argument("--warmup", type=int, default=100)
    for name, steps in (("probe", 150), ("scale", 200), ("rank", 200)):
        made[name].add_argument("--steps", type=int, default=steps)
    made["rank"].add_argument("--wrap", choices=["ddp", "fsdp"], default="ddp")
    made["scale"].add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    made["work"].add_argument("--decay", type=float)
    made["learn"].add_argument("--decay", type=_pair, nargs="+", default=[], dest="decays", help="METHOD=DECAY")
    made["learn"].add_argument("--methods", nargs="+", default=list(DEFAULT))
    made["learn"].add_argument("--seconds", type=float, default=600, help="of the whole call")
    made["learn"].add_argument("--reserve", type=float, default=15, help="seconds to evaluate and compile late")
    made["collect"].add_argument("outcomes", type=Path, nargs="+")
    made["collect"].add_argument("--chart", type=Path)
    given = parser.parse_args()
    globals()[given.verb](given)


if __name__ == "__main__":
    main()
