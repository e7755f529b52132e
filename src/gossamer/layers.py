"""What there is to compress in a model: its blocks, their linear layers, and which of them read the same input.

Works on a live model and on the skeleton of a checkpoint folder, whose weights are never read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .nn import SparseLinear
from .once import say
from .shards import Entry, tensors

log = logging.getLogger("gossamer")

TOKENS = 8  # of the forward pass that finds out who reads what


class LayerError(ValueError):
    """A model whose layers cannot be found, or a checkpoint that does not match its config."""


@dataclass(frozen=True)
class Block:
    """One block of a model; `groups` are the full names of its linear layers, by the input tensor that they read."""

    name: str
    groups: tuple[tuple[str, ...], ...]


def find(model: nn.Module) -> list[Block]:
    """The blocks of a model, real or on the meta device, with their linear layers grouped by input.

    Embeddings, norms, heads and everything outside the blocks are left alone.
    """
    prefix, blocks = _block_list(model)
    names = [dict(block.named_modules(prefix=f"{prefix}.{i}")) for i, block in enumerate(blocks)]
    if done := next((n for b in names for n, m in b.items() if isinstance(m, SparseLinear)), None):
        raise LayerError(f"{done} is compressed already; fix: start from the dense model, loaded again")
    linears = [{n: m for n, m in block.items() if is_linear(m)} for block in names]
    if not any(linears):
        raise LayerError(f"{type(model).__name__}: no linear layers in {prefix}; fix: pass a dense transformer model")
    _tell_stacked(model, model.get_submodule(prefix))  # type: ignore[arg-type]
    inputs = _trace(model, {n: m for block in linears for n, m in block.items()})
    return [Block(f"{prefix}.{i}", _by_input(block, inputs)) for i, block in enumerate(linears)]


def block_modules(model: nn.Module, blocks: Sequence[Block]) -> list[nn.Module]:
    return [model.get_submodule(b.name) for b in blocks]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, and the Conv1D of transformers' GPT-2, with a weight of real numbers."""
    weight = getattr(module, "weight", None)
    known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return known and weight is not None and weight.ndim == 2 and weight.is_floating_point()


def weight_of(module: nn.Module) -> Tensor:
    """The weight [out_features, in_features]; a view."""
    weight = module.weight.detach()  # type: ignore[union-attr,operator]
    return weight if isinstance(module, nn.Linear) else weight.mT  # type: ignore[return-value]


def shape_of(module: nn.Module) -> tuple[int, int]:
    out, into = weight_of(module).shape
    return int(out), int(into)


