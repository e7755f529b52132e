"""`gossamer.prepare` with a progress bar, for the commands that run or explain a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..show import bars


def prepared(model: Any, dense_memory: float | None = None, lock: Path | None = None, again: bool = False) -> Any:
    """The explanation of what was chosen. `dense_memory`: megabytes."""
    from ..prepare import prepare

    with bars() as progress:
        bar = progress.add_task("timing kernels", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"timing {what}" if what else "timed")

        room = None if dense_memory is None else dense_memory * 1e6
        return prepare(model, dense_memory=room, lock=lock, again=again, progress=show)
