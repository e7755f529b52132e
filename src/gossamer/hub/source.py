"""Where a model comes from: a Hugging Face folder or hub id, a Gossamer folder, a GGUF file or a folder with one."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..formats import dtype_of
from ..shards import read_json, tensors
from . import compressed_tensors, gguf


def open_model(source: str | Path, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal language model or an encoder, in evaluation mode.

    `dtype` is a torch name or "auto": as stored, and float32 for GGUF. ValueError or OSError names what is wrong.
    """
    if find_spec("transformers") is None:
        raise ValueError("loading a model needs the package transformers; fix: pip install transformers accelerate")
    check_device(device)
    kind = dtype if dtype == "auto" else dtype_of(dtype)
    if file := gguf.find(source):
        model, tokenizer = gguf.load(file, torch.float32 if dtype == "auto" else dtype_of(dtype))
    else:
        model, tokenizer = _open(source, kind)
    return model.to(device or "cpu").eval(), tokenizer


def is_compressed(folder: str | Path) -> bool:
    """Whether this is a local folder that `gossamer.save` wrote, by its config.json."""
    file = Path(folder) / "config.json"
    config = read_json(file).get("quantization_config") if file.is_file() else None
    return isinstance(config, dict) and config.get("quant_method") == "gossamer"


def check_device(device: str | None) -> None:
    """ValueError for a device that torch does not know or that is not in this machine."""
    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"device '{device}' cannot be used ({reason}); fix: name another one, such as cpu") from e


def _may_be_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is not None and not name.endswith(".gguf")


def _class(source: str | Path) -> Any:
    """An encoder keeps its own class; everything else is opened as a causal language model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    encoder = config.model_type in ENCODERS and not name.endswith(("ForCausalLM", "LMHeadModel"))
    return (getattr(transformers, name, None) if encoder else None) or transformers.AutoModelForCausalLM


def _open(source: str | Path, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    path = Path(source)
    if not path.exists() and not _may_be_hub_id(str(source)):
        raise FileNotFoundError(f"there is no folder {path}; fix: check the path")
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json and no GGUF file; fix: name a model folder")
    try:
        if is_compressed(path):
            from ..checkpoint import load

            return load(path, dtype=dtype), AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if path.is_dir() and compressed_tensors.format_of(path):
            return compressed_tensors.load(path, dtype), AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if path.is_dir():
            tensors(path)  # a shard that is cut short has a clear error here
        model = _class(source).from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as e:
        if "trust_remote_code" in str(e):
            raise ValueError(
                f"{source} brings code of its own, which is not run; fix: use a model of an architecture that "
                "transformers has"
            ) from e
        raise
    except OSError as e:
        if path.exists():
            fix = "fix: name a folder with config.json, tokenizer and safetensors weights (pickles are refused)"
            raise FileNotFoundError(f"{path}: {str(e).splitlines()[0]}; {fix}") from e
        raise FileNotFoundError(
            f"'{source}' is neither a folder here nor a model that the Hugging Face hub gave us "
            f"({str(e).splitlines()[0]}); fix: check the path, or the hub id and the network"
        ) from e
