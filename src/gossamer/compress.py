"""The loop: block by block, Grams -> method -> format -> module; each result is on disk before the next begins."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .calibrate import Calibration, Stream, placed
from .choose import Choice, choose
from .formats import Format, nbytes
from .layers import Block, block_modules, find, replace, weight_of
from .nn import SparseLinear, sparse_layers
from .plan import AUTO, DENSE, LayerPlan, Plan, create, job_flops
from .plan import plan as make_plan
from .progress import Clock, LayerReport, Progress, Report, Track
from .stats import CalibrationError, Stats
from .work import Folder, borrows, digest, fingerprint, write_json

log = logging.getLogger("gossamer")
M = TypeVar("M", bound=nn.Module)


class FitError(RuntimeError):
    """A method that failed on some layer."""


def compress(
    model: M,
    calibration: Any = None,
    plan: Plan | None = None,
    *,
    tokenizer: Any = None,
    method: str = AUTO,
    ratio: float = 0.3,
    work: str | Path | None = None,
    device: torch.device | str | None = None,
    sequential: bool = False,
    samples: int = 256,
    length: int = 1024,
    progress: Callable[[Progress], object] | None = None,
    report: Callable[[Report], object] | None = None,
    fresh: bool = False,
    **knobs: Any,
) -> M:
    """Compress the linear layers of a model, in place, and return it.

    `calibration`: texts (with `tokenizer`) or token ids, packed into `samples` windows of `length` tokens; None will do
    for methods that look at weights alone. `plan` takes the place of `method`, `ratio` and `knobs`. `work`: a folder
    that makes the run resumable: call again with the same arguments and a freshly loaded model; `fresh` starts over.
    `device`: where blocks are calibrated and fitted, one at a time. `sequential`: each block sees what its compressed
    predecessors put out. `report` is called once, at the end, with what `work`/report.json also says.

    Raises, before long work: RatioError, PlanError, KeyError, TypeError, LayerError, CalibrationError, WorkError, and
    ValueError for NaN in weights; later FitError and, for NaN in activations, CalibrationError.
    """
    if plan and knobs:
        raise TypeError(f"knobs ({', '.join(knobs)}) beside a plan; fix: give them when making the plan")
    plan = plan or make_plan(model, method, ratio, **knobs)
    plan.check(model)
    data = _calibration(model, plan, calibration, tokenizer, samples, length)
    notify = progress or (lambda _: None)
    notify(Progress("check", 0, 1, "weights"))
    identity = _fingerprint(model, plan, data, sequential, device)
    with _folder(work) as path:
        folder = Folder(path, identity, fresh)
        try:
            result = _Run(model, find(model), plan, data, folder, device, sequential, notify).all()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_resume(work)) from None
        write_json(folder.path / "report.json", result.to_json())
    _attach(model)
    if report:
        report(result)
    return model


class _Run:
    """One pass over the blocks. What is on disk decides what is left to do: a resumed run is an ordinary one."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        plan: Plan,
        data: Calibration | None,
        folder: Folder,
        device: torch.device | str | None,
        sequential: bool,
        notify: Callable[[Progress], object],
    ) -> None:
        self.model, self.blocks, self.data, self.folder = model, blocks, data, folder
        self.device, self.sequential, self.notify = device, sequential, notify
        self.choice = self._choice(plan) if plan.automatic else None
        self.plan = plan.resolve(self.choice.method) if self.choice else plan
        self.jobs = _by_block(blocks, self.plan.jobs())
        self.last = max((i for i, jobs in enumerate(self.jobs) if any(map(_needs_stats, jobs))), default=-1)
        self.layers: list[LayerReport] = []

    def all(self) -> Report:
        """Compress every block; raises at the first layer that fails, with all before it stored."""
        first = next((i for i, jobs in enumerate(self.jobs) if any(map(self._open, jobs))), len(self.blocks))
        self.stream = self._open_stream() if first <= self.last else None
        left = sum(l.stored_bytes for jobs in self.jobs for job in jobs if self._open(job) for l in job)
        self.folder.need(left + (2 * self.stream.boundary_bytes if self.stream else 0))
        begin = self._begin(first)
        self.clock = self._clock(begin)
        for i, block in enumerate(self.blocks):
            with placed(self.model.get_submodule(block.name), self.device if i >= min(first, begin) else None):
                self._block(i, calibrate=begin <= i <= self.last)
            if self.stream:
                self.stream.drop(i)
        self.folder.finish()
        left_dense = sum(l.dense_bytes for l in self.plan.layers if l.method == DENSE)
        return Report(tuple(self.layers), self.choice, left_dense)

    def _open(self, job: list[LayerPlan]) -> bool:
        return not self.folder.has(_key(job))

    def _open_stream(self) -> Stream:
        assert self.data
        modules = block_modules(self.model, self.blocks)
        return Stream(self.model, modules, self.data, self.folder.hidden, self.device)

    def _begin(self, first: int) -> int:
        """The block from which hidden states have to flow, its input on disk."""
        if not self.stream:
            return len(self.blocks)
        if found := [i for i in range(first + 1) if self.stream.has(i)]:
            return found[-1]
        self.stream.start()
        return 0

    def _block(self, i: int, calibrate: bool) -> None:
        """Whatever is still to be done for block `i`, which ends up compressed, the next one's input on disk."""
        onward = calibrate and i < self.last and not (self.stream and self.stream.has(i + 1))
        open_jobs = [j for j in self.jobs[i] if self._open(j)]
        watch = {j[0].group for j in open_jobs if _needs_stats(j)}
        stats: dict[str, Stats] = {}
        if watch or (onward and not self.sequential):
            stats = self._calibrate(i, watch, onward and not self.sequential)
        for job in open_jobs:
            self._fit(job, stats.get(job[0].group))
        for job in self.jobs[i]:
            self._swap(job)
        if onward and self.sequential:
            self._calibrate(i, set(), True)

    def _calibrate(self, i: int, watch: set[str], onward: bool) -> dict[str, Stats]:
        assert self.stream
        self.clock.begin("calibrate", self.blocks[i].name)
        modules = {name: self.model.get_submodule(name) for name in sorted(watch)}
        return self.stream.run(i, modules, onward, lambda *_: self.clock.advance("calibrate"))

    def _fit(self, job: list[LayerPlan], stats: Stats | None) -> None:
        self.clock.begin("fit", job[0].name)
        weights = [weight_of(self.model.get_submodule(l.name)) for l in job]
        start = time.perf_counter()
        fitted = _fitted(job, weights, stats)
        seconds = time.perf_counter() - start
        rows = _report(job, fitted, _errors(job, weights, fitted, stats), seconds)
        self.folder.save(_key(job), fitted, {"layers": [asdict(r) for r in rows]})
        self.clock.advance("fit", job_flops(job))

    def _swap(self, job: list[LayerPlan]) -> None:
        """Put the stored result in the place of the dense layers."""
        stored, facts = self.folder.load(_key(job), weight_of(self.model.get_submodule(job[0].name)).device)
        self.layers += [LayerReport(**f) for f in facts["layers"]]
        lender = None
        for l, a in zip(job, stored, strict=True):
            bias = self.model.get_submodule(l.name).bias
            layer = SparseLinear.from_format(a, bias, lender if borrows(a, stored[0]) else None)  # type: ignore[arg-type]
            replace(self.model, l.name, layer)
            lender = lender or layer

    def _choice(self, plan: Plan) -> Choice:
        """What method "auto" means in this run: as chosen before, if the run is resumed."""
        file = self.folder.path / "choice.json"
        if file.exists():
            return Choice.from_json(json.loads(file.read_text()))
        assert self.data
        self.notify(Progress("choose", 0, len(self.blocks), self.blocks[0].name))
        ratios = [l.ratio for l in plan.layers if l.method == AUTO]
        found = choose(
            self.model,
            self.blocks,
            self.data,
            max(set(ratios), key=ratios.count),
            self.folder.hidden / "trial",
            device=self.device,
            tick=lambda done, total: self.notify(Progress("choose", done, total, self.blocks[done - 1].name)),
        )
        write_json(file, found.to_json())
        log.info("%s", found.reason)
        return found

    def _clock(self, begin: int) -> Clock:
        jobs = [j for jobs in self.jobs for j in jobs]
        outstanding = [j for j in jobs if self._open(j)]
        blocks = max(0, self.last + 1 - begin)
        passes = 2 * blocks - 1 if self.sequential else blocks
        batches = passes * self.stream.batches if self.stream else 0
        fit = Track(len(jobs) - len(outstanding), len(jobs), sum(map(job_flops, outstanding)))
        return Clock(self.notify, {"calibrate": Track(0, batches, batches), "fit": fit})


