"""Texts or token ids -> the windows of tokens to calibrate on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from .stats import CalibrationError
from .work import raw


@dataclass(frozen=True, eq=False)
class Calibration:
    """`ids` int64 [samples, length]: windows of tokens."""

    ids: Tensor

    @classmethod
    def of(cls, data: Any, tokenizer: Any = None, samples: int = 256, length: int = 1024) -> Self:
        """The first `samples` x `length` tokens of texts or token ids, packed end to end without separators.

        `data`: a text or an iterable of texts (needs `tokenizer`), an iterable of token-id lists or 1-D tensors, or a
        2-D tensor, which is taken as it is. CalibrationError if there are too few tokens.
        """
        if isinstance(data, cls):
            return data
        if isinstance(data, Tensor) and data.ndim == 2:
            if data.numel() == 0 or data.is_floating_point():
                raise CalibrationError(
                    f"calibration ids are {tuple(data.shape)} {data.dtype}, not [samples, length] int"
                )
            return cls(data.to("cpu", torch.int64))
        if min(samples, length) < 1:
            raise CalibrationError(f"calibration needs samples and length of at least 1, not {samples} and {length}")
        pieces = [data] if isinstance(data, str | Tensor) else data
        found = _take((_ids(piece, tokenizer) for piece in pieces), samples * length)
        _check_enough(found.numel(), samples, length)
        return cls(found.view(samples, length))

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def digest(self) -> str:
        return hashlib.sha256(f"{tuple(self.ids.shape)}".encode() + raw(self.ids)).hexdigest()

    def check(self, model: nn.Module) -> None:
        """CalibrationError for ids that the model has no embedding for, or windows longer than it can read."""
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        vocabulary = getattr(embedding, "num_embeddings", None)
        if int(self.ids.min()) < 0 or (vocabulary and int(self.ids.max()) >= vocabulary):
            raise CalibrationError(
                f"calibration ids go from {int(self.ids.min())} to {int(self.ids.max())}, the model knows 0 to "
                f"{vocabulary and vocabulary - 1}; fix: use the model's own tokenizer"
            )
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(longest, int) and self.ids.shape[1] > longest:
            raise CalibrationError(
                f"calibration windows have {self.ids.shape[1]} tokens, the model reads at most {longest}; "
                f"fix: a length of {longest} or less"
            )


def _ids(piece: Any, tokenizer: Any) -> Tensor:
    if not isinstance(piece, str):
        try:
            found = torch.as_tensor(piece)
        except (RuntimeError, TypeError, ValueError) as e:
            raise CalibrationError(
                f"calibration data holds a {type(piece).__name__}; fix: pass texts or token ids, such as "
                "[row['text'] for row in data]"
            ) from e
        if found.is_floating_point() and found.numel():
            raise CalibrationError(f"calibration ids are {found.dtype}, not integers; fix: pass texts or token ids")
        return found.to("cpu", torch.int64).flatten()
    if tokenizer is None:
        raise CalibrationError("calibration by text needs the model's tokenizer; fix: pass tokenizer=, or token ids")
    return torch.tensor(tokenizer(piece, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _take(pieces: Iterable[Tensor], count: int) -> Tensor:
    """The first `count` tokens, or all there are; reads no more pieces than it needs."""
    taken, total = [torch.empty(0, dtype=torch.int64)], 0
    for piece in pieces:
        taken.append(piece)
        total += piece.numel()
        if total >= count:
            break
    return torch.cat(taken)[:count]


def _check_enough(found: int, samples: int, length: int) -> None:
    if found == 0:
        raise CalibrationError("the calibration text is empty; fix: give a text of some thousand words or more")
    if found < samples * length:
        fix = f"{found // length} samples" if found >= length else f"1 sample of length {found}"
        raise CalibrationError(
            f"the calibration text has {found} tokens, {samples} windows of {length} take {samples * length}; "
            f"fix: give a longer text, or ask for {fix}"
        )
