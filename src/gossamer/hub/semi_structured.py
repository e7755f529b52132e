"""2:4 layers for torch's own sparse tensors, `torch.sparse.to_sparse_semi_structured`: without Gossamer at run time.

Mind that torch builds and destroys a plan of cuSPARSELt on every call, 0.5 to 1 ms of the host's time on an H100.
"""

from __future__ import annotations

import torch
from torch import nn

from ..nn import SparseLinear, sparse_layers

TAKES = (torch.float16, torch.bfloat16, torch.int8)
MULTIPLE = {torch.float16: 16, torch.bfloat16: 16, torch.int8: 32}


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Replaces every 2:4 SparseLinear by an nn.Linear with a semi-structured weight, in place; on an NVIDIA GPU.

    ValueError names the first layer that torch cannot take so, before anything is replaced.
    """
    layers = {n: m for n, m in sparse_layers(model).items() if m.spec["format"] == "nm24"}
    if not layers:
        raise ValueError("the model has no 2:4 layer; fix: compress it with the format nm24")
    for name, layer in layers.items():
        if reason := _unfit(layer):
            raise ValueError(f"{name} {reason}; fix: gossamer.export writes it dense")
    for name, layer in layers.items():
        model.set_submodule(name, _linear(layer))
    return model


def _unfit(layer: SparseLinear) -> str | None:
    spec, dtype = layer.spec, layer.decode().dtype
    if (spec["n"], spec["m"]) != (2, 4):
        return f"is {spec['n']}:{spec['m']} sparse, torch takes 2:4"
    if dtype not in TAKES:
        return f"holds {dtype}, torch takes float16, bfloat16 and int8"
    if any(size % MULTIPLE[dtype] for size in spec["shape"]):
        return f"is {spec['shape'][0]} x {spec['shape'][1]}, torch takes multiples of {MULTIPLE[dtype]}"
    if layer.device.type != "cuda":
        return f"is on {layer.device}, torch makes such tensors on a GPU"
    return None


def _linear(layer: SparseLinear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    weight = torch.sparse.to_sparse_semi_structured(layer.decode())
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made
