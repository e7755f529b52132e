"""The verbs on checkpoints: save, load, check, densify, export.

Everything is safetensors and JSON; nothing from a checkpoint is executed, and pickles are refused. Folders are written
beside their target and renamed, so a target is complete or not there.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from . import canary, folders, formats, shards
from .nn import SparseLinear, describe, sparse_layers, swap
from .shards import CheckpointError

MODULE = "gossamer.json"  # of a checkpoint of a plain nn.Module


def save(model: Any, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> None:
    """Write `model` with its sparse layers, its tokenizer and a model card to `folder`.

    A transformers model loads again with `gossamer.load(folder)`, or with `import gossamer` and `from_pretrained`;
    any other module with `gossamer.load(folder, model=skeleton)`. An earlier Gossamer checkpoint in `folder` is
    replaced; anything else there is refused unless `overwrite`, and files of other names are kept.
    """
    if hasattr(model, "peft_config"):
        raise CheckpointError(
            "the model carries adapters, which are saved apart; fix: model.save_pretrained(folder) for the adapters, "
            "gossamer.save for the sparse model before they are added"
        )
    if not sparse_layers(model):
        raise CheckpointError(
            "the model has no sparse layer to save; fix: gossamer.compress(model, ...) first, "
            "or save a dense model with its own save_pretrained"
        )
    with folders.written(Path(folder), _size(model), _replaceable(overwrite)) as new:
        if _is_transformers(model):
            _save_pretrained(model, new)
        else:
            save_model(model, str(new / shards.SINGLE))
            _write_json(new / MODULE, {"format_version": shards.FORMAT_VERSION, "layers": describe(model)})
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        _write_card(model, new, Path(folder).absolute().name)


def load(folder: str | Path, *, model: nn.Module | None = None, **kwargs: Any) -> Any:
    """The model in `folder`, every file checked before a weight is read and every layer after.

    `kwargs` go to `from_pretrained` (`dtype`, `device_map`, ...). A checkpoint of a plain module needs `model`, a
    skeleton of the original architecture; it is filled in place and returned.
    """
    folder = Path(folder)
    if kwargs.pop("trust_remote_code", False):
        raise CheckpointError("trust_remote_code is refused: gossamer.load runs no code from a checkpoint")
    if (folder / "encoder.json").is_file():
        from .encoder import load as load_encoder

        return load_encoder(folder)
    described = read(folder)
    if (folder / MODULE).is_file():
        return _load_module(folder, model, described)
    loaded = _from_pretrained(folder, kwargs)
    if remembered := loaded.config.quantization_config.canary:
        try:
            canary.check(loaded, remembered)
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the canary in {folder}/config.json is damaged ({error}); fix: copy it again"
            ) from None
    return loaded


def read(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The sparse layers of a checkpoint (as `nn.describe` gives them), after every check that needs no weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; fix: give the path of a folder that gossamer.save wrote")
    config = _read_config(folder)
    shards.check_version(config.get("format_version"))
    layers = config.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(e, dict) for e in layers.values()):
        raise CheckpointError(f"the config in {folder} lists no layers; fix: copy it again")
    shards.check_layers(layers, shards.tensors(folder))
    return layers


def check(model: nn.Module) -> None:
    """CheckpointError naming the first sparse layer whose stored tensors are inconsistent or hold NaN or Inf."""
    for name, layer in sparse_layers(model).items():
        if any(p.is_meta for p in layer.parts()):  # offloaded by accelerate, which brings back one layer at a time
            if len(own_tensors(layer)) < len(layer.parts()):
                raise CheckpointError(
                    f"layer '{name}' borrows a dictionary, which offloading takes away; fix: load it without offload, "
                    "in a device_map without 'cpu' beside a GPU and without 'disk'"
                )
            continue
        try:
            layer.format.validate()
        except formats.FormatError as error:
            raise CheckpointError(f"layer '{name}': {error}; fix: copy the checkpoint again") from None
        for tensor, p in layer.named_parameters(recurse=False):
            if p.is_floating_point() and not torch.isfinite(p).all():
                raise CheckpointError(
                    f"layer '{name}': NaN or Inf in tensor '{tensor}'; fix: copy or make the checkpoint again"
                )


def densify(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put a dense layer of the original kind in place of every SparseLinear; returns the model.

    The weights get `dtype`, or else the dtype of the model's own dense parameters.
    """
    dtype = dtype or _float_dtype(model)
    transposed = _transposed(model)
    for name, layer in sparse_layers(model).items():
        model.set_submodule(name, _dense_layer(layer, dtype, name in transposed))
    if _is_transformers(model):
        from .hub.transformers import detach

        detach(model)
    return model


