"""`gossamer eval`, `gossamer export` and `gossamer generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..show import bars, columns, console
from . import app
from .shrink import read_text

Model = Annotated[str, typer.Argument(help="Gossamer folder, or any dense model: folder, hub id, GGUF.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="Load the model as auto, float32, bfloat16 ...")]


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Text file; default: the start of the WikiText-2 test set.")] = None,
    wikitext: Annotated[bool, typer.Option("--wikitext", help="Join the lines as published figures do.")] = False,
    windows: Annotated[int | None, typer.Option(help="Windows to read; default: as many as the text has.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks instead, separated by commas.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Token-level perplexity on a text, or lm-eval tasks."""
    from ..hub import lm_eval

    if tasks:
        lm_eval.check_installed()
    content = None if tasks else _evaluation_text(text, wikitext)
    from ..hub.source import open_model

    live, tokenizer = open_model(model, dtype, device)
    if content is None:
        _print_tasks(lm_eval.evaluate(live, tokenizer, (tasks or "").split(",")))
    else:
        _print_perplexity(live, tokenizer, content, window, windows)


def _evaluation_text(path: Path | None, wikitext: bool) -> str:
    from .. import texts

    if path is None:
        return texts.evaluation()
    return texts.join_wikitext(read_text(path)) if wikitext else read_text(path)


def _print_perplexity(model: Any, tokenizer: Any, text: str, window: int, windows: int | None) -> None:
    from ..evaluate import encode_text, perplexity

    ids = encode_text(tokenizer, text)
    with bars() as progress:
        bar = progress.add_task("windows", total=None)
        found = perplexity(
            model, ids, window, windows, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    console.print(f"perplexity {found.value:.3f} (token-level, {found.tokens:,} tokens in windows of {window:,})")


def _print_tasks(results: dict[str, dict[str, float]]) -> None:
    table = columns("task", "metric", "value", left=2)
    for task, metrics in results.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4f}")
    console.print(table)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Gossamer folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the dense model.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in a folder that has one.")] = False,
) -> None:
    """Write a plain dense checkpoint that loads anywhere, without Gossamer."""
    from ..checkpoint import export as write

    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} exists and is not empty; fix: choose another folder, or pass --overwrite")
    write(folder, out, overwrite=overwrite)
    console.print(f"Dense checkpoint written to {out}.")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    device: Device = None,
    dtype: Dtype = "auto",
    prepare: Annotated[bool, typer.Option(help="Choose the fastest kernels first; timed once per machine.")] = True,
) -> None:
    """Continue a prompt."""
    from ..generate import complete
    from ..hub.source import open_model
    from ..nn import sparse_layers
    from .choices import prepared

    live, tokenizer = open_model(model, dtype, device)
    if prepare and sparse_layers(live):
        prepared(live)
    console.print(prompt + complete(live, tokenizer, prompt, tokens, temperature), markup=False, highlight=False)
