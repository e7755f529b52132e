"""When the layers are dense and when 2:4: a dense start, the sparse phase, a dense tail."""

from __future__ import annotations

from dataclasses import dataclass

from .method import Method, check_share


@dataclass(frozen=True)
class Schedule:
    """Of `steps`, [begin, end) are 2:4, the others dense; end None: until the run stops; steps None: not known."""

    steps: int | None = None
    begin: int = 0
    end: int | None = None

    def dense(self, step: int) -> bool:
        return step < self.begin or (self.end is not None and step >= self.end)

    @property
    def ends_dense(self) -> bool:
        return self.end is not None


def schedule(method: Method, steps: int | None, dense_start: float) -> Schedule:
    """The schedule of a run of `steps` optimizer steps; ValueError where shares are asked of an unknown number."""
    check_share("dense_start", dense_start)
    if dense_start + method.dense_tail >= 1:
        raise ValueError(
            f"dense_start={dense_start} and dense_tail={method.dense_tail} leave no sparse step; fix: less of both"
        )
    if steps is None:
        if dense_start or method.dense_tail:
            raise ValueError(
                f"{method.name} with dense_tail={method.dense_tail:.3g} and dense_start={dense_start:.3g} needs the "
                "number of optimizer steps; fix: sparsify(..., steps=N), or dense_tail=0"
            )
        return Schedule()
    if steps < 1:
        raise ValueError(f"steps={steps}; fix: the number of optimizer steps of the whole run")
    end = round(steps * (1 - method.dense_tail)) if method.dense_tail else None
    return Schedule(steps, round(steps * dense_start), end)