def replace(model: nn.Module, name: str, layer: SparseLinear) -> None:
    """Put `layer` where the linear layer `name` is; nothing of the old one is kept."""
    layer.train(model.get_submodule(name).training)
    model.set_submodule(name, layer)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without a key-value cache; everything restored at the end."""
    training = [m for m in model.modules() if m.training]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if cache is not None:
            config.use_cache = False  # type: ignore[union-attr]
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if cache is not None:
            config.use_cache = cache  # type: ignore[union-attr]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor a module was called with first, whether by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _uniform(m)]
    if not found:
        raise LayerError(f"{type(model).__name__} has no nn.ModuleList of equal blocks; fix: pass a transformer model")
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _uniform(blocks: nn.ModuleList) -> bool:
    return len({type(b) for b in blocks}) == 1


def _trace(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensor that each linear layer reads; keeping the tensors keeps their identities apart."""
    inputs: dict[str, Tensor] = {}

    hooks = [m.register_forward_pre_hook(_remember(inputs, n), with_kwargs=True) for n, m in linears.items()]
    device = next(model.parameters()).device
    try:
        with quiet(model), _fake(model) if device.type == "meta" else nullcontext():
            model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device=device))
    except Exception as e:
        raise LayerError(
            f"{type(model).__name__}: a forward pass over {TOKENS} token ids failed, so its layers cannot be grouped "
            f"({type(e).__name__}: {e}); fix: pass a model whose forward takes input_ids alone"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _remember(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(name, first_input(args, kwargs))

    return hook


@contextmanager
def _fake(model: Any) -> Iterator[None]:
    # Plain meta tensors fail where a model looks at a value (mask creation does); fake ones know such cases.
    from torch._subclasses.fake_tensor import FakeTensorMode

    noise = logging.getLogger("torch._subclasses.fake_tensor")  # tracebacks of failures that are raised as well
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    before, noise.disabled = noise.disabled, True
    try:
        if experts:
            # The default, grouped_mm, is faked for bfloat16 only, and eager experts look at values.
            model.set_experts_implementation("batched_mm")
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        noise.disabled = before
        if experts:
            model.set_experts_implementation(experts)


def _tell_stacked(model: nn.Module, blocks: nn.ModuleList) -> None:
    sizes = {n: p.numel() for n, p in blocks.named_parameters() if p.ndim == 3 and min(p.shape) > 1}
    if sizes:
        share = sum(sizes.values()) / sum(p.numel() for p in blocks.parameters())
        say(
            f"{type(model).__name__}: {share:.0%} of the blocks' parameters lie in {len(sizes)} 3-d tensors such as "
            f"{next(iter(sizes))}, as stacked experts do; no method compresses those, they stay dense"
        )


def _by_input(names: Iterable[str], inputs: dict[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name in names:
        if name in inputs:
            groups.setdefault(id(inputs[name]), []).append(name)
        else:
            log.warning("%s was not called in a forward pass and stays dense", name)
    return tuple(tuple(g) for g in groups.values())


def skeleton(folder: str | Path) -> nn.Module:
    """The model of a checkpoint folder on the meta device, in the stored dtypes, checked against the shards' headers.

    Reads config.json and the headers of the safetensors files, no weights. LayerError names what does not fit.
    """
    folder = Path(folder)
    stored = _stored(folder)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as e:
        if "trust_remote_code" not in str(e):
            raise
        raise LayerError(
            f"{folder} brings code of its own, which is not run; fix: use an architecture that transformers has"
        ) from e
    if quantised := getattr(config, "quantization_config", None):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LayerError(f"{folder}: the checkpoint is compressed already ({kind}); fix: start from the dense model")
    cls = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        model = cls(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
    kinds = [_match(folder, model, name, m, stored) for name, m in _block_linears(model)]
    return model.to(max(set(kinds), key=kinds.count)) if kinds else model


def _block_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    prefix, blocks = _block_list(model)
    return [(n, m) for n, m in blocks.named_modules(prefix=prefix) if is_linear(m)]


def _stored(folder: Path) -> dict[str, Entry]:
    if any(folder.glob("*.gguf")) and not (folder / "config.json").is_file():
        raise LayerError(f"{folder} holds a GGUF file; fix: load it with transformers and save it as safetensors first")
    if not (folder / "config.json").is_file():
        raise LayerError(f"{folder} has no config.json; fix: name the folder of a Hugging Face model")
    return tensors(folder)


def _match(folder: Path, model: nn.Module, name: str, module: nn.Module, stored: dict[str, Entry]) -> torch.dtype:
    """The stored dtype of a layer's weight; LayerError unless it is there, in the shape that config.json implies."""
    key = next((k for k in _spellings(model, f"{name}.weight") if k in stored), None)
    if key is None:
        raise LayerError(f"{folder}: {name}.weight is in no shard; fix: check that config.json belongs to these shards")
    entry, expected = stored[key], tuple(module.weight.shape)  # type: ignore[union-attr,arg-type]
    if entry.shape != expected:
        raise LayerError(
            f"{entry.file}: {key} is {entry.shape}, config.json says {expected}; fix: copy both from the same model"
        )
    if entry.dtype is None or not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
        raise LayerError(f"{entry.file}: {key} is stored as {entry.dtype}; fix: start from a float32 or bfloat16 model")
    return entry.dtype


def _spellings(model: nn.Module, key: str) -> list[str]:
    prefix = getattr(model, "base_model_prefix", "")
    return [key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"]
