"""What a user sees while waiting and at the end: progress bars and tables, by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
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


def columns(*titles: str, left: int = 1) -> Table:
    """An empty table; the first `left` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for i, name in enumerate(titles):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


def plan_table(plan: Plan) -> Group:
    """Bytes before and after per type of layer, and in all."""
    table, shared = columns("layer", "method", "count", "shape", "ratio", "before", "after", left=2), False
    for r in plan.rows():
        # A terminal has 80 columns, and the way to the block is the same for all.
        name, shape = r["layer"].rpartition(".*.")[2], " x ".join(map(str, r["shape"]))
        before, after = r["dense_bytes"], r["stored_bytes"]
        shared |= after > before
        table.add_row(name, r["method"], str(r["count"]), shape, f"{r['ratio']:.4f}", size(before), size(after))
    table.add_section()
    total, stored = size(plan.dense_bytes), size(plan.stored_bytes)
    table.add_row("all of them", "", str(len(plan.layers)), "", f"{plan.ratio:.4f}", total, stored, style="bold")
    note = ["What layers share, a dictionary, is counted with the first of them."] if shared else []
    return Group(table, *note)


def choice_table(choice: Choice) -> Table:
    """What every method lost in the trial, and rounding beside them; the method chosen is marked."""
    blocks = ", ".join(name.rpartition(".")[2] for name in choice.blocks)
    table = columns(f"tried on blocks {blocks}", "output energy lost", "ratio")
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
