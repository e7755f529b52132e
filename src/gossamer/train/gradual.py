"""Gradual block pruning: sparsity rises along a cubic while the model learns, then the masks stand still.

Zhu & Gupta 2017 (arXiv 1710.01878, eq. 1) is the schedule; choosing blocks by the Gram of the layers' inputs and
solving for the survivors at each rise is `methods.block`, here on the model as it is in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import patterns
from ..formats.bsr_int8 import ROWS, BsrInt8
from ..layers import find, first_input, is_linear, replace
from ..methods.block import Block
from ..nn import SparseLinear
from ..stats import Stats

WATCH = 4  # steps before masks are chosen in which inputs are observed


@dataclass(frozen=True)
class Cubic:
    """Sparsity after a number of optimizer steps: `initial` up to `begin`, `final` from `end` on.

    In between it is raised every `every` steps. ValueError for numbers that make no such curve.
    """

    final: float
    begin: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise ValueError(f"sparsity goes from {self.initial} to {self.final}; fix: 0 <= initial <= final < 1")
        if not (0 <= self.begin <= self.end and self.every >= 1):
            raise ValueError(
                f"steps {self.begin} to {self.end}, every {self.every}: fix: 0 <= begin <= end, every >= 1"
            )

    def __call__(self, step: int) -> float:
        done = min(1.0, max(0.0, (step - self.begin) / max(1, self.end - self.begin)))
        reached = self.initial + (self.final - self.initial) * (1 - (1 - done) ** 3)
        return self.final if step >= self.end else reached

    def due(self, step: int) -> bool:
        """Whether masks are chosen after this step."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def soon(self, step: int) -> bool:
        """Whether the inputs that step `step` sees are to be observed."""
        return any(self.due(s) for s in range(step, step + WATCH))


