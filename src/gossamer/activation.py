"""What layers of a quantised pipeline hand to each other: an `Activation`, made by an `Epilogue`.

Layouts of N tokens by C channels (`native/bsr_int8/bsr.h`):

- `t`: by blocks of 64 tokens, channel major; the last block is 16, 32 or 64 tokens wide. What 4x1 blocks read.
- `q`: the same with four channels of a token side by side. What 4x4 blocks read.
- `rows`: one token after the other, padded for the kernels. What every kernel reads for a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LAYOUTS = ("t", "q", "rows")
FUNCTIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
BLOCK = 64  # tokens
QUAD_PADDING = 15 * 4 * BLOCK  # bytes after the last quad that may be read, where kernels take 16 at a time
ROW_PADDING = 128  # bytes after the last channel of a row that may be read

Function = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True, eq=False)
class Activation:
    """N x C numbers x = scale * (data - zero): uint8 or int8, or float32 in the layout `t` (scale 1, zero 0).

    `scale` is a float, or float32 [N]: one per token.
    """

    data: Tensor
    layout: str
    tokens: int
    channels: int
    scale: float | Tensor = 1.0
    zero: int = 0

    def dequantise(self) -> Tensor:
        """float32 [tokens, channels], in plain torch."""
        scale = self.scale.unsqueeze(1) if isinstance(self.scale, Tensor) else self.scale
        return (self.matrix().float() - self.zero) * scale

    def matrix(self) -> Tensor:
        """`data` as [tokens, channels], in plain torch."""
        if self.layout == "rows":
            return self.data.view(self.tokens, row_stride(self.channels))[:, : self.channels]
        deep = 4 if self.layout == "q" else 1
        across, parts = -(-self.channels // deep), []
        for begin in range(0, self.tokens, BLOCK):
            wide = width(self.tokens - begin)
            start = begin * across * deep
            block = self.data[start : start + wide * across * deep].view(across, wide, deep)
            parts.append(block.permute(1, 0, 2).reshape(wide, across * deep)[: self.tokens - begin, : self.channels])
        return torch.cat(parts) if parts else self.data.new_empty(0, self.channels)


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of the product: `function(product + bias + residual)`, as `dtype`.

    `dtype` float32 or bfloat16 makes a tensor [tokens, M]; uint8 and int8 an Activation in `layout`, quantised by
    `scale` and `zero`; float32 with the layout `t` an Activation that can be the residual of another layer.
    `residual`: a tensor [tokens, M], float32 or bfloat16, where the output has rows; else a float32 Activation in `t`.
    """

    dtype: torch.dtype = torch.float32
    layout: str = "rows"
    bias: Tensor | None = None
    residual: Tensor | Activation | None = None
    function: Function = "none"
    scale: float = 1.0
    zero: int = 0


def width(left: int) -> int:
    """Tokens that the block has in which `left` tokens begin."""
    return 16 if left <= 16 else 32 if left <= 32 else BLOCK


def row_stride(channels: int) -> int:
    """Bytes of a token in the layout `rows`."""
    return -(-(channels + ROW_PADDING) // 64) * 64


def elements(layout: str, tokens: int, channels: int) -> int:
    """Of the data of an Activation."""
    if layout == "rows":
        return tokens * row_stride(channels)
    whole = tokens // BLOCK * BLOCK
    padded = whole + (width(tokens - whole) if tokens > whole else 0)
    if layout == "t":
        return padded * channels
    return padded * -(-channels // 4) * 4 + (QUAD_PADDING if tokens else 0)
