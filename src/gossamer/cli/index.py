"""`gossamer index build | search | stats | bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..show import bars, console, size
from .writing import writing

if TYPE_CHECKING:
    from ..retrieval.index import Hits

app = typer.Typer(no_args_is_help=True, help="Search sparse embeddings by inner product.")

IndexPath = Annotated[Path, typer.Argument(help="Index file.", metavar="INDEX")]
Queries = Annotated[Path, typer.Argument(help="Queries: a CSR matrix, .npz as scipy.sparse.save_npz writes it.")]
Threads = Annotated[int, typer.Option(help="0: all cores.")]
K = Annotated[int, typer.Option("-k", help="Results per query.")]
Recall = Annotated[float | None, typer.Option(help="0.99 finds 99 % of the true results; default: exact.")]


@app.command()
def build(
    docs: Annotated[Path, typer.Argument(help="Documents: a CSR matrix, .npz as scipy.sparse.save_npz writes it.")],
    index: IndexPath,
    ids: Annotated[Path | None, typer.Option(help=".npy of int64 ids; default: 0, 1, 2 ...")] = None,
    exact: Annotated[
        bool, typer.Option(help="Keep exact values; without them half the size, approximate only.")
    ] = True,
    group: Annotated[
        bool, typer.Option("--group", help="Like documents side by side if that pays; a minute a million documents.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    threads: Threads = 0,
) -> None:
    """Index documents into one file."""
    from ..retrieval.files import read_ids, read_rows
    from ..retrieval.index import SparseIndex

    if index.exists() and not overwrite:
        raise FileExistsError(f"{index} exists already: pass --overwrite to replace it")
    rows = read_rows(docs)
    own = None if ids is None else read_ids(ids)
    with writing(index), bars() as progress:
        bar = progress.add_task("documents", total=len(rows))
        built = SparseIndex.build(
            rows, ids=own, values=exact, threads=threads, progress=lambda n: progress.update(bar, completed=n)
        )
        if group and exact:
            built.group(recall=0.99, threads=threads)
        built.save(index, overwrite=overwrite, threads=threads)
    console.print(f"{len(built):,} documents, {size(index.stat().st_size)} in {index}", highlight=False)


@app.command()
def search(
    index: IndexPath,
    queries: Queries,
    k: K = 10,
    recall: Recall = None,
    threads: Threads = 0,
    out: Annotated[Path | None, typer.Option(help="Write scores and ids to this .npz instead of printing.")] = None,
) -> None:
    """The best documents of each query."""
    import numpy as np

    from ..retrieval.files import read_rows
    from ..retrieval.index import SparseIndex

    hits = SparseIndex.open(index).search(read_rows(queries), k, recall=recall, threads=threads)
    if out is None:
        _print_hits(hits)
    else:
        with writing(out):
            np.savez(out, scores=hits.scores, ids=hits.ids)


def _print_hits(hits: Hits) -> None:
    for number, (scores, ids) in enumerate(zip(*hits, strict=True)):
        found = "  ".join(f"{i}:{s:.6g}" for s, i in zip(scores, ids, strict=True) if i >= 0)
        typer.echo(f"{number}\t{found}")


@app.command()
def stats(index: IndexPath) -> None:
    """What an index holds, what a query costs, how evenly its columns are used."""
    from ..retrieval.index import SparseIndex

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in SparseIndex.open(index).stats().items():
        shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)


@app.command()
def bench(
    index: IndexPath,
    queries: Queries,
    k: K = 10,
    threads: Threads = 1,
    load: Annotated[bool, typer.Option(help="Read the index into memory first.")] = True,
) -> None:
    """Microseconds a query, exact and at several recalls: calibrated on half of the queries, timed on the rest."""
    import numpy as np

    from ..retrieval.files import read_rows
    from ..retrieval.index import SparseIndex
    from ..retrieval.rows import Rows
    from ..retrieval.tuning import pick, recall, timed

    opened, rows = SparseIndex.open(index, load=load), read_rows(queries)
    middle = len(rows) // 2
    cut = int(rows.starts[middle])
    half = Rows(rows.starts[: middle + 1], rows.columns[:cut], rows.values[:cut], rows.dim)
    rest = Rows(rows.starts[middle:] - cut, rows.columns[cut:], rows.values[cut:], rows.dim)
    table = Table("recall asked", "recall", "µs a query", box=None, pad_edge=False)
    truth = opened.search(rest, k, threads=threads).ids
    settings = opened.calibrate(half, k, threads=threads)
    for asked in (None, 0.999, 0.99, 0.95, 0.9):
        setting = None if asked is None else pick(settings, asked)
        runs = [timed(opened, rest, k, setting, threads) for _ in range(3)]
        found, seconds = runs[0][0], float(np.min([s for _, s in runs]))
        label = "exact" if asked is None else f"{asked}"
        table.add_row(label, f"{recall(found.ids, truth):.4f}", f"{seconds * 1e6:.1f}")
    console.print(table)