def export(
    model_or_dir: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a plain dense safetensors checkpoint that loads anywhere, without Gossamer.

    The zeros stay zeros and products are multiplied out in `dtype`, or else in the dtype of the model's dense
    parameters. Tokenizer files of a folder are copied. The model given is not changed.
    """
    source = Path(model_or_dir) if isinstance(model_or_dir, str | Path) else None
    folders.check_target(Path(out), lambda _: overwrite)
    model = densify(load(source) if source else copy.deepcopy(model_or_dir), dtype)
    if dtype is not None:
        for p in model.parameters():
            p.data = p.data.to(dtype) if p.is_floating_point() else p.data
        if _is_transformers(model):
            model.config.dtype = dtype
    with folders.written(Path(out), _size(model), lambda _: overwrite) as new:
        if _is_transformers(model):
            model.save_pretrained(new)
        else:
            save_model(model, str(new / shards.SINGLE))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        elif source is not None:
            folders.carry(source, new)


def check_skeleton(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> None:
    """CheckpointError naming the first described layer that the dense `model` has not got in that shape."""
    modules = dict(model.named_modules())
    for name, entry in described.items():
        shape = entry["spec"]["shape"]
        weight = getattr(modules.get(name), "weight", None)
        # Either way round: GPT-2's Conv1D holds [in_features, out_features].
        if weight is None or sorted(weight.shape) != sorted(shape):
            held = "not there" if weight is None else str(list(weight.shape))
            raise CheckpointError(
                f"layer '{name}' is {list(shape)} in the checkpoint's config and {held} in the model; "
                "fix: the config was changed or is another model's, copy it again"
            )


def own_tensors(layer: SparseLinear) -> formats.Layout:
    """Name -> (shape, dtype) of the tensors that a layer holds itself, borrowed ones left out."""
    held = dict(layer.named_parameters(recurse=False))
    return {n: v for n, v in formats.layout(layer.spec).items() if n in held}


def _save_pretrained(model: Any, new: Path) -> None:
    from .hub.transformers import attach

    quantizer = attach(model).hf_quantizer
    quantizer.canary = canary.make(model)
    try:
        # Under the names of the modules, which are those in `layers`, whatever older checkpoints called them.
        model.save_pretrained(new, save_original_format=False)
    finally:
        quantizer.canary = None


def _write_card(model: Any, new: Path, name: str) -> None:
    from .hub import card

    (new / "README.md").write_text(card.render(model, name), encoding="utf-8")


def _load_module(folder: Path, model: nn.Module | None, described: dict[str, dict[str, Any]]) -> nn.Module:
    if model is None:
        raise CheckpointError(f"{folder} holds a plain module; fix: gossamer.load(folder, model=skeleton)")
    check_skeleton(model, described)
    swap(model, described)
    try:
        load_model(model, str(folder / shards.SINGLE))
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder} does not fit the model ({' '.join(str(error).split())}); "
            "fix: give a skeleton of the model that was saved, or copy the folder again"
        ) from None
    check(model)
    return model


def _from_pretrained(folder: Path, kwargs: Mapping[str, Any]) -> Any:
    """The model; CheckpointError where transformers would fill a tensor with its initial value."""
    safe = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    # Tensors of a wrong shape are told apart below, where the fix can be named.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, info = _model_class(folder).from_pretrained(folder, **{**kwargs, **safe, **told})
    if info["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
        name, stored, expected = min(info["mismatched_keys"])
        raise CheckpointError(
            f"tensor '{name}' is {list(stored)} in the shards of {folder}, config.json implies {list(expected)}; "
            "fix: copy the config and the weights again, of one model"
        )
    if missing := sorted(info["missing_keys"]):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"{folder} lacks {named}; fix: copy the folder again, completely, or save it again")
    return loaded


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / MODULE).is_file():
        return shards.read_json(folder / MODULE)
    config = shards.read_json(folder / "config.json")
    found = config.get("quantization_config")
    found = found if isinstance(found, dict) else {}
    if found.get("quant_method") == "compressed-tensors" or "compression_config" in config:
        raise CheckpointError(
            f"{folder} is a checkpoint of compressed-tensors; fix: read it with gossamer.hub.compressed_tensors.load, "
            "if it is sparse and not quantized, and write it with gossamer.save"
        )
    if found.get("quant_method") != "gossamer":
        raise CheckpointError(
            f"{folder} is no Gossamer checkpoint, its config.json names no gossamer quantization_config; fix: load a "
            "dense model with transformers' from_pretrained, and make it sparse with gossamer.compress"
        )
    return found


def _model_class(folder: Path) -> Any:
    import transformers

    from .hub.transformers import register

    register()
    names = shards.read_json(folder / "config.json").get("architectures") or []
    found = getattr(transformers, str(names[0]), None) if names else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise CheckpointError(
        f"transformers {transformers.__version__} has no architecture {names}; fix: pip install --upgrade transformers"
    )


def _is_transformers(model: Any) -> bool:
    loaded = sys.modules.get("transformers.modeling_utils")  # a model of theirs cannot exist before
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)


def _skeleton(model: Any) -> Any:
    """The original architecture on the meta device: which layers it had, under which names."""
    config = copy.deepcopy(model.config)
    for key in ("quantization_config", "_is_quantized"):
        config.__dict__.pop(key, None)
    with torch.device("meta"):
        return type(model)(config)


def _transposed(model: Any) -> set[str]:
    """Names of the sparse layers that took the place of a Conv1D, which holds [in_features, out_features]."""
    if not _is_transformers(model):
        return set()
    from transformers.pytorch_utils import Conv1D

    original = _skeleton(model)
    return {n for n in sparse_layers(model) if isinstance(original.get_submodule(n), Conv1D)}


def _dense_layer(layer: SparseLinear, dtype: torch.dtype, transposed: bool) -> nn.Module:
    weight = layer.decode(dtype)
    with torch.device("meta"):
        if transposed:
            from transformers.pytorch_utils import Conv1D

            dense: Any = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight = nn.Parameter(weight.mT.contiguous() if transposed else weight.clone())
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
    elif transposed:
        dense.bias = nn.Parameter(weight.new_zeros(layer.out_features))
    return dense


def _float_dtype(model: nn.Module) -> torch.dtype:
    stored = {id(p) for layer in sparse_layers(model).values() for p in layer.parts()}
    dense = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in stored)
    return next(dense, torch.float32)


def _size(model: nn.Module) -> int:
    """Bytes of the state dict on disk; tied tensors count once."""
    tensors = model.state_dict().values()
    return sum({t.data_ptr() or id(t): t.numel() * t.element_size() for t in tensors}.values())


def _replaceable(overwrite: bool) -> Callable[[Path], bool]:
    def ours(folder: Path) -> bool:
        try:
            return bool(_read_config(folder))
        except CheckpointError:
            return False

    return lambda folder: overwrite or ours(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
