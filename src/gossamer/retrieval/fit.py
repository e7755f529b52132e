"""Training a head without labels on embeddings that are there already: minutes on a CPU, no encoder in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .head import SparseHead
from .losses import listwise_kl, reconstruction

ANNEALING = 0.6  # share of the steps after which top-k has reached its k
POOL = 2048  # rows among which a neighbour is looked for


def fit_head(
    head: SparseHead,
    dense: Tensor | Sequence[Tensor],
    penalty: Callable[[Tensor], Tensor] | None,
    steps: int = 1000,
    batch: int = 512,
    rate: float = 1e-3,
    temperature: float = 0.05,
    reconstruction_weight: float = 1.0,
    seed: int = 0,
    notify: Callable[[int, float], object] | None = None,
) -> SparseHead:
    """Trains `head` to keep the similarities of `dense` (n, input_dim), unit rows; returns it, in eval mode.

    `dense` may be several collections: each gives an equal share of every batch, ranks its own rows and pays its own
    FLOPs, for a search stays inside one collection. Half of a share are random rows, half near neighbours of those.
    `penalty`: a `FlopsRegularizer`, or any function of codes (2 x collections, rows, dim), or None.
    `notify(step, loss)` is called after every step. Matrix products run in bfloat16.
    """
    sets = [dense] if isinstance(dense, Tensor) else list(dense)
    width, half = head.linear.in_features, batch // (2 * len(sets))
    if half < 2 or any(len(s) < 2 or s.shape[1] != width for s in sets):
        shapes = [tuple(s.shape) for s in sets]
        raise ValueError(
            f"want (n >= 2, {width}) and batch >= {4 * len(sets)}, got {shapes} and {batch}; fix: the head's "
            "input_dim or the batch"
        )
    picks, device = torch.Generator().manual_seed(seed), head.linear.weight.device
    with torch.no_grad():
        head.offset.copy_(torch.stack([s.mean(0) for s in sets]).mean(0))
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    head.train()
    for step in range(steps):
        x = torch.stack([_share(s, half, picks) for s in sets]).to(device)
        head.anneal(step / (ANNEALING * steps))
        with torch.autocast(device.type, torch.bfloat16):
            codes = head(x)
            decoded = head.decode(codes)
        codes = codes.float()
        loss = listwise_kl(codes, x, temperature)
        loss = loss + reconstruction_weight * reconstruction(decoded.float(), x - head.offset)
        if penalty is not None:
            loss = loss + penalty(codes.view(2 * len(sets), half, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if notify is not None:
            notify(step, loss.item())
    return head.eval()


def _share(rows: Tensor, half: int, picks: torch.Generator) -> Tensor:
    """(2 half, d): random rows, then for each of them its nearest among other random rows.

    Neighbours are what the top of a ranking is made of, and random batches of a large collection hold none.
    """
    pool = rows[torch.randint(len(rows), (half + POOL,), generator=picks)]
    asked, others = pool[:half], pool[half:]
    close = asked @ others.T
    return torch.cat([asked, others[close.masked_fill(close > 1 - 1e-4, -1).argmax(1)]])  # not the row itself


def _rate(step: int, steps: int) -> float:
    """Thirty steps up, then half a cosine down to 2 %."""
    return min(1.0, (step + 1) / 30) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