def _by_block(blocks: Sequence[Block], jobs: Sequence[list[LayerPlan]]) -> list[list[list[LayerPlan]]]:
    return [[j for j in jobs if j[0].name.startswith(f"{b.name}.")] for b in blocks]


def _key(job: Sequence[LayerPlan]) -> str:
    return job[0].name


def _needs_stats(job: Sequence[LayerPlan]) -> bool:
    return create(job[0]).needs_stats


def _calibration(
    model: nn.Module, plan: Plan, given: Any, tokenizer: Any, samples: int, length: int
) -> Calibration | None:
    """The calibration windows, checked; None if no method of the plan looks at them."""
    needing = next((j[0] for j in plan.jobs() if _needs_stats(j)), None)
    if needing is None:
        return None
    if given is None:
        raise CalibrationError(
            f"{needing.name}: method '{needing.method}' needs calibration text; fix: pass texts, or method='magnitude'"
        )
    data = Calibration.of(given, tokenizer, samples, length)
    data.check(model)
    return data


def _fitted(job: Sequence[LayerPlan], weights: list[Tensor], stats: Stats | None) -> list[Format]:
    method = create(job[0])
    try:
        with _seeded(job[0].name, weights[0].device):
            return method.fit(weights, stats, job[0].ratio)
    except (RuntimeError, ValueError) as e:
        names = ", ".join(l.name for l in job)
        raise FitError(
            f"{names}: method '{method.name}' failed ({type(e).__name__.lstrip('_')}: {e}); "
            "fix: calibrate on more text, or give these layers another method or 'dense' by a rule"
        ) from e


