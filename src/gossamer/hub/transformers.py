"""The transformers plug-in: sparse checkpoints through plain `save_pretrained` and `from_pretrained`.

`hub.lazy` imports this file once transformers is loaded. Works with transformers 5.17 and later.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import checkpoint, shards
from ..nn import SparseLinear, describe, sparse_layers, swap
from ..shards import FORMAT_VERSION, CheckpointError

METHOD = "gossamer"


class GossamerConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json: the `layers` of `nn.describe`, a canary, and who wrote it."""

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        canary: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        gossamer: str | None = None,
        **_: Any,
    ) -> None:
        shards.check_version(format_version)
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs is an enumeration of what they ship
        self.format_version = format_version
        self.gossamer = gossamer or _version()
        self.layers = layers or {}
        self.canary = canary


class GossamerQuantizer(HfQuantizer):
    """Swaps the layers on the meta device before loading, and checks what was loaded."""

    requires_calibration = True
    # What checkpoint.save has just made. A canary of older weights would accuse good ones, so no other is written.
    canary: dict[str, Any] | None = None

    quantization_config: GossamerConfig

    def __init__(self, quantization_config: GossamerConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "GossamerConfig describes a checkpoint that is sparse already, and this one is dense; "
                "fix: load it without quantization_config, then gossamer.compress(model, calibration)"
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        described = self.quantization_config.layers
        shards.layouts(described)
        here = _renamed(model, described)
        checkpoint.check_skeleton(model, here)
        _check_biases(model, here)
        swap(model, here, device="meta")
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in sparse_layers(model).items():
            _check_loaded(name, layer)
            _freeze(layer)
        checkpoint.check(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Called by save_pretrained before it writes config.json: the last moment to bring the config up to date."""
        self.quantization_config.layers = describe(model)
        self.quantization_config.canary = self.canary
        self.quantization_config.gossamer = _version()
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return checkpoint.densify(model, dtype)

    def remove_quantization_config(self, model: Any) -> None:
        # densify() has removed it already when `model.dequantize()` comes here.
        if hasattr(model, "hf_quantizer"):
            super().remove_quantization_config(model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """LoRA and the dense parameters train; the gradient passes through the sparse layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Put the plug-in into transformers' tables; again after a reload of those, and at most once each."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(GossamerConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(GossamerQuantizer)


def attach(model: Any) -> Any:
    """Make `model.save_pretrained(dir)` of a model that holds SparseLinear layers write a Gossamer checkpoint.

    Works in place and returns the model. CheckpointError for a sparse layer whose weight is tied to another one.
    """
    register()
    described = describe(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in described:
        if f"{name}.weight" in {*tied, *tied.values()}:
            raise CheckpointError(f"layer '{name}' is tied to another weight; fix: leave it out of the plan")
    config = GossamerConfig(layers=described)
    model.config.quantization_config = config
    model.hf_quantizer = GossamerQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    return model


def detach(model: Any) -> None:
    """Forget that the model was sparse: the inverse of `attach`."""
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), GossamerQuantizer):
        quantizer.remove_quantization_config(model)
    model.config.__dict__.pop("_is_quantized", None)


def _renamed(model: Any, described: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`described` under the names of this model: AutoModel has no prefix where AutoModelForCausalLM has one."""
    prefix = f"{model.base_model_prefix}."
    modules = {n for n, _ in model.named_modules()}
    names = {}
    for name in described:
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        if found is not None:
            names[name] = found
        elif name.startswith(prefix) or hasattr(model, model.base_model_prefix):
            raise CheckpointError(
                f"layer '{name}' is not in {type(model).__name__}; fix: load it with the class in its config.json, "
                "with the transformers version that saved it or a later one"
            )
    return {
        names[n]: {**e} | ({"lender": names[e["lender"]]} if "lender" in e else {})
        for n, e in described.items()
        if n in names
    }


def _check_biases(model: Any, described: Mapping[str, Mapping[str, Any]]) -> None:
    # A bias that the config denies would be left out of the model without a word.
    for name, entry in described.items():
        if entry["bias"] != (getattr(model.get_submodule(name), "bias", None) is not None):
            raise CheckpointError(f"layer '{name}': config.json is wrong about its bias; fix: copy config.json again")


def _check_loaded(name: str, layer: SparseLinear) -> None:
    # transformers marks what it has read, and fills what it has not with random numbers and a warning.
    held = layer.named_parameters(recurse=False)
    read = {n: getattr(p, "_is_hf_initialized", False) for n, p in held if not p.is_meta}  # on meta: offloaded
    if not all(read.values()):
        lost = next(n for n, seen in read.items() if not seen)
        raise CheckpointError(f"layer '{name}': tensor '{lost}' is in no shard; fix: copy the checkpoint again")


def _freeze(layer: SparseLinear) -> None:
    """Undo what a loader does to parameters: it makes floats trainable, and widens those a model keeps in float32."""
    for name, (_, dtype) in checkpoint.own_tensors(layer).items():
        p = layer.get_parameter(name)
        if p.dtype != dtype and p.is_floating_point():
            setattr(layer, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))
    layer.requires_grad_(False)


def _version() -> str:
    try:
        return version("gossamer")
    except PackageNotFoundError:
        return "unknown"


register()
