"""The training loop: one GPU, DDP or FSDP2; bfloat16; resumes to the bit from its last checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gossamer.patterns import hard24
from gossamer.train import FST, SRSTE, SSTE, STE, Dense, Method, Sparsifier, sparsify

from .captured import Captured
from .llama import SHAPES, Llama
from .text import cut, starts, windows

METHODS: dict[str, Callable[..., Method]] = {
    "dense": Dense,
    "ste": STE,
    "sr_ste": SRSTE,
    "sr_ste_weights": lambda **knobs: SRSTE(decay_on="weights", **knobs),
    "fst": FST,
    "fst_no_tail": lambda **knobs: FST(dense_tail=0, **knobs),
    "fst_no_mvue": lambda **knobs: FST(mvue=False, **knobs),
    "s_ste": SSTE,
    "s_ste_dynamic": lambda: SSTE(beta="dynamic"),
    "s_ste_beta_one": lambda: SSTE(beta="one"),
    "s_ste_mvue": lambda: SSTE(mvue=True),
    "s_ste_fp8": lambda: SSTE(fp8=True),
}


@dataclass(frozen=True)
class Run:
    """What determines a run's numbers. `batch` windows a step over all ranks, in `micro` parts on each."""

    method: str = "s_ste"
    decay: float | None = None
    model: str = "10m"
    steps: int = 2000
    batch: int = 256
    micro: int = 1
    lr: float = 1e-3
    warmup: int = 100
    seed: int = 0
    every: int = 25
    products: Literal["dense", "sparse"] = "dense"  # what multiplies: "sparse" is for sparse tensor cores

    def rate(self, step: int) -> float:
        """Warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * along))

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * SHAPES[self.model].context


def build(run: Run, device: torch.device) -> tuple[Llama, Sparsifier]:
    """The model with its first weights, the same on every rank, and its 2:4 layers."""
    torch.manual_seed(run.seed)
    net = Llama(SHAPES[run.model]).to(device)
    knobs = {} if run.decay is None else {"decay": run.decay}
    method = METHODS[run.method](**knobs)
    products = None if run.products == "dense" else run.products
    return net, sparsify(net, method, steps=run.steps, filter="*.mlp.*", every=run.every, products=products)


class Training:
    """A run on this rank: `train()` it, `evaluate()` it, `finish()` it."""

    def __init__(
        self,
        run: Run,
        text: Tensor,
        out: Path | None = None,
        wrap: str = "ddp",
        compile: bool = False,
        graphs: bool = True,
        made: tuple[Llama, Sparsifier] | None = None,
    ) -> None:
        """`compile`: blocks, decay, measures; on one GPU whole steps are then captured, too, unless `graphs` is False.

        `made`: a model that is there already, and its sparsifier, in place of those that `run` describes.
        """
        self.run, self.out, self.shape = run, out, SHAPES[run.model]
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.text = text.to(self.device)
        self.net, self.sparse = made or build(run, self.device)
        self.entropy = torch.compile(entropy, dynamic=False) if compile else entropy
        if compile:
            self.sparse.compile()
            for block in self.net.blocks:
                block.compile(fullgraph=True, dynamic=False)
        capture = cuda and compile and graphs and not dist.is_initialized()
        self.model = self._wrapped(wrap)
        matrices = [p for p in self.net.parameters() if p.ndim == 2]
        rest = [p for p in self.net.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=cuda, capturable=capture)
        torch.manual_seed(run.seed + 1 + self.rank)  # MVUE draws its own noise on every rank
        self.step = 0
        if out is not None and (out / "checkpoint").exists():
            self._resume(out / "checkpoint")
        self.captured = Captured(self) if capture else None

    def _wrapped(self, wrap: str) -> nn.Module:
        if not dist.is_initialized():
            return self.net
        if wrap == "ddp":
            torch._dynamo.config.optimize_ddp = False  # it cuts graphs for overlap, which one for each block gives
            return DistributedDataParallel(self.net, broadcast_buffers=False)
        for block in self.net.blocks:
            fully_shard(block)
        return fully_shard(self.net)

    def loss(self, x: Tensor) -> Tensor:
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with autocast:
            logits = self.model(x[:, :-1])
        return self.entropy(logits, x[:, 1:])

    def take_step(self) -> Tensor:
        """One optimizer step; the mean loss of this rank's windows, on the device, valid until the next."""
        if self.captured is not None:
            loss = self.captured.step()
        else:
            run = self.run
            rows = starts(len(self.text), self.step, run.seed, run.batch, self.shape.context)
            for group in self.optimizer.param_groups:
                group["lr"] = run.rate(self.step)
            loss = self.update(self.cut(rows.chunk(self.ranks)[self.rank].to(self.device)))
        self.sparse.after_step()
        self.step += 1
        return loss

    def cut(self, rows: Tensor) -> Tensor:
        return cut(self.text, rows, self.shape.context)

    def update(self, x: Tensor) -> Tensor:
        """Forward, backward, clipping, decay, optimizer: no synchronisation, so that it can be captured."""
        losses = []
        for part in x.chunk(self.run.micro):
            loss = self.loss(part) * (len(part) / len(x))
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.sparse.before_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).sum()

    def train(self, log: Callable[[dict[str, Any]], None], seconds: float = math.inf, save_every: int = 0) -> bool:
        """Steps to the end, or a checkpoint after `seconds`; was it the end?"""
        begin = time.perf_counter()
        while self.step < self.run.steps:
            loss = self.take_step()
            if self.step % self.run.every == 0:
                log({"step": self.step, "loss": round(self._mean(loss), 5), **self.sparse.metrics()})
            if save_every and self.step % save_every == 0:
                self.save()
            if self._agreed(time.perf_counter() - begin > seconds):
                self.save()
                return self.step == self.run.steps
        return True

    def _mean(self, loss: Tensor) -> float:
        if self.ranks > 1:
            dist.all_reduce(loss, dist.ReduceOp.SUM)
        return float(loss) / self.ranks

    def _agreed(self, stop: bool) -> bool:
        """The first rank's clock decides for all."""
        if self.ranks == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag)

    @torch.no_grad()
    def evaluate(self, text: Tensor, most: int = 1 << 30) -> float:
        """Nats per byte over the first `most` windows of a text; the same windows on every rank."""
        parts = windows(text.to(self.device), self.shape.context, self.run.batch, most)
        with torch.compiler.set_stance("force_eager"):  # evaluation alone would not pay for compilation
            return float(sum(self.loss(x) * len(x) for x in parts) / sum(len(x) for x in parts))

    @torch.no_grad()
    def one_shot(self, text: Tensor, most: int = 1 << 30) -> float:
        """The loss when the weights are pruned 2:4 by magnitude as they are; they come back."""
        weights = [layer.weight for layer in self.sparse.layers]
        kept = [w.clone() for w in weights]
        for w in weights:
            held = w.to_local() if hasattr(w, "to_local") else w
            held.mul_(hard24(held))
        found = self.evaluate(text, most)
        for w, before in zip(weights, kept, strict=True):
            w.copy_(before)
        return found

    def finish(self) -> None:
        """Plain linear layers again: 2:4 where the method ends so."""
        self.sparse.finalize("dense" if ends_dense(self.sparse) else "sparse")

    def save(self) -> None:
        """One folder, replaced as a whole: weights and optimizer in torch's distributed format, the rest per rank."""
        if self.out is None:
            return
        new, old = self.out / "checkpoint.new", self.out / "checkpoint"
        model, optimizer = get_state_dict(self.net, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=new)
        device = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        rest = {"step": self.step, "run": asdict(self.run), "sparse": self.sparse.state_dict()}
        torch.save(rest | {"random": [torch.get_rng_state(), device]}, new / f"rank{self.rank}.pt")
        self._wait()
        if self.rank == 0:
            shutil.rmtree(old, ignore_errors=True)
            new.rename(old)
        self._wait()

    def _resume(self, folder: Path) -> None:
        file = folder / f"rank{self.rank}.pt"
        if not file.exists() or (folder / f"rank{self.ranks}.pt").exists():
            raise RuntimeError(f"{folder} is of another number of ranks than {self.ranks}; fix: resume with as many")
        rest = torch.load(file, map_location="cpu", weights_only=True)
        if rest["run"] != asdict(self.run):
            raise RuntimeError(f"{folder} is of {rest['run']}; fix: the same arguments, or another --out")
        model, optimizer = get_state_dict(self.net, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.sparse.load_state_dict(rest["sparse"])
        self.step = rest["step"]
        torch.set_rng_state(rest["random"][0])
        if rest["random"][1] is not None:
            torch.cuda.set_rng_state(rest["random"][1])

    def _wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def entropy(logits: Tensor, x: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1).float(), x.flatten())


def ends_dense(sparse: Sparsifier) -> bool:
    return sparse.schedule.ends_dense or sparse.method.name == "dense"


class Log:
    """JSON lines in `folder`/log.jsonl, from `step` on; TensorBoard, too, where it is asked for and installed."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "log.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.file.write_text("".join(f"{l}\n" for l in lines if json.loads(l)["step"] <= step))  # later ones are redone
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder))

    def __call__(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                self.board.add_scalar(name, value, line["step"])
            self.board.flush()
        print("  ".join(f"{name} {value:.5g}" for name, value in line.items()), flush=True)


def join() -> tuple[int, int]:
    """This rank and their number, under torchrun or alone."""
    if "RANK" not in os.environ:
        return 0, 1
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """End a rank's process, all ranks together, without taking the interpreter down; one that is alone returns.

    Torch's caches of DTensor keep gloo's process group, destroyed or not. Its threads live on and may ask for the
    interpreter's lock while that goes down, which aborts the process, now and then (torch 2.13).
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
