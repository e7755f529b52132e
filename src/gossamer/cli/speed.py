"""`gossamer explain` and `gossamer bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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
    target: Annotated[str | None, typer.Option(help="cpu: how to serve an encoder, sparse against dense.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="With --target: milliseconds that 99 % of calls may take.")
    ] = None,
) -> None:
    """Tokens per second on this machine: the fastest kernel per layer, against the same layers dense.

    With --target cpu: the instances x cores x batch that give an encoder the most sentences per second, each of
    --tokens tokens.
    """
    if target is not None:
        return _serving(model, tokens, limit, target)
    from ..bench import bench as measure
    from ..hub.source import open_model

    live, _ = open_model(model, dtype, device)
    with _told() as tell:
        found = measure(live, tokens, repeats=repeats, progress=tell)
    table = columns("way", "tokens/s", "spread", "weights")
    for rate in found.rates:
        speed = f"{rate.tokens_per_second:.1f}"
        table.add_row(rate.name, speed, f"{rate.spread:.0%}", size(rate.weight_bytes))
    console.print(table)
    console.print(f"dispatched / best dense: {found.ratio:.2f}")
    console.print(str(found.explanation), markup=False, highlight=False)


@contextmanager
def _told() -> Iterator[Callable[[str], None]]:
    """Takes what is being measured: shown in place on a terminal, else as a line each on stderr."""
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda what: typer.echo(what, err=True)


def _serving(folder: str, tokens: int, limit: float | None, target: str) -> None:
    from ..encoder.serving import WAYS, tune

    if target != "cpu":
        raise ValueError(f"there is no target '{target}'; fix: --target cpu")
    with TemporaryDirectory() as room, _told() as tell:
        encoder = _encoder(folder, Path(room) / "encoder")
        found = tune(encoder, tokens, limit, progress=tell)
    table = columns("way", "instances x cores", "batch", "sentences/s", "p50 ms", "p99 ms")
    for way in WAYS:
        if best := found.best(way):
            rate, shape = f"{best.sentences_per_second:.1f}", f"{best.instances} x {best.cores}"
            table.add_row(way, shape, str(best.batch), rate, f"{best.p50:.2f}", f"{best.p99:.2f}")
        else:
            table.add_row(way, "none in time", "", "", "", "")
    console.print(table)
    for way in WAYS[1:]:
        if ratio := found.ratio(way):
            console.print(f"sparse / {way}: {ratio:.2f}")


def _encoder(folder: str, room: Path) -> Path:
    """`folder` if an encoder lies in it; else what becomes of its model, dense or compressed, in `room`."""
    from ..encoder import convert
    from ..encoder.files import is_encoder
    from ..hub.source import open_model

    if is_encoder(folder):
        return Path(folder)
    live, tokenizer = open_model(folder)
    convert(live, tokenizer).save(room)
    return room
