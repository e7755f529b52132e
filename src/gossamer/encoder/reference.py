"""The encoder in plain torch, float32: with every rounding that the int8 pipeline does (the oracle), or with none.

Sums of products of int8 are exact here as there up to float32's 24 bits; only the order of what follows differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import EncoderError, Layer, Linear, Norm, Parts, Scales

Observer = Callable[[str, int, Tensor], None]  # what (x, query, key, value, middle), layer, values

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# The least value of each function, found where its derivative is zero, rounded down.
LEAST = {"gelu": -0.16998, "gelu_tanh": -0.17005, "relu": 0.0, "silu": -0.27847}


def forward(
    parts: Parts,
    ids: Tensor,
    mask: Tensor | None = None,
    types: Tensor | None = None,
    *,
    quantised: bool = True,
    observe: Observer | None = None,
    dense: Mapping[int, nn.Module] | None = None,
) -> Tensor:
    """Last hidden states [sentences, length, hidden] of ids [sentences, length], zero where `mask` is.

    `observe` sees what is calibrated, tokens that the mask leaves out excepted. `dense`: the layers that `parts` lacks.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    kept = mask.bool()
    x = _norm(_embed(parts, ids, types), parts.norm)
    for i, layer in enumerate(parts.layers):
        if layer is None:
            x = run_dense((dense or {})[i], x, mask)
            continue
        see = None if observe is None else _seen(observe, i, kept)
        x = _layer(layer, parts.heads, x, kept, quantised, see)
    return x * kept.unsqueeze(-1)


def run_dense(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """A layer of the model itself."""
    added = None if mask is None else (mask[:, None, None, :] == 0) * torch.finfo(x.dtype).min
    out = layer(x, added)
    return out[0] if isinstance(out, tuple) else out


def positions_of(parts: Parts, ids: Tensor) -> Tensor:
    """[sentences, length]: where each token's row in the table of positions is."""
    if parts.pad is None:
        return torch.arange(ids.shape[1]).expand(ids.shape)
    real = ids.ne(parts.pad)
    return real.cumsum(1) * real + parts.pad


def _embed(parts: Parts, ids: Tensor, types: Tensor | None) -> Tensor:
    types = torch.zeros_like(ids) if types is None else types
    return parts.words[ids].float() + parts.types[types].float() + parts.positions[positions_of(parts, ids)].float()


def _seen(observe: Observer, i: int, kept: Tensor) -> Callable[[str, Tensor], None]:
    return lambda what, x: observe(what, i, x[kept])


def _layer(
    layer: Layer, heads: int, x: Tensor, kept: Tensor, quantised: bool, see: Callable[[str, Tensor], None] | None
) -> Tensor:
    scales = layer.scales if quantised else None
    if quantised and scales is None:
        raise EncoderError("the encoder is not calibrated; fix: convert it with sentences")
    rounded = per_token if quantised else _same
    qkv = _product(x, layer.qkv, rounded).split(x.shape[-1], dim=-1)
    context = _attention(qkv, heads, kept, scales)
    middle = _norm(x + _product(context, layer.out, rounded), layer.attention_norm)
    if see:
        for what, seen in zip(("x", "query", "key", "value", "middle"), (x, *qkv, middle), strict=True):
            see(what, seen)
    wide = _FUNCTIONS[layer.function](_product(middle, layer.up, rounded))
    above = partial(per_token_above, least=LEAST[layer.function]) if quantised else _same
    return _norm(middle + _product(wide, layer.down, above), layer.output_norm)


def _product(x: Tensor, linear: Linear, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    x = rounded(x if linear.factors is None else x * linear.factors)
    return F.linear(x, linear.weight.decode(torch.float32), linear.bias)


def _attention(qkv: tuple[Tensor, ...], heads: int, kept: Tensor, scales: Scales | None) -> Tensor:
    """Weights of a key are 0 .. 255 of the query's largest, their sum is taken after rounding."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
    if scales is not None:
        q, k = (_steps(t, s.view(-1, 1, 1)) for t, s in ((q, scales.query), (k, scales.key)))
        v = _steps(v, scales.value.view(heads, 1, -1))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~kept[:, None, None, :], -torch.inf)
    most = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)  # rows of padding have none
    weights = torch.exp(scores - most)
    if scales is not None:
        weights = (255 * weights).round_()
    return ((weights @ v) / weights.sum(-1, keepdim=True).clamp_min(1e-30)).transpose(1, 2).flatten(2)


def per_token(x: Tensor) -> Tensor:
    """Rounded to 127 steps up to the largest magnitude of the last dimension."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.clamp_min(1e-38)).round_().mul_(scale)


def per_token_above(x: Tensor, least: float) -> Tensor:
    """Rounded to 255 steps from `least`, below which nothing is, up to the largest value of the last dimension."""
    scale = (x - least).amax(-1, keepdim=True) / 255
    return ((x - least) / scale.clamp_min(1e-38)).round_().mul_(scale) + least


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round_().clamp_(-128, 127).mul_(scale)


def _same(x: Tensor) -> Tensor:
    return x


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
