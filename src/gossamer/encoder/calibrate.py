"""Scales of what is quantised before its values are known: queries, keys, values, and what the activation gives."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import texts
from ..formats.bsr_int8 import BsrInt8
from . import reference
from .parts import EncoderError, Layer, Linear, Parts, Scales

log = logging.getLogger("gossamer")

FEW = 1024  # tokens, below which ranges are a guess
BATCH = 16
TOKENS = 128  # of a sentence, at most
SENTENCES = 128  # of Gossamer's own texts
EVEN = 0.75
WORDS = (6, 12, 25, 50, 100)  # of these sentences, in turn


def sentences() -> list[str]:
    """Pieces of 6 to 100 words of the texts that ship with Gossamer."""
    words = [document.split() for document in texts.calibration()]
    return [" ".join(words[i % len(words)][: WORDS[i % len(WORDS)]]) for i in range(SENTENCES)]


def calibrate(
    parts: Parts,
    tokenizer: Any,
    text: Sequence[str] | None = None,
    dense: Mapping[int, nn.Module] | None = None,
) -> Parts:
    """The same with scales from `text` (default: `sentences()`), of which 128 tokens a sentence are used.

    `dense`: the layers that `parts` lacks. Warns where these are fewer than 1,024 tokens; EncoderError for none.
    """
    text = sentences() if text is None else list(text)
    if not text:
        raise EncoderError("no sentence to calibrate on; fix: give a hundred that are like those the model will see")
    seen = [_Seen(parts.heads) for _ in parts.layers]
    tokens = 0
    for start in range(0, len(text), BATCH):
        batch = tokenizer(
            text[start : start + BATCH], padding=True, truncation=True, max_length=min(TOKENS, parts.longest),
            return_tensors="pt",
        )  # fmt: skip
        tokens += int(batch["attention_mask"].sum())
        with torch.inference_mode():
            reference.forward(
                parts, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"), quantised=False,
                observe=lambda what, i, x: seen[i].observe(what, x), dense=dense,
            )  # fmt: skip
    if tokens < FEW:
        log.warning(
            "encoder: calibrated on %d tokens of %d sentence(s), so that values beyond their range will be cut off; "
            "fix: give a hundred sentences",
            tokens,
            len(text),
        )
    layers = (layer and s.calibrated(layer) for s, layer in zip(seen, parts.layers, strict=True))
    return replace(parts, layers=tuple(layers))


class _Seen:
    """Of one layer."""

    def __init__(self, heads: int) -> None:
        self.heads, self.most = heads, dict[str, Tensor]()

    def observe(self, what: str, x: Tensor) -> None:
        """x [tokens, channels]."""
        most = x.abs().amax(0)
        self.most[what] = torch.maximum(self.most.get(what, most), most)

    def calibrated(self, layer: Layer) -> Layer:
        head = {what: _step(self.most[what].unflatten(0, (self.heads, -1)).amax(1)) for what in ("query", "key")}
        scales = Scales(head["query"], head["key"], _step(self.most["value"]))
        qkv, up = (evened(linear, self.most[what]) for linear, what in ((layer.qkv, "x"), (layer.up, "middle")))
        return replace(layer, qkv=qkv, up=up, scales=scales)


def evened(linear: Linear, most: Tensor) -> Linear:
    """The same product, its input's channels made more alike: `most` [K] is the largest magnitude of each.

    What the input is divided by the weight is multiplied by, and rounded to int8 again; the share of the spread that
    moves is EVEN, as in SmoothQuant (arXiv 2211.10438, equation 4).
    """
    weight = linear.weight.decode(torch.float32)
    columns = weight.abs().amax(0)
    columns = torch.where(columns > 0, columns, columns.amax().clamp_min(1e-12))
    divisor = most.clamp_min(1e-5) ** EVEN / columns ** (1 - EVEN)
    divisor /= divisor.log().mean().exp()
    return Linear(BsrInt8.encode(weight * divisor, linear.weight.block), linear.bias, 1 / divisor)


def _step(most: Tensor) -> Tensor:
    return (most / 127).clamp_min(1e-12)
