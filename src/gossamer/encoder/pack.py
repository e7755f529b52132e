"""From parts to what the compiled pipeline reads: plain arrays, which a file can hold and processes can share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import timing
from ..activation import FUNCTIONS, Epilogue
from ..formats.bsr_int8 import BsrInt8
from ..kernels import Packed, _bsr
from .parts import EncoderError, Layer, Linear, Norm, Parts, Scales
from .reference import LEAST

TOKENS = 128  # for which the kernels of a layer are timed
BUCKETS = 50  # of density: layers of one shape in one bucket take the same kernel
COPIES, SWEEP = 32, 64 << 20  # a timing goes through so many copies, or bytes: from where a whole model's weights lie
EDGE = 0.95  # dense tiles are larger, too: they must be this much faster

_core: ModuleType | None
try:
    from gossamer import _encoder as _core
except ImportError:
    _core = None


def require() -> ModuleType:
    """The compiled pipeline, or an ImportError that names the fix."""
    if _core is None:
        raise ImportError(
            "Gossamer's compiled encoder (gossamer._encoder) is missing: it needs a C++17 compiler (g++ >= 11); build "
            "it with `pip install .` in the repository"
        )
    return _core


def pack(parts: Parts, kernel: str | None = None) -> dict[str, Tensor]:
    """The layers' arrays by name. `kernel`: "bsr" or "amx" everywhere; None: timed.

    EncoderError where a layer is not calibrated.
    """
    arrays: dict[str, Tensor] = {}
    for i, layer in enumerate(parts.layers):
        if layer is not None:
            arrays |= {f"{i}.{name}": t for name, t in _layer(layer, parts.heads, kernel).items()}
    return arrays


def build(parts: Parts, arrays: Mapping[str, Tensor], first: int, last: int) -> Any:
    """The compiled pipeline of layers first .. last; it lives as long as `parts` and `arrays` do, and no longer."""
    core = require()

    def norm(own: Norm) -> Any:
        return core.norm(_at(own.weight), _at(own.bias), own.eps)

    def linear(name: str, shape: tuple[int, int], block: int) -> Any:
        own = [arrays[f"{name}.{part}"] for part in ("panels", "starts", "data", "offsets")]
        wide = own[3].dtype == torch.int32
        rest = (_at(arrays[f"{name}.{part}"]) for part in ("scale", "sums", "bias", "factors"))
        return core.linear(*shape, block, *map(_at, own), wide, *rest)

    layers = []
    for i in range(first, last):
        layer = parts.layers[i]
        assert layer is not None and layer.scales is not None
        linears = [linear(f"{i}.{n}", a.weight.shape, a.weight.width) for n, a in layer.linears().items()]
        norms = norm(layer.attention_norm), norm(layer.output_norm)
        scores, values = _at(arrays[f"{i}.score_scale"]), _at(arrays[f"{i}.value_scale"])
        function = FUNCTIONS.index(layer.function)
        layers.append(core.layer(*linears, *norms, scores, values, function, LEAST[layer.function]))
    tables = [x for t in (parts.words, parts.positions, parts.types) for x in (_at(t), t.shape[0])]
    embeddings = core.embeddings(*tables, -1 if parts.pad is None else parts.pad, norm(parts.norm))
    return core.Encoder(parts.hidden, parts.heads, parts.intermediate, embeddings, layers)


def _at(t: Tensor) -> int:
    return t.data_ptr() if t.numel() else 0


def _layer(layer: Layer, heads: int, kernel: str | None) -> dict[str, Tensor]:
    scales = layer.scales
    if scales is None:
        raise EncoderError("the encoder is not calibrated; fix: convert it with sentences")
    arrays: dict[str, Tensor] = {}
    for name, linear in layer.linears().items():
        found = _linear(linear, kernel)
        if name == "down":  # reads what its function gives less the least that it can
            found["bias"] = linear.bias + LEAST[layer.function] * linear.weight.decode(torch.float32).sum(1)
        if name == "qkv":  # rounds to these steps
            step = _steps(scales, linear.bias.numel() // 3)
            found["scale"][: len(step)] /= step
            found["bias"] = linear.bias / step
        arrays |= {f"{name}.{part}": t for part, t in found.items()}
    head_size = scales.value.numel() // heads
    arrays["score_scale"] = scales.query * scales.key * (math.log2(math.e) / math.sqrt(head_size))
    arrays["value_scale"] = scales.value
    return arrays


def _steps(scales: Scales, hidden: int) -> Tensor:
    """[3 hidden]: one step of each row of qkv."""
    repeat = hidden // scales.query.numel()
    return torch.cat([scales.query.repeat_interleave(repeat), scales.key.repeat_interleave(repeat), scales.value])


def _linear(linear: Linear, kernel: str | None) -> dict[str, Tensor]:
    panels, groups, data, offsets, *_, scale, sums = _packed(linear.weight, kernel).tensors
    return {
        "panels": panels, "starts": groups if data.numel() or not panels.numel() else groups[:0], "data": data,
        "offsets": offsets, "scale": scale.clone(), "sums": sums, "bias": linear.bias,
        "factors": torch.empty(0) if linear.factors is None else linear.factors,
    }  # fmt: skip


def _packed(weight: BsrInt8, kernel: str | None) -> Packed:
    if not _bsr.amx() or kernel == "bsr":
        return _bsr.pack(weight)
    if kernel == "amx" or _amx_wins(*weight.shape, weight.width, round(BUCKETS * _density(weight))):
        return _bsr.pack(weight, panels=True)
    return _bsr.pack(weight)


def _density(weight: BsrInt8) -> float:
    return weight.weight.numel() / max(1, weight.shape[0] * weight.shape[1])


@cache
def _amx_wins(rows: int, cols: int, width: int, bucket: int) -> bool:
    """Is the dense product by AMX faster than that of the stored blocks, for a weight of this shape and density?"""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(-(-rows // 4), 1, -(-cols // width), 1, generator=generator) < bucket / BUCKETS
    dense = torch.ones(1, 4, 1, width) * kept
    weight = BsrInt8.encode(dense.reshape(-(-rows // 4) * 4, -1)[:rows, :cols].contiguous(), (4, width))
    calls = {}
    for name, panels in (("bsr", False), ("amx", True)):
        first = _bsr.pack(weight, panels)
        size = sum(t.nbytes for t in first.tensors[:4])
        packs = [first, *(_copied(first) for _ in range(min(COPIES, SWEEP // max(1, size))))]
        x = _bsr.quantise(torch.randn(TOKENS, cols, generator=generator), first.meta["layout"])
        to = Epilogue(torch.uint8, "t", scale=1.0)
        calls[name] = [partial(_bsr.multiply, x, p.tensors, p.meta, to) for p in packs]
    times = timing.race(calls, torch.device("cpu"), seconds=0.02)
    return times["amx"] < EDGE * times["bsr"]


def _copied(packed: Packed) -> Packed:
    return Packed(tuple(t.clone() for t in packed.tensors), packed.meta)
