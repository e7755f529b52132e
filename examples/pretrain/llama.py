"""A Llama over bytes: RMSNorm, rotary positions, SwiGLU, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


@dataclass(frozen=True)
class Shape:
    layers: int = 6
    heads: int = 6
    width: int = 384
    hidden: int = 1024
    context: int = 256


SHAPES = {
    "tiny": Shape(2, 2, 32, 64, 32),
    "10m": Shape(),
    "124m": Shape(12, 12, 768, 3456, 1024),
    "wide": Shape(4, 16, 2048, 8192, 1024),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(shape.width, 1e-6), nn.RMSNorm(shape.width, 1e-6)
        self.attention, self.mlp = Attention(shape), MLP(shape)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, 1e-6)
        self.register_buffer("turn", turns(shape), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # the last layer of each branch starts smaller, as in GPT-2
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * shape.layers) ** 0.5 if deep else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, self.turn[:, : x.shape[1]])
        return F.linear(self.norm(h), self.embed.weight)


def turns(shape: Shape) -> Tensor:
    """Cosines and sines [2, T, head / 2] of the rotary positions."""
    half = shape.width // shape.heads // 2
    angles = torch.outer(torch.arange(shape.context), 10000.0 ** (-torch.arange(half) / half))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = turn.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
