"""Sparse, not quantised checkpoints of compressed-tensors, which its newer versions and vLLM no longer read.

`sparse-24-bitmask` (up to compressed-tensors 0.11) becomes `nm24`, `sparse-bitmask` becomes `bitmask`. Of a layer X the
file holds X.shape, X.compressed (values in row order; exactly two of four, zeros among them, for 2:4) and X.bitmask
[M, ceil(K/8)], bit j of byte b for column 8 b + j; `sparse-bitmask` adds row offsets, which are redundant.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..formats import Format, FormatError, dtype_name
from ..formats.bitmask import Bitmask, unpack_bits
from ..formats.nm24 import NM
from ..nn import SparseLinear
from ..shards import CheckpointError, read_json, tensors

FORMATS: dict[str, type[Format]] = {"sparse-24-bitmask": NM, "sparse-bitmask": Bitmask}
PARTS = ("shape", "compressed", "bitmask")
VALUES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DECOMPRESS = "decompress it with the version of compressed-tensors that wrote it"


def format_of(folder: str | Path) -> str | None:
    """The sparse format that the config of a local folder names, or None if it is no such checkpoint."""
    file = Path(folder) / "config.json"
    config = read_json(file) if file.is_file() else {}
    found = config.get("quantization_config") or config.get("compression_config") or config.get("sparsity_config")
    if not isinstance(found, dict):
        return None
    sparsity = found.get("sparsity_config") or found
    name = sparsity.get("format") if isinstance(sparsity, dict) else None
    if name not in FORMATS:
        return None
    if found.get("config_groups"):
        raise CheckpointError(f"{folder} is {name} and quantised, too, which is not read; fix: {DECOMPRESS}")
    return name


def read(folder: str | Path) -> Iterator[tuple[str, Format | Tensor]]:
    """(layer, its weight as a format) of every sparse layer, and (name, tensor) of all the rest. CheckpointError."""
    name = format_of(folder)
    if name is None:
        raise CheckpointError(f"{folder} is no checkpoint in one of {', '.join(FORMATS)}; fix: use gossamer.load")
    found = tensors(Path(folder))
    layers = [n.removesuffix(".compressed") for n in found if n.endswith(".compressed")]
    for layer in layers:
        missing = [p for p in PARTS if f"{layer}.{p}" not in found]
        if missing:
            raise CheckpointError(f"{folder}: {layer} has no {' and no '.join(missing)}; fix: copy it again")
        yield layer, _matrix(FORMATS[name], layer, *(_read(found[f"{layer}.{p}"].file, f"{layer}.{p}") for p in PARTS))
    taken = {f"{layer}.{part}" for layer in layers for part in (*PARTS, "row_offsets")}
    for other in found.keys() - taken:
        yield other, _read(found[other].file, other)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _matrix(kind: type[Format], layer: str, shape: Tensor, values: Tensor, mask: Tensor) -> Format:
    if shape.numel() != 2 or shape.is_floating_point():
        raise CheckpointError(f"{layer}.shape is {shape.tolist()}, no rows and columns; fix: copy it again")
    rows, cols = (int(n) for n in shape.flatten().tolist())
    if tuple(mask.shape) != (rows, -(-cols // 8)) or mask.dtype != torch.uint8:
        found = f"{dtype_name(mask.dtype)} {list(mask.shape)}"
        raise CheckpointError(f"{layer}.bitmask is {found} for a weight {rows} x {cols}; fix: copy it again")
    if values.dtype not in VALUES:
        held = dtype_name(values.dtype)
        raise CheckpointError(f"{layer}.compressed is {held}: quantised, too, which is not read; fix: {DECOMPRESS}")
    used = unpack_bits(mask, cols)
    if int(used.sum()) != values.numel():
        raise CheckpointError(f"{layer}: {int(used.sum())} bits for {values.numel()} values; fix: copy it again")
    dense = values.new_zeros(rows, cols)
    dense[used] = values.flatten()
    try:
        return kind.encode(dense)
    except FormatError as error:
        raise CheckpointError(f"{layer} is {str(error).partition(';')[0]}; fix: copy it again") from error


def load(folder: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """The causal language model, its sparse layers as SparseLinear: `gossamer.prepare` and `gossamer.save` take it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name in ("quantization_config", "compression_config", "sparsity_config"):
        if hasattr(config, name):
            delattr(config, name)
    found = dict(read(folder))
    state = {n: t for n, t in found.items() if isinstance(t, Tensor)}
    state |= {f"{n}.weight": f.decode() for n, f in found.items() if isinstance(f, Format)}
    kind = config.dtype if dtype == "auto" else dtype
    with torch.device("meta"):
        cls = type(AutoModelForCausalLM.from_config(config))
    model = cls.from_pretrained(None, config=config, state_dict=state, dtype=kind)
    for name, stored in found.items():
        if isinstance(stored, Format):
            bias = getattr(model.get_submodule(name), "bias", None)
            model.set_submodule(name, SparseLinear.from_format(stored, bias))
    return model.eval()
