"""From a dense model to one that a kind of machine runs fast. So far: encoders for CPUs, int8 in blocks of 4x1."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import layers as finder
from . import methods
from .methods.block import Block
from .plan import Plan, Rule, plan

RISE = 0.35  # of the steps of a distillation, in which sparsity rises
CHOICES = 12  # of masks, on the way
SAVES = 20  # checkpoints of a distillation


def cpu(model_or_dir: nn.Module | str | Path, sparsity: float = 0.8, rules: Sequence[Rule] = (), **knobs: Any) -> Plan:
    """A plan that prunes every linear layer of the blocks to `sparsity` in 4x1 blocks and stores it as `bsr_int8`.

    `rules` as in `gossamer.plan`, `knobs` of the method `block`. One-shot: for much sparsity, `distill` first.
    """
    model = model_or_dir if isinstance(model_or_dir, nn.Module) else finder.skeleton(model_or_dir)
    block = methods.create("block", format="bsr_int8", **knobs)
    assert isinstance(block, Block)
    names = [name for found in finder.find(model) for group in found.groups for name in group]
    ratios = {name: block.ratio(finder.shape_of(model.get_submodule(name)), sparsity) for name in names}
    each = [Rule(name, None, ratio) for name, ratio in ratios.items()]
    return plan(model_or_dir, "block", max(ratios.values()), [*each, *rules], format="bsr_int8", **knobs)


def distill(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    sparsity: float = 0.8,
    steps: int = 6000,
    lr: float = 8e-4,
    *,
    tokens: int = 16_384,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, Mapping[str, float]], object] | None = None,
) -> nn.Module:
    """Prune a text encoder gradually while it learns from its dense self, in place; its layers end as `bsr_int8`.

    `texts`: anything of the domain, without labels, a megabyte or more. `tokens` per step; embeddings stay as they
    are. `checkpoint`: a file that makes the run resumable, with the same arguments and a freshly loaded model.
    """
    from .train.distill import Distiller, fit
    from .train.gradual import BlockPruner, Cubic
    from .train.spans import Spans

    device = torch.device(device or "cpu")
    model.to(device)
    longest = min(256, getattr(model.config, "max_position_embeddings", 256) - 2)
    spans = Spans.of(texts, tokenizer, longest, tokens, device=device)
    distiller = Distiller(model, copy.deepcopy(model))
    for parameter in getattr(getattr(model, "base_model", model), "embeddings", nn.Module()).parameters():
        parameter.requires_grad_(False)
    rise = max(1, round(RISE * steps))
    pruner = BlockPruner(model, Cubic(sparsity, 0, rise, max(1, rise // CHOICES)))
    dtype = torch.bfloat16 if device.type == "cuda" else None
    every = max(1, steps // SAVES)
    fit(distiller, spans, steps, lr, pruner, dtype=dtype, checkpoint=checkpoint, every=every, log=progress)
    pruner.finish()
    return model.requires_grad_(False)


def copy_pipeline(source: Path, out: Path) -> None:
    """What makes a folder a sentence-transformers model, besides the encoder: modules.json and what it names."""
    listing = source / "modules.json"
    if not listing.is_file():
        return
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, out)
    for folder in (source / module["path"] for module in json.loads(listing.read_text()) if module["path"]):
        if folder.is_dir() and folder.resolve().parent == source.resolve():  # a listing cannot name others' folders
            shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)
