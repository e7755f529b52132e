"""What a user sees while waiting and at the end: progress bars and tables, by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from .choose import Choice
    from .plan import Plan
    from .progress import Progress as Step

console = Console()


def size(nbytes: float) -> str:
    """Bytes in decimal units, as file managers and model cards give them."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def columns(*titles: str, left: int = 1, title: str | None = None) -> Table:
    """An empty table; the first `left` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(titles):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def plan_table(plan: Plan) -> Table:
    """Bytes before and after per type of layer, and in all."""
    table = columns("layer", "method", "count", "shape", "ratio", "before", "after", left=2)
    for r in plan.rows():
        shape, ratio = " x ".join(map(str, r["shape"])), 1 - r["stored_bytes"] / r["dense_bytes"]
        before, after = size(r["dense_bytes"]), size(r["stored_bytes"])
        # A terminal has 80 columns, and the way to the block is the same for all.
        name = r["layer"].rpartition(".*.")[2]
        table.add_row(name, r["method"], str(r["count"]), shape, f"{ratio:.4f}", before, after)
    table.add_section()
    total, stored = size(plan.dense_bytes), size(plan.stored_bytes)
    table.add_row("all block linears", "", str(len(plan.layers)), "", f"{plan.ratio:.4f}", total, stored, style="bold")
    return table


def choice_table(choice: Choice) -> Table:
    """What every method lost in the trial, and rounding beside them; the method chosen is marked."""
    table = columns("", "output energy lost", "ratio", title=f"Tried on {', '.join(choice.blocks)}")
    for t in choice.trials:
        lost = "out of reach" if t.error == float("inf") else f"{t.error:.3%}"
        mark = " <- chosen" if t.method == choice.method else ""
        table.add_row(t.method + mark, lost, f"{t.ratio:.3f}" if mark or lost[0] != "o" else "")
    table.add_section()
    for t in choice.rounding:
        table.add_row(f"{t.method} rounding, for comparison", f"{t.error:.3%}", f"{t.ratio:.3f}")
    return table


@contextmanager
def follow() -> Iterator[Callable[[Step], None]]:
    """What `compress` takes as `progress`: one bar per stage, and the time left for the whole run."""
    with Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def step(p: Step) -> None:
            if p.stage not in tasks:
                tasks[p.stage] = progress.add_task(p.stage, total=p.total, note="")
            left = f"  {duration(p.seconds_left)} left" if p.seconds_left is not None and p.done < p.total else ""
            progress.update(tasks[p.stage], completed=p.done, total=p.total, note=p.layer + left)

        yield step


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars with the time left, on stderr, gone when done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        yield progress
