"""`gossamer doctor` and `gossamer demo`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..show import console
from . import app


@app.command()
def doctor() -> None:
    """What is installed, what can run here, and what is missing."""
    from ..doctor import report

    table = Table(box=None, show_header=False, pad_edge=False)
    for check in report():
        text = check.detail + (f"\nfix: {check.fix}" if check.fix else "")
        table.add_row("[green]yes[/]" if check.ok else "[red]no[/]", check.name, Text(text))
    console.print(table)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Any model, not SmolLM2-135M: folder, hub id, GGUF.")] = None,
    ratio: Annotated[float, typer.Option(help="Compression ratio: 0.2 stores 20 % fewer bytes.")] = 0.2,
    quick: Annotated[bool, typer.Option("--quick", help="Two short windows of everything: the plumbing only.")] = False,
) -> None:
    """Compress a real model three ways, and measure size, perplexity and speed. Under 10 minutes on 2 cores."""
    from ..demo import run

    run(model, ratio, quick=quick, console=console)
