"""Weights that are DTensors: what this rank holds of them, and of tensors that were made from the whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def is_sharded(a: Tensor) -> bool:
    return isinstance(a, DTensor)


def local(a: Tensor) -> Tensor:
    """This rank's part, without gradient."""
    return a.to_local().detach() if isinstance(a, DTensor) else a.detach()


def whole(a: Tensor) -> Tensor:
    """All of it, on every rank of its mesh (a collective), without gradient."""
    return a.full_tensor().detach() if isinstance(a, DTensor) else a.detach()


def part(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full`, which every rank has, that matches this rank's part of `like`; scalars as they are."""
    if not isinstance(like, DTensor) or full.ndim == 0:
        return full
    if all(type(p) in (Shard, Replicate) for p in like.placements):
        return _cut(full, like)  # redistribute, which knows other placements, takes the host 40 times as long
    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(full, like.device_mesh, everywhere).redistribute(placements=like.placements).to_local()


def _cut(full: Tensor, like: DTensor) -> Tensor:
    """A view: of each dimension of the mesh this rank's piece of torch.chunk, empty where there is none."""
    for i, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            pieces, mine = full.chunk(like.device_mesh.size(i), placement.dim), like.device_mesh.get_local_rank(i)
            full = pieces[mine] if mine < len(pieces) else full.narrow(placement.dim, 0, 0)
    return full


def like(held: Tensor, a: Tensor) -> Tensor:
    """This rank's part of something of `a`'s shape -> a DTensor where `a` is one."""
    if not isinstance(a, DTensor):
        return held
    return DTensor.from_local(held, a.device_mesh, a.placements, shape=a.shape, stride=a.stride())


def summed(counts: Tensor, like: Tensor) -> Tensor:
    """Counts over this rank's part of `like` -> over all of it, on every rank (a collective where `like` is cut)."""
    if not isinstance(like, DTensor):
        return counts
    how = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    return DTensor.from_local(counts, like.device_mesh, how).full_tensor()


def check_groups(name: str, weight: Tensor) -> None:
    """ValueError where a rank's part of a DTensor cuts a group of four along in_features."""
    if isinstance(weight, DTensor) and weight.to_local().shape[-1] % 4:
        raise ValueError(
            f"{name}: the shard {tuple(weight.to_local().shape)} of {tuple(weight.shape)} cuts a group of four inputs; "
            "fix: in_features / ranks must be a multiple of 4, or shard this layer along out_features"
        )


def finite(a: Tensor) -> Tensor:
    """A bool scalar on the device, of this rank's part."""
    return torch.isfinite(local(a)).all()
