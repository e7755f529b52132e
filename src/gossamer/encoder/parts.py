"""What an encoder is made of: weights in `bsr_int8`, the float32 and bfloat16 rest, and calibrated scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.bsr_int8 import BsrInt8


class EncoderError(ValueError):
    """What cannot be an encoder, or cannot run; says which part and what to do."""


@dataclass(frozen=True)
class Linear:
    """y = (x * `factors`) `weight`^T + `bias`, both float32, [K] and [M]; x * factors is what is rounded.

    Factors even out the channels of x, so that a few large ones do not cost the others their digits.
    """

    weight: BsrInt8
    bias: Tensor
    factors: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """Layer normalisation: weight and bias float32 [hidden]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Scales:
    """Calibrated: one step of int8 of queries and keys (float32 [heads]) and of values ([hidden])."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Layer:
    """x = norm(x + out(attention(qkv(x)))); x = norm(x + down(function(up(x)))). Rows of qkv: queries, keys, values."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    attention_norm: Norm
    output_norm: Norm
    function: str
    scales: Scales | None = None

    def linears(self) -> dict[str, Linear]:
        return {"qkv": self.qkv, "out": self.out, "up": self.up, "down": self.down}


@dataclass(frozen=True)
class Parts:
    """An encoder. `words`, `positions`, `types`: bfloat16 [rows, hidden]; a layer that is None runs as torch's.

    `pad`: where positions count only the tokens that are not this one (RoBERTa), from pad + 1 on; else None.
    """

    heads: int
    words: Tensor
    positions: Tensor
    types: Tensor
    norm: Norm
    pad: int | None
    layers: tuple[Layer | None, ...]

    @property
    def hidden(self) -> int:
        return self.words.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sentence that the table of positions has room for."""
        return self.positions.shape[0] - (0 if self.pad is None else self.pad + 1)

    @property
    def intermediate(self) -> int:
        return max((layer.up.weight.shape[0] for layer in self.int8()), default=0)

    def int8(self) -> Iterator[Layer]:
        """The layers that are not left dense."""
        return (layer for layer in self.layers if layer is not None)

    @property
    def sparsity(self) -> float:
        """Share of the weights of all int8 layers that no stored block covers."""
        weights = [linear.weight for layer in self.int8() for linear in layer.linears().values()]
        covered = sum(w.weight.numel() for w in weights)
        return 1 - covered / max(1, sum(w.shape[0] * w.shape[1] for w in weights))


LOOSE = 1.1  # so many more weights may 4x4 blocks cover than 4x1 blocks, and still be the faster


def encode(weight: Tensor) -> BsrInt8:
    """float32 [M, K] in the blocks that suit it: 4x4 where it is dense, or pruned in such blocks, else 4x1.

    FormatError for NaN and Inf.
    """
    used = _used(weight)
    covered = int(used.sum())
    quads = 4 * int(torch.nn.functional.pad(used, (0, -used.shape[1] % 4)).unflatten(1, (-1, 4)).any(2).sum())
    return BsrInt8.encode(weight, (4, 4) if quads <= LOOSE * covered else (4, 1))


def _used(weight: Tensor) -> Tensor:
    """Which 4x1 blocks have a weight that is not zero: bool [ceil(M / 4), K]."""
    whole = torch.nn.functional.pad(weight != 0, (0, 0, 0, -weight.shape[0] % 4))
    return whole.unflatten(0, (-1, 4)).any(1)
