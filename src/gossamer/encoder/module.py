"""Encoder: a drop-in for the base model of transformers, on int8 and the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pack import build, pack
from .parts import EncoderError, Parts
from .reference import run_dense

POOLED = ("bert", "roberta", "xlm-roberta", "camembert")  # whose output has a place for what the pooler gives


class Encoder(nn.Module):
    """BertModel, RobertaModel or DistilBertModel for inference on a CPU: the same inputs, the same output types.

    Tokens that the attention mask leaves out are skipped: they cost nothing, and their hidden states are zeros, also
    where a whole row is padding. Threads may call it at the same time; `torch.set_num_threads` counts.
    """

    def __init__(
        self,
        parts: Parts,
        config: Any,
        pooler: tuple[Tensor, Tensor] | None = None,
        dense: Mapping[int, nn.Module] | None = None,
        arrays: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`pooler`: weight and bias; `dense`: the layers that `parts` lacks; `arrays`: what `pack(parts)` gave.

        EncoderError where scales or dense layers are missing.
        """
        super().__init__()
        self.parts, self.config, self.pooler_parts = parts, config, pooler
        self.dense = nn.ModuleDict({str(i): layer for i, layer in (dense or {}).items()}).eval()
        self._arrays = pack(parts) if arrays is None else arrays
        self._runs = _runs(parts, self._arrays)
        self.times: Tensor | None = None  # float64, one per stage: seconds of the first thread are added to it

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`input_ids` [sentences, length], integers; the others alike, the mask 0 and 1.

        IndexError for ids that the tables do not have, EncoderError for sequences that are too long and for what the
        int8 pipeline cannot give (attentions, hidden states of every layer).
        """
        _refuse(kwargs)
        ids, mask, types, positions = self._inputs(input_ids, attention_mask, token_type_ids, position_ids)
        with torch.no_grad():
            hidden = self.hidden_states(ids, mask, types, positions)
        return self._output(hidden, return_dict)

    def hidden_states(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, positions: Tensor | None) -> Tensor:
        """float32 [sentences, length, hidden] of checked int64 inputs."""
        x: Tensor | None = None
        for first, last, run in self._runs:
            if run is not None:
                x = self._run(run, ids, mask, types, positions, x)
                continue
            assert x is not None
            for i in range(first, last):
                x = run_dense(self.dense[str(i)], x, mask)
        assert x is not None
        return x if self._runs[-1][2] is not None or mask is None else x * mask.unsqueeze(-1)

    def _run(self, run: Any, ids: Tensor, mask, types, positions, x: Tensor | None) -> Tensor:
        out = torch.empty(*ids.shape, self.parts.hidden)
        if out.numel():
            run.run(
                *ids.shape, _at(mask), 0 if x is not None else ids.data_ptr(), _at(types), _at(positions), _at(x),
                out.data_ptr(), torch.get_num_threads(), _at(self.times),
            )  # fmt: skip
        return out

    def _inputs(self, ids: Tensor | None, *others: Tensor | None) -> tuple[Tensor, ...]:
        """All as int64 [sentences, length]; of the others those that are given."""
        if ids is None or ids.dim() != 2 or ids.is_floating_point() or ids.device.type != "cpu":
            found = None if ids is None else f"{ids.dtype} {tuple(ids.shape)} on {ids.device}"
            raise EncoderError(
                f"input_ids are integers [sentences, length] on the CPU, not {found}; fix: give a tokenizer's output"
            )
        if ids.shape[1] > self.parts.longest and others[-1] is None:
            raise EncoderError(
                f"a sequence of {ids.shape[1]} tokens is longer than the {self.parts.longest} that the model has "
                "positions for; fix: tokenizer(..., truncation=True)"
            )
        names = ("attention_mask", "token_type_ids", "position_ids")
        return _whole(ids), *(_like(ids, t, name) for t, name in zip(others, names, strict=True))  # type: ignore[return-value]

    def _output(self, hidden: Tensor, return_dict: bool | None) -> Any:
        from transformers import modeling_outputs as outputs

        pooled = None
        if self.pooler_parts is not None and hidden.shape[1]:
            pooled = torch.tanh(F.linear(hidden[:, 0], *self.pooler_parts))
        if self.config.model_type in POOLED:
            found = outputs.BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)
        else:
            found = outputs.BaseModelOutput(last_hidden_state=hidden)
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return found if wanted else found.to_tuple()

    def save(self, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> None:
        """Write the encoder, and the tokenizer if given; `gossamer.load(folder)` reads it."""
        from .files import save

        save(self, folder, tokenizer, overwrite=overwrite)

    def extra_repr(self) -> str:
        parts = self.parts
        left = f", {len(self.dense)} left dense" if len(self.dense) else ""
        return f"{len(parts.layers)} layers of {parts.hidden}, sparsity {parts.sparsity:.0%}{left}"


def _runs(parts: Parts, arrays: Mapping[str, Tensor]) -> list[tuple[int, int, Any]]:
    """(first layer, one past the last, pipeline or None): layers that run in one call, or as torch modules.

    A pipeline comes first in any case, for the embeddings.
    """
    dense = [layer is None for layer in parts.layers]
    cuts = [0, *(i for i in range(1, len(dense)) if dense[i] != dense[i - 1]), len(dense)]
    runs = [(a, b, None if dense[a] else build(parts, arrays, a, b)) for a, b in itertools.pairwise(cuts)]
    return [(0, 0, build(parts, arrays, 0, 0)), *runs] if dense[0] else runs


def _refuse(kwargs: Mapping[str, Any]) -> None:
    if wanted := [name for name, value in kwargs.items() if value is not None and value is not False]:
        raise EncoderError(
            f"{wanted[0]} is more than the int8 pipeline takes or gives; fix: leave it out, or run the dense model"
        )


def _like(ids: Tensor, t: Tensor | None, name: str) -> Tensor | None:
    if t is None:
        return None
    if name == "position_ids" and t.dim() == 2 and t.shape[0] == 1:
        t = t.expand(ids.shape)
    if t.shape != ids.shape:
        raise EncoderError(f"{name} has the shape {tuple(t.shape)}, not that of input_ids, {tuple(ids.shape)}")
    return _whole(t)


def _whole(t: Tensor) -> Tensor:
    return t.to(torch.int64).contiguous()


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
