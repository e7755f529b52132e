"""How hard to push: a schedule of the penalty's weight, and a controller that finds the weight for a cost asked for."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor, nn

from .flops import batch_flops, batch_nonzeros, flops_penalty


class Schedule(Protocol):
    """The weight of the penalty, told after every step what the codes of its batch cost."""

    step: int
    steps: int

    @property
    def weight(self) -> float: ...

    def update(self, measured: float, penalty: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class QuadraticRamp:
    """weight(t) = weight * min(1, (t / steps)^2), the paper's schedule: first codes learn to match, then to be thin."""

    def __init__(self, weight: float, steps: int) -> None:
        self.final, self.steps, self.step = weight, max(steps, 1), 0

    @property
    def weight(self) -> float:
        return self.final * min(1.0, (self.step / self.steps) ** 2)

    def update(self, measured: float, penalty: float = 0.0) -> None:
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class FlopsController:
    """Finds the weight that makes the codes cost `target`: dual ascent on its logarithm.

    log(weight) follows the error, log(smoothed cost / goal): `gain` times it, and `rate / steps` times its sum over
    steps (a PI controller: the sum finds the weight, the gain keeps it from overshooting). The goal falls from the
    first cost seen to `target`, geometrically, ever slower, over the first `ramp` of `steps`, and then stays: codes
    that a sudden push has killed come back slowly. The first weight makes the penalty `least`, no weight makes it more
    than `most`, against a loss near 1: a target out of reach, or too few steps, must not drown what the codes are for.
    """

    def __init__(
        self,
        target: float,
        steps: int,
        ramp: float = 0.6,
        rate: float = 20.0,
        gain: float = 2.0,
        smoothing: float = 0.8,
        least: float = 0.02,
        most: float = 10.0,
    ) -> None:
        if target <= 0 or steps < 1 or not 0 < ramp <= 1:
            raise ValueError(f"target={target}, steps={steps}, ramp={ramp}; fix: target > 0, steps >= 1, 0 < ramp <= 1")
        self.target, self.steps, self.ramp = target, steps, ramp
        self.rate, self.gain, self.smoothing, self.least, self.most = rate, gain, smoothing, least, most
        self.step, self.integral, self.error = 0, 0.0, 0.0
        self.first_weight, self.ceiling = 0.0, math.inf  # logarithms
        self.smooth: float | None = None
        self.first = target

    @property
    def weight(self) -> float:
        return math.exp(min(self._wanted, self.ceiling))

    @property
    def _wanted(self) -> float:
        return max(-30.0, self.first_weight + self.integral + self.gain * self.error)

    @property
    def goal(self) -> float:
        """What the codes should cost at this step."""
        left = max(0.0, 1 - self.step / (self.ramp * self.steps)) ** 2
        return self.target * max(1.0, self.first / self.target) ** left

    def update(self, measured: float, penalty: float = 1.0) -> None:
        """`measured`: the cost of this step's codes in the unit of `target`; `penalty`: their F~."""
        cost = math.log(max(measured, self.target * 1e-3))
        if self.smooth is None:
            self.smooth, self.first = cost, math.exp(cost)
            self.first_weight = math.log(self.least / max(penalty, 1e-12))
        self.ceiling = math.log(self.most / max(penalty, 1e-12))
        self.smooth = self.smoothing * self.smooth + (1 - self.smoothing) * cost
        self.error = self.smooth - math.log(self.goal)
        if self.error < 0 or self._wanted < self.ceiling:  # at the ceiling the sum would only run away
            self.integral += self.rate / self.steps * max(-1.0, min(1.0, self.error))
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            k: getattr(self, k) for k in ("step", "integral", "error", "first_weight", "ceiling", "smooth", "first")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


class FlopsRegularizer(nn.Module):
    """weight * F~ of a batch of codes, the weight kept by a schedule: name a cost, `flops` or `nonzeros`, not a weight.

    A call in training mode is a step. It also fits sentence-transformers' `SpladeLoss(document_regularizer=...)`.

        FlopsRegularizer(flops=1.0, steps=2000)        # the controller
        FlopsRegularizer(schedule=QuadraticRamp(30.0, 2000))
    """

    def __init__(
        self,
        flops: float | None = None,
        nonzeros: float | None = None,
        steps: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (flops, nonzeros, schedule)) != 1:
            raise ValueError(
                "give exactly one of flops=, nonzeros=, schedule=; fix: FlopsRegularizer(flops=1, steps=2000)"
            )
        self.counts_nonzeros = nonzeros is not None
        target = nonzeros if nonzeros is not None else flops
        self.schedule: Schedule = schedule if target is None else FlopsController(target, steps)  # type: ignore
        self.measured = math.nan

    def forward(self, codes: Tensor, queries: Tensor | None = None) -> Tensor:
        """A scalar; `codes` (batch, d), `queries` (batch', d) where a second encoder makes them."""
        penalty = flops_penalty(codes, queries)
        if self.training:
            self.measured = self._measure(codes, queries)
            self.schedule.update(self.measured, penalty.item())
        return self.schedule.weight * penalty

    @property
    def progress(self) -> float:
        """The share of the schedule's steps that is over."""
        return self.schedule.step / self.schedule.steps

    def _measure(self, codes: Tensor, queries: Tensor | None) -> float:
        return batch_nonzeros(codes) if self.counts_nonzeros else batch_flops(codes, queries)

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """The name that sentence-transformers calls."""
        return self(embeddings)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        asked = getattr(self.schedule, "target", None)
        return {"nonzeros" if self.counts_nonzeros else "flops": asked, "weight": self.schedule.weight}
