"""Encoders on disk: `encoder.json` and `encoder.safetensors`; and, in the cache folder, what was packed of them.

What is packed suits one machine and is made there once; every process maps the same file. Neither is ever changed in
place: a process that runs an encoder keeps what it has when the folder is replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import folders, formats, machine
from ..formats import FormatError
from ..formats.bsr_int8 import BsrInt8
from ..kernels import _bsr
from ..shards import CheckpointError, read_json
from . import blob
from .module import Encoder
from .pack import pack
from .parts import Layer, Linear, Norm, Parts, Scales

log = logging.getLogger("gossamer")

VERSION = 1  # of the folder
PACKED = 1  # of what is packed
ABOUT, TENSORS = "encoder.json", "encoder.safetensors"
TRIES = 3  # of a folder that is replaced while it is read
LINEARS, NORMS = ("qkv", "out", "up", "down"), ("attention_norm", "output_norm")
SCALES = ("query", "key", "value")


def is_encoder(folder: str | Path) -> bool:
    return (Path(folder) / ABOUT).is_file()


def save(encoder: Encoder, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> None:
    """Complete or not there; an encoder that is in `folder` is replaced, anything else only with `overwrite`.

    CheckpointError where layers were left dense: what they are is known to the model only.
    """
    if len(encoder.dense):
        left = ", ".join(encoder.dense)
        raise CheckpointError(
            f"layers {left} were left dense, as modules that only their own model can save; fix: save that model, and "
            "convert it when it is loaded"
        )
    tensors, about = _tensors(encoder), _about(encoder)
    size = sum(t.nbytes for t in tensors.values())
    with folders.written(Path(folder), size, lambda old: overwrite or is_encoder(old)) as new:
        about["fingerprint"] = _fingerprint(tensors, about)
        save_file(tensors, new / TENSORS, {"fingerprint": about["fingerprint"]})
        (new / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        encoder.config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def load(folder: str | Path) -> Encoder:
    """What `save` wrote. CheckpointError names what is wrong with it."""
    folder = Path(folder)
    for _ in range(TRIES):
        about = read_json(folder / ABOUT)
        if about.get("version") != VERSION:
            raise CheckpointError(f"{folder / ABOUT} has version {about.get('version')}, not {VERSION}; fix: update")
        try:
            with safe_open(folder / TENSORS, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != about.get("fingerprint"):
                    continue  # of two encoders: it was replaced in between
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"{folder / TENSORS} cannot be read ({error}); fix: copy the folder again") from None
        return _build(folder, about, tensors)
    raise CheckpointError(f"{ABOUT} and {TENSORS} in {folder} are of two encoders; fix: copy the folder again")


def _tensors(encoder: Encoder) -> dict[str, Tensor]:
    parts = encoder.parts
    found = {"words": parts.words, "positions": parts.positions, "types": parts.types, **_of_norm("norm", parts.norm)}
    if encoder.pooler_parts is not None:
        found["pooler.weight"], found["pooler.bias"] = encoder.pooler_parts
    for i, layer in enumerate(parts.layers):
        assert layer is not None and layer.scales is not None
        for name, linear in layer.linears().items():
            found |= {f"{i}.{name}.{part}": t for part, t in linear.weight.tensors().items()}
            found[f"{i}.{name}.bias"] = linear.bias
            if linear.factors is not None:
                found[f"{i}.{name}.factors"] = linear.factors
        for name in NORMS:
            found |= _of_norm(f"{i}.{name}", getattr(layer, name))
        found |= {f"{i}.{name}_scale": getattr(layer.scales, name) for name in SCALES}
    return {name: t.contiguous() for name, t in found.items()}


def _of_norm(name: str, norm: Norm) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _about(encoder: Encoder) -> dict[str, Any]:
    parts = encoder.parts
    layers = [
        {
            **{name: linear.weight.spec() for name, linear in layer.linears().items()},
            **{f"{name}_eps": getattr(layer, name).eps for name in NORMS},
            "function": layer.function,
        }
        for layer in parts.int8()
    ]
    return {"version": VERSION, "heads": parts.heads, "pad": parts.pad, "eps": parts.norm.eps, "layers": layers}


def _fingerprint(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _build(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoder:
    from transformers import AutoConfig

    try:
        layers = tuple(_layer(tensors, i, spec) for i, spec in enumerate(about["layers"]))
        parts = Parts(
            about["heads"], tensors["words"], tensors["positions"], tensors["types"],
            _norm(tensors, "norm", about["eps"]), about["pad"], layers,
        )  # fmt: skip
        pooler = (tensors["pooler.weight"], tensors["pooler.bias"]) if "pooler.weight" in tensors else None
    except (KeyError, TypeError, FormatError) as error:
        raise CheckpointError(f"the encoder in {folder} is damaged: {error}; fix: copy the folder again") from None
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Encoder(parts, config, pooler, arrays=_packed(parts, about["fingerprint"]))


def _layer(tensors: Mapping[str, Tensor], i: int, spec: Mapping[str, Any]) -> Layer:
    query, key, value = (tensors[f"{i}.{name}_scale"] for name in SCALES)
    linears = {name: _linear(tensors, f"{i}.{name}", spec[name]) for name in LINEARS}
    norms = {name: _norm(tensors, f"{i}.{name}", spec[f"{name}_eps"]) for name in NORMS}
    return Layer(**linears, **norms, function=spec["function"], scales=Scales(query, key, value))  # type: ignore[arg-type]


def _linear(tensors: Mapping[str, Tensor], name: str, spec: Mapping[str, Any]) -> Linear:
    found = {part: tensors[f"{name}.{part}"] for part in formats.layout(dict(spec))}
    weight = formats.from_spec(dict(spec), found)
    if not isinstance(weight, BsrInt8):
        raise FormatError(f"{name} is {weight.name}, not {BsrInt8.name}")
    weight.validate()
    return Linear(weight, tensors[f"{name}.bias"], tensors.get(f"{name}.factors"))


def _norm(tensors: Mapping[str, Tensor], name: str, eps: float) -> Norm:
    return Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def _packed(parts: Parts, fingerprint: str) -> dict[str, Tensor]:
    """From the cache folder, where the first process of this machine puts it."""
    way = "amx" if _bsr.amx() else "bsr"
    path = machine.cache_folder() / "encoders" / f"{fingerprint}-{way}-{PACKED}.blob"
    if (found := _read(path)) is not None:
        return found
    arrays = pack(parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        blob.write(path, arrays, {})
    except OSError as error:
        log.warning("encoder: no memory is shared with other processes, because %s cannot be written: %s", path, error)
        return arrays
    return _read(path) or arrays


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return blob.read(path)[0]
    except FileNotFoundError:
        return None
    except (OSError, blob.BlobError) as error:
        log.warning("encoder: packed again, because %s", error)
        return None
