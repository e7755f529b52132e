"""`gossamer explain` and `gossamer bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..show import columns, console, size
from . import app
from .choices import prepared
from .use import Device, Dtype

Folder = Annotated[str, typer.Argument(help="Gossamer folder.")]
Lock = Annotated[Path | None, typer.Option(help="File with timings; default: one per machine in the cache folder.")]


@app.command()
def explain(
    model: Folder,
    measure: Annotated[bool, typer.Option("--measure", help="Time what was never timed on this machine.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Time everything anew.")] = False,
    dense_memory: Annotated[float | None, typer.Option(help="MB that dense copies may take; default: half.")] = None,
    lock: Lock = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Which kernel runs each layer at every size, and how it compares with dense."""
    from ..explain import explain as tell
    from ..hub.source import open_model

    live, _ = open_model(model, dtype, device)
    if measure or again:
        found = prepared(live, dense_memory, lock, again)
    else:
        found = tell(live, lock=lock)
    if not found.rows:
        raise ValueError(f"{model} has no sparse layer; fix: make one with gossamer compress")
    console.print(str(found), markup=False, highlight=False)


@app.command()
def bench(
    model: Folder,
    tokens: Annotated[int, typer.Option(help="New tokens per run.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs, of which the median is shown.")] = 3,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Tokens per second on this machine: the fastest kernel per layer, against the same layers dense."""
    from ..bench import bench as measure
    from ..hub.source import open_model

    live, _ = open_model(model, dtype, device)
    with console.status("") as status:
        found = measure(live, tokens, repeats=repeats, progress=lambda what: status.update(what))
    table = columns("way", "tokens/s", "spread", "weights")
    for rate in found.rates:
        speed = f"{rate.tokens_per_second:.1f}"
        table.add_row(rate.name, speed, f"{rate.spread:.0%}", size(rate.weight_bytes))
    console.print(table)
    console.print(f"dispatched / best dense: {found.ratio:.2f}")
    console.print(str(found.explanation), markup=False, highlight=False)