class BlockPruner:
    """Keeps a model's linear layers block-sparse while any optimizer trains them.

    `step(n)` goes after the n-th `optimizer.step()`, n from 1: it chooses masks when `schedule` says so and zeroes
    what is pruned. Parameters stay the model's own. `layers`: full names; by default every linear layer of the
    model's blocks, so not embeddings, pooler and heads. `score`: as of `methods.block`, with its `width` and
    `damp`; each layer is pruned to the same sparsity. Padding counts as input: batches of like lengths are best.

    Under DDP statistics are summed over the processes, so that all choose alike; sharded weights (FSDP) are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Cubic,
        layers: Iterable[str] | None = None,
        score: str = "obs",
        width: int = 1,
        damp: float = 0.01,
    ) -> None:
        self.model, self.schedule = model, schedule
        self.method = Block(score=score, width=width, rounds=1, damp=damp)
        groups = [(name,) for name in layers] if layers is not None else [g for b in find(model) for g in b.groups]
        self.groups = [tuple((name, _weight(model, name)) for name in group) for group in groups]
        # A weight that comes block-sparse stays so before the first choice, too.
        self.masks = {name: self._mask(weight) for name, weight in self._weights()}
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._hooks: list[Any] = []
        self._step = 0
        self._attend()

    def step(self, step: int | None = None) -> None:
        """To be called after `optimizer.step()`; `step` counts those from 1, by default every call is one."""
        self._step = self._step + 1 if step is None else step
        if self.schedule.due(self._step):
            self.choose(self.schedule(self._step))
        self.apply()
        self._attend()

    @property
    def observing(self) -> bool:
        """Whether the next step's inputs are observed, by hooks on layers; at other times a model has none of them."""
        return bool(self._hooks)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what is pruned."""
        torch._foreach_mul_([w.data for _, w in self._weights()], list(self.masks.values()))

    @torch.no_grad()
    def choose(self, sparsity: float) -> None:
        """Prune every layer to `sparsity` by what was observed since the last time, and solve for what is left."""
        for group in self.groups:
            stats = self._stats(group[0][0])
            for name, weight in group:
                total = patterns.block_sums(self.masks[name], width=self.method.width).numel()
                weight.copy_(self.method.prune(weight, stats, max(1, round((1 - sparsity) * total))))
                self.masks[name] = self._mask(weight)
        self._seen.clear()

    def sparsity(self) -> float:
        """Share of zeros in the masks, over all layers."""
        kept = sum(float(m.sum()) for m in self.masks.values())
        return 1 - kept / sum(m.numel() for m in self.masks.values())

    def state_dict(self) -> dict[str, Any]:
        """Masks, and what was observed for the next choice of them."""
        masks = {name: mask.bool() for name, mask in self.masks.items()}
        return {"step": self._step, "masks": masks, "seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """KeyError unless the state is of the same layers."""
        masks = state["masks"]
        if masks.keys() != self.masks.keys():
            names = ", ".join(sorted(masks.keys() ^ self.masks.keys())[:3])
            raise KeyError(f"the saved masks are of other layers ({names}); fix: prune the same layers as before")
        self._step = state["step"]
        self.masks = {name: masks[name].to(weight) for name, weight in self._weights()}
        device = next(iter(self.masks.values())).device
        self._seen = {name: (gram.to(device), count) for name, (gram, count) in state["seen"].items()}
        self.apply()
        self._attend()

    def close(self) -> None:
        """Stop observing; the weights stay as they are."""
        while self._hooks:
            self._hooks.pop().remove()

    def _attend(self) -> None:
        """Hooks for the next step, if its inputs are to be observed."""
        wanted = self.method.score != "magnitude" and self.schedule.soon(self._step + 1)
        if not wanted:
            self.close()
        elif not self._hooks:
            self._hooks = [self._watch(group[0][0]) for group in self.groups]

    def finish(self) -> nn.Module:
        """Stop, and store every pruned layer as `bsr_int8`, in place: the model is then one to save or to prepare."""
        self.close()
        for name, weight in self._weights():
            bias = self.model.get_submodule(name).bias
            stored = BsrInt8.encode(weight.detach().float(), (ROWS, self.method.width))
            replace(self.model, name, SparseLinear.from_format(stored, bias))  # type: ignore[arg-type]
        return self.model

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        return [layer for group in self.groups for layer in group]

    def _mask(self, weight: Tensor) -> Tensor:
        """1 for blocks with anything in them, in the dtype of the weight: fused multiplication wants that."""
        used = patterns.block_sums((weight.detach() != 0).float(), width=self.method.width) > 0
        return patterns.spread(used, (weight.shape[0], weight.shape[1]), width=self.method.width).to(weight.dtype)

    def _watch(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                x = first_input(args, kwargs).detach().flatten(0, -2).float()
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    gram, count = self._seen.get(name, (torch.zeros((), device=x.device), 0))
                    self._seen[name] = (gram + x.mT @ x, count + x.shape[0])

        return self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    def _stats(self, name: str) -> Stats | None:
        if self.method.score == "magnitude":
            return None
        if name not in self._seen:
            raise RuntimeError(
                f"{name} saw no training input before its blocks were to be chosen; fix: call step() "
                "after every optimizer step, with the number of steps taken"
            )
        gram, count = self._seen[name]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gram)
        return Stats(gram.double(), count)


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or not is_linear(module):
        raise TypeError(f"{name} is a {type(module).__name__}; fix: name nn.Linear layers")
    if hasattr(module.weight, "to_local"):
        raise TypeError(f"{name}: its weight is sharded; fix: prune under DDP or on one device")
    assert isinstance(module.weight, nn.Parameter)
    return module.weight


def callback(pruner: BlockPruner) -> Any:
    """The pruner as a callback of transformers' Trainer; its masks are saved with, and resumed from, checkpoints."""
    from pathlib import Path

    from transformers import TrainerCallback

    class Prune(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            file = _file(args, state)
            if state.global_step and file.exists():
                pruner.load_state_dict(torch.load(file, weights_only=True, map_location=args.device))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pruner.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None:
                logs["sparsity"] = pruner.sparsity()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and _file(args, state).parent.is_dir():
                torch.save(pruner.state_dict(), _file(args, state))

    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "gossamer_masks.pt"

    return Prune()
