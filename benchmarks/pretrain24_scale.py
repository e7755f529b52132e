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

from gossamer.patterns import is_24
from gossamer.train import Sparsifier
from pretrain import text
from pretrain.loop import Run, Training, join
from pretrain24_clock import locked, seconds
from results import append, environment

BENCH = str(Path(__file__).with_name("bench_pretrain24.py"))


def scale(given: argparse.Namespace) -> None:
    """Tokens a second and the loss after the same steps, on one GPU and on several."""
    for ranks in given.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [BENCH, "rank", str(given.texts), str(given.outcomes), *given.methods]
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
    for method in given.methods if mine < 2 else ():
        _scaled(given, method, train, valid, ("alone", "in two parts")[mine], mine + 1)
    _, ranks = join()
    for method in given.methods:
        for wrap in ("ddp", "fsdp"):
            dist.barrier()
            _scaled(given, method, train, valid, wrap, 1, ranks, mine == 0)
    dist.barrier()
    dist.destroy_process_group()


def _scaled(
    given: argparse.Namespace,
    method: str,
    train: Tensor,
    valid: Tensor,
    wrap: str,
    micro: int,
    ranks: int = 1,
    first: bool = True,
) -> None:
    """Timed are the second and third quarter of the steps: the first compiles, and so does a dense tail in the last."""
    run = Run(method, None, given.model, given.steps, given.batch, micro, warmup=given.steps // 4)
    training = Training(run, train, wrap=wrap, compile=not given.no_compile, graphs=False)
    quarter = run.steps // 4
    seconds(training, quarter)
    taken = seconds(training, 2 * quarter)
    seconds(training, run.steps - 3 * quarter)
    loss = training.evaluate(valid, most=4 * run.batch)
    found = {"tokens_a_second": run.tokens / run.steps / taken, "loss": loss, "masks": masks(training.sparse)}
    if first:
        case = {"model": run.model, "method": run.method, "ranks": ranks, "wrap": wrap, "steps": run.steps}
        with locked(given.outcomes.with_suffix(".lock")):
            append(given.outcomes, case | found | {"environment": environment(training.device.type)})
        print(method, wrap, found, flush=True)
    del training
    gc.collect()


def masks(sparse: Sparsifier) -> dict[str, bool]:
    """Is what the layers keep (masks, scales) the same on every rank, and is every mask 2:4 both ways?"""
    states = [tensor for layer in sparse.layers for tensor in layer.state().values()]
    found = {"same_on_all_ranks": all(_same(tensor.float()) for tensor in states)}
    kept = [tensor.float() for tensor in states if tensor.dtype == torch.bool]
    return found | ({"whole_tiles": all(is_24(m) and is_24(m.mT) for m in kept)} if kept else {})


def _same(mine: Tensor) -> bool:
    """A collective: the first rank's tensor against this one's, on all."""
    if not dist.is_initialized():
        return True
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    differs = (theirs != mine).any().float()
    dist.all_reduce(differs)
    return not differs.item()
