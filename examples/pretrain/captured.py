"""A training step as one CUDA graph: the host only replays it, which keeps a GPU busy on a small model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .text import starts

if TYPE_CHECKING:
    from .loop import Training

WARM = 3  # steps that run as they are in each phase: they compile and make the optimizer's state


class Captured:
    """`step()` in place of `Training.update(batch)`: the same numbers; data, learning rate and step are on the GPU.

    A phase of the schedule (2:4, dense) has a graph of its own, which the one before makes room for.
    """

    def __init__(self, training: Training) -> None:
        run, device = training.run, training.device
        self.training, self.stream = training, torch.cuda.Stream()
        long, context = len(training.text), training.shape.context
        places = [starts(long, step, run.seed, run.batch, context) for step in range(run.steps)]
        self.places = torch.stack(places).to(device)
        self.rates = torch.tensor([run.rate(step) for step in range(run.steps)], device=device)
        self.rate = torch.zeros((), device=device)
        self.at = torch.tensor([training.step], device=device)
        self.phase, self.warm = training.sparse.phase, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.zeros((), device=device)

    def step(self) -> Tensor:
        """The mean loss, on the device; valid until the next step."""
        if self.training.sparse.phase != self.phase:
            self.phase, self.warm, self.graph = self.training.sparse.phase, 0, None
        if self.warm < WARM:
            self.warm += 1
            self._as_it_is()
        else:
            if self.graph is None:
                self.graph = self._captured()
            self.graph.replay()
        return self.loss

    def _as_it_is(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), self._tensor_rates():
            self.loss = self._step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream), self._tensor_rates():
            self.loss = self._step()
        return graph

    def _step(self) -> Tensor:
        self.rate.copy_(self.rates.index_select(0, self.at)[0])
        rows = self.places.index_select(0, self.at)[0]
        self.at += 1
        return self.training.update(self.training.cut(rows))

    @contextmanager
    def _tensor_rates(self) -> Iterator[None]:
        """The optimizer reads its rate from the GPU; outside, a number stands there, as checkpoints expect."""
        groups = self.training.optimizer.param_groups
        for group in groups:
            group["lr"] = self.rate
        yield
        for group in groups:
            group["lr"] = self.training.run.lr