def _errors(
    job: Sequence[LayerPlan], weights: list[Tensor], fitted: list[Format], stats: Stats | None
) -> list[float | None]:
    errors: list[float | None] = []
    for l, weight, a in zip(job, weights, fitted, strict=True):
        dense = a.decode(torch.float32)
        if dense.shape != weight.shape:
            raise FitError(f"{l.name}: method '{l.method}' returned {tuple(dense.shape)} for {tuple(weight.shape)}")
        error = stats.relative_error(weight, dense) if stats else None
        # An error takes in every entry, so it is not finite if one of them is not.
        if not (torch.isfinite(dense).all() if error is None else math.isfinite(error)):
            raise FitError(
                f"{l.name}: method '{l.method}' returned NaN or Inf; fix: try another method, and report this"
            )
        errors.append(error)
    return errors


def _report(
    job: Sequence[LayerPlan], fitted: list[Format], errors: Sequence[float | None], seconds: float
) -> list[LayerReport]:
    """A shared factor counts for the first layer, as in the plan."""
    upto = [nbytes(fitted[:i]) for i in range(len(fitted) + 1)]
    return [
        LayerReport(l.name, l.method, l.ratio, l.dense_bytes, upto[i + 1] - upto[i], errors[i], seconds)
        for i, l in enumerate(job)
    ]


@contextmanager
def _seeded(name: str, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the layer alone: a resumed run draws the same ones."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


def _fingerprint(
    model: nn.Module, plan: Plan, data: Calibration | None, sequential: bool, device: torch.device | str | None
) -> dict[str, str]:
    """Everything that the result depends on."""
    return fingerprint(model) | {
        "calibration": data.digest()[:16] if data else "none",
        "plan": digest([asdict(l) for l in plan.layers]),
        "sequential": str(sequential),
        "device": torch.device(device or next(model.parameters()).device).type,
    }


@contextmanager
def _folder(work: str | Path | None) -> Iterator[Path]:
    if work is not None:
        yield Path(work)
        return
    with tempfile.TemporaryDirectory(prefix="gossamer-") as path:
        yield Path(path)


def _how_to_resume(work: str | Path | None) -> str:
    if work is None:
        return "interrupted; nothing is kept without a work folder; next time: give one (work=DIR) to be able to resume"
    return f"interrupted; what is finished is kept in {work}; to resume: load the model again and run the same command"


def _attach(model: nn.Module) -> None:
    """Make save_pretrained of a transformers model write what is needed to load it again."""
    if not hasattr(model, "save_pretrained") or not sparse_layers(model):
        return
    from .hub import transformers

    transformers.attach(model)
