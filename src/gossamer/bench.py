"""bench(): tokens per second of a compressed language model on this machine, dispatched and dense, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .evaluate import tokens_per_second
from .explain import Explanation
from .nn import sparse_layers
from .prepare import prepare, run_dense


@dataclass(frozen=True)
class Rate:
    """One way to run the model: tokens per second (median), spread (interquartile range / median)."""

    name: str
    tokens_per_second: float
    spread: float
    weight_bytes: int  # of what the sparse layers' kernels read and keep


@dataclass(frozen=True)
class Bench:
    """What `gossamer.bench` returns; the model is left prepared."""

    rates: tuple[Rate, ...]
    explanation: Explanation

    @property
    def ratio(self) -> float:
        """Tokens per second of the prepared model over those of the best dense way."""
        ours, *dense = (rate.tokens_per_second for rate in self.rates)
        return ours / max(dense)


def bench(
    model: nn.Module,
    new_tokens: int = 32,
    prompt: int = 16,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Bench:
    """Greedy decoding, batch 1, with a KV cache: the prepared model, and the same layers dense.

    Dense is torch's own product and, on the CPU, Gossamer's dense kernel, which reads the weight as it is stored; both
    keep a dense copy of every sparse layer while they run. ValueError if the model has no sparse layer.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(1, prompt + 1) % rows
    on_cpu = all(layer.device.type == "cpu" for layer in sparse_layers(model).values())
    rates = []
    for name in ("vendor", "cpu_dense") if on_cpu else ("vendor",):
        if progress:
            progress(f"dense: {name}")
        run_dense(model, name)
        rates.append(_rate(model, f"dense: {name}", ids, new_tokens, repeats))
    if progress:
        progress("preparing")
    explanation = prepare(model)
    if progress:
        progress("dispatched")
    ours = _rate(model, "dispatched", ids, new_tokens, repeats)
    return Bench((ours, *rates), explanation)


def _rate(model: nn.Module, name: str, ids: torch.Tensor, new_tokens: int, repeats: int) -> Rate:
    speed = tokens_per_second(model, ids, new_tokens, repeats)
    layers = sparse_layers(model).values()
    held = sum(p.numel() * p.element_size() for p in {id(p): p for m in layers for p in m.parts()}.values())
    return Rate(name, speed.tokens_per_second, speed.spread, held + sum(m.packed_bytes for m in layers))
