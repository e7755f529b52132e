"""What a checkpoint folder holds, from its JSON files and safetensors headers alone: no weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import formats
from .formats.product import RIGHT

FORMAT_VERSION = 1  # of `quantization_config` in config.json and of gossamer.json
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # safetensors' own limit, bytes

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written as it is; the message names the file or layer, and the fix."""


@dataclass(frozen=True)
class Entry:
    """One tensor on disk; `dtype` is None for one that torch has no name for."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError if the file is missing or is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fix: copy the checkpoint folder again, completely") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fix: copy it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object; fix: copy it again")
    return found


def header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by name; CheckpointError if the file is missing, cut short or damaged."""
    if not path.is_file():
        raise CheckpointError(f"shard {path} is missing; fix: copy the checkpoint folder again, completely")
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"shard {path} is truncated or no safetensors ({size} bytes); fix: copy it again")
        try:
            listed = json.loads(f.read(length))
            listed.pop("__metadata__", None)
            end = max((int(e["data_offsets"][1]) for e in listed.values()), default=0)
            found = {n: Entry(tuple(e["shape"]), DTYPES.get(e["dtype"]), path) for n, e in listed.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"shard {path} has a damaged header ({error}); fix: copy it again") from None
    if size != 8 + length + end:
        raise CheckpointError(f"shard {path} has {size} bytes, its header says {8 + length + end}; fix: copy it again")
    try:
        with safe_open(path, "pt"):  # which reads no weight, but compares every shape with its place in the file
            return found
    except SafetensorError as error:
        raise CheckpointError(f"shard {path} has a damaged header ({error}); fix: copy it again") from None


def tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a single-file or sharded checkpoint; CheckpointError for pickles and for a missing shard."""
    if (folder / SINGLE).is_file():
        return header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map; fix: copy it again")
    for file in sorted(set(where.values())):
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX} points to '{file}', not to a .safetensors file in its own folder; fix: copy it again"
            )
    found = {n: e for file in sorted(set(where.values())) for n, e in header(folder / file).items()}
    if lost := sorted(set(where) - set(found)):
        raise CheckpointError(f"{folder / where[lost[0]]} lacks tensor '{lost[0]}' of the index; fix: copy it again")
    return found


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        return (
            f"{folder / pickles[0]} is a pickle, which can run code when it is read: refused; "
            "fix: save it again as safetensors, which gossamer.save and save_pretrained write"
        )
    return f"{folder} holds no {SINGLE} and no {INDEX}; fix: copy the checkpoint folder again, completely"


def check_version(found: Any) -> None:
    """CheckpointError for a layout of config that this version does not read."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"format_version is {found!r}, not a positive number; fix: copy config.json again")
    if found > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version {found} is newer than this Gossamer reads ({FORMAT_VERSION}); "
            "fix: install a newer Gossamer"
        )


def layouts(described: Mapping[str, Mapping[str, Any]]) -> dict[str, formats.Layout]:
    """The tensors that each described layer has of its own; CheckpointError names a layer that makes no sense."""
    found = {}
    for name, entry in described.items():
        try:
            found[name] = _own(described, entry)
        except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise CheckpointError(
                f"layer '{name}': {reason}; fix: copy config.json again, or upgrade or install what made it"
            ) from None
    return found


def _own(described: Mapping[str, Mapping[str, Any]], entry: Mapping[str, Any]) -> formats.Layout:
    spec = entry["spec"]
    if not isinstance(entry["bias"], bool):
        raise ValueError(f"bias is {entry['bias']!r}, not true or false")
    _check_shapes(spec)
    layout = formats.layout(spec)
    if "lender" not in entry:
        return layout
    lender = described.get(entry["lender"])
    if lender is None or "lender" in lender or lender["spec"].get("right") != spec["right"]:
        raise ValueError(f"it borrows a dictionary from '{entry['lender']}', which does not hold that one")
    return {n: v for n, v in layout.items() if not n.startswith(RIGHT)}


def _check_shapes(spec: Mapping[str, Any]) -> None:
    # Before any format computes with them: a layer is made on the meta device, where nothing else would stop them.
    shape = spec["shape"]
    if len(shape) != 2 or not all(isinstance(s, int) and s >= 0 for s in shape):
        raise ValueError(f"shape {shape} is not [out_features, in_features]")
    for side in ("left", "right"):
        if side in spec:
            _check_shapes(spec[side])
    if "left" in spec and [spec["left"]["shape"][0], spec["right"]["shape"][1]] != list(shape):
        raise ValueError(f"the factors {spec['left']['shape']} and {spec['right']['shape']} do not make {shape}")


def check_layers(described: Mapping[str, Mapping[str, Any]], found: Mapping[str, Entry]) -> None:
    """CheckpointError where the tensors on disk are not those that the config describes."""
    for name, layout in layouts(described).items():
        if described[name]["bias"] != (f"{name}.bias" in found):
            raise CheckpointError(
                f"layer '{name}': config.json and the shards disagree about its bias; "
                "fix: copy both again, of one model"
            )
        for tensor, (shape, dtype) in layout.items():
            entry = found.get(f"{name}.{tensor}")
            if entry is None:
                raise CheckpointError(f"layer '{name}': tensor '{tensor}' is in no shard; fix: copy the folder again")
            if (entry.shape, entry.dtype) != (tuple(shape), dtype):
                raise CheckpointError(
                    f"layer '{name}': tensor '{tensor}' in {entry.file.name} is {list(entry.shape)} {entry.dtype}, "
                    f"config.json says {list(shape)} {dtype}; fix: copy the config and the weights again, of one model"
                )
