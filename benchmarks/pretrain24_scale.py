"""One GPU against several: the `scale` of bench_pretrain24.py, whose command line puts `examples` on the path."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import text
from pretrain.loop import Run, Training, join
from pretrain24_clock import locked, seconds
from results import append, environment

BENCH = str(Path(__file__).with_name("bench_pretrain24.py"))


def scale(given: argparse.Namespace) -> None:
    """Tokens a second and the loss after the same steps, on one GPU and on several."""
    for ranks in given.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [BENCH, "rank", str(given.texts), str(given.outcomes), given.method]
        command += ["--model", given.model, "--batch", str(given.batch), "--steps", str(given.steps)]
        subprocess.run(command + (["--no-compile"] if given.no_compile else []), check=True)


def rank(given: argparse.Namespace) -> None:
    """One rank: alone, before it joins the others, then with them. The second one alone takes its batch in two parts:
    what another order of sums does to the loss.
    """
    train, valid = text.find(given.texts, "train"), text.find(given.texts, "valid")
    mine = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(mine)
    if mine < 2:
        _scaled(given, train, valid, ("alone", "in two parts")[mine], mine + 1)
    _, ranks = join()
    for wrap in ("ddp", "fsdp"):
        dist.barrier()
        _scaled(given, train, valid, wrap, 1, ranks, mine == 0)
    dist.barrier()
    dist.destroy_process_group()


def _scaled(
    given: argparse.Namespace, train: Tensor, valid: Tensor, wrap: str, micro: int, ranks: int = 1, first: bool = True
) -> None:
    """The first quarter of the steps warms up and is not timed."""
    run = Run(given.method, None, given.model, given.steps, given.batch, micro, warmup=given.steps // 4)
    training = Training(run, train, wrap=wrap, compile=not given.no_compile, graphs=False)
    seconds(training, run.steps // 4)
    taken = seconds(training, run.steps - run.steps // 4)
    loss = training.evaluate(valid, most=4 * run.batch)
    if first:
        case = {"model": run.model, "method": run.method, "ranks": ranks, "wrap": wrap}
        found = {"tokens_a_second": run.tokens / run.steps / taken, "loss": loss, "steps": run.steps}
        with locked(given.outcomes.with_suffix(".lock")):
            append(given.outcomes, case | found | {"environment": environment(training.device.type)})
    del training
    gc.collect()
