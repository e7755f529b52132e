"""Transformer encoders on int8 and CPUs, block-sparse where their weights are: one native call from ids to states.

    encoder = gossamer.encoder.convert(model, tokenizer)   # BertModel, RobertaModel, DistilBertModel
    hidden = encoder(**tokenizer(sentences, padding=True, return_tensors="pt")).last_hidden_state
    encoder.save("folder", tokenizer)
    encoder = gossamer.load("folder")

Source: arXiv 2306.16601, sections 3 and 4; docs/encoder.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .calibrate import calibrate as _calibrate
from .files import load
from .module import Encoder
from .parts import EncoderError, Parts
from .translate import layers_of, pooler_of
from .translate import translate as _translate

__all__ = ["Encoder", "EncoderError", "Parts", "convert", "load"]


def convert(model: nn.Module, tokenizer: Any, sentences: Sequence[str] | None = None) -> Encoder:
    """An encoder with the weights of `model`, as they are: zeros in blocks of 4x1 or 4x4 cost nothing.

    Linear layers may be `nn.Linear` or `SparseLinear`; their weights become int8 with a scale per row, unless they are
    `bsr_int8` already. `sentences` like those that it will see set the ranges of activations; without any, texts that
    ship with Gossamer do. A layer that is not what the model's kind prescribes is named in a warning and left dense.
    EncoderError for models that are no such encoder.
    """
    parts = _translate(model)
    dense = {i: layer for i, layer in enumerate(layers_of(model)) if parts.layers[i] is None}
    return Encoder(_calibrate(parts, tokenizer, sentences, dense), model.config, pooler_of(model), dense)
