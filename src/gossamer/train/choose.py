"""Which linear layers train 2:4: names, the feed-forward default, and everything that makes a layer unfit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .method import Method
from .sparse24 import Sparse24Linear

Filter = str | Sequence[str] | Callable[[str, nn.Linear], bool]

# The linear layers of feed-forward blocks, as the models of transformers, timm and nanoGPT name them.
FEED_FORWARD = (
    r"(.*\.)?(mlp|ffn|feed_forward|feedforward|fc|experts?)(\.\d+)*\.[\w.]*",
    r".*\.(fc1|fc2|linear1|linear2|c_fc|gate_proj|up_proj|down_proj|gate_up_proj|dense_h_to_4h|dense_4h_to_h|wi|wi_\d|wo)",
    r".*\.intermediate\.dense",
    r"(?!.*attention).*\.output\.dense",
)


def chosen(model: nn.Module, filter: Filter | None, method: Method) -> list[tuple[str, nn.Linear]]:
    """The linear layers that `filter` names, checked; None: those of feed-forward blocks.

    ValueError: nothing matches, a layer is 2:4 already, its sizes cut groups, its weight has no storage yet, or the
    weight is used by something else, too, an embedding or a layer that stays dense.
    """
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = [(n, m) for n, m in linears if _matches(filter, n, m)]
    if not found:
        names = ", ".join(n for n, _ in linears[:8]) or "none"
        raise ValueError(
            f"the filter {filter or 'for feed-forward layers'} matches nothing; linear layers: {names}; "
            "fix: filter='*.mlp.*', a list of such patterns, or a function of (name, module)"
        )
    for name, layer in found:
        _check(name, layer, method)
    _check_ties(model, found)
    return found


def _matches(filter: Filter | None, name: str, layer: nn.Linear) -> bool:
    if filter is None:
        return any(re.fullmatch(p, name) for p in FEED_FORWARD)
    if callable(filter):
        return bool(filter(name, layer))
    return any(fnmatchcase(name, p) for p in ([filter] if isinstance(filter, str) else filter))


def _check(name: str, layer: nn.Linear, method: Method) -> None:
    if isinstance(layer, Sparse24Linear):
        raise ValueError(f"{name} trains 2:4 already; fix: call sparsify once, or finalize() the first run")
    if layer.forward.__func__ is not nn.Linear.forward:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} is a {type(layer).__name__} with a forward of its own; fix: leave it out of the filter"
        )
    if layer.weight.is_meta:
        raise ValueError(f"{name} is on the meta device; fix: materialise and initialise the model before sparsify")
    if not layer.weight.is_floating_point():
        raise ValueError(f"{name} holds {layer.weight.dtype}; fix: train float32, bfloat16 or float16 weights")
    if layer.in_features % 4:
        raise ValueError(
            f"{name} has in_features={layer.in_features}, no multiple of 4; fix: leave it out of the filter, or pad it"
        )
    if method.tiles and layer.out_features % 4:
        raise ValueError(
            f"{name} has out_features={layer.out_features}, no multiple of 4, which the 4x4 tiles of {method.name} "
            "need; fix: leave it out of the filter, or use a method without tiles"
        )


def _check_ties(model: nn.Module, found: list[tuple[str, nn.Linear]]) -> None:
    ours, weights = {id(m) for _, m in found}, {id(m.weight): n for n, m in found}
    for name, module in model.named_modules():
        for tensor in () if id(module) in ours else module.parameters(recurse=False):
            if id(tensor) in weights:
                raise ValueError(
                    f"{weights[id(tensor)]} shares its weight with {name}, which stays dense; fix: leave it out of "
                    "the filter, or match both"
                )
