"""Knowledge distillation of a text encoder into its own sparse copy, from text without labels.

The teacher is the dense model. The student learns every layer's hidden states (arXiv 1909.10351), the sentence
embedding, and how the texts of a batch rank each other, which is what retrieval uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import block_modules, find
from ..retrieval.losses import listwise_kl
from ..work import replacing
from .gradual import BlockPruner

Pool = Literal["mean", "cls"]


class Distiller(nn.Module):
    """A student and what it has to learn from a frozen teacher; both are transformers encoders of the same depth.

    `forward(input_ids, attention_mask)` returns {"loss", "hidden", "embedding", "similarity"}, so transformers' Trainer
    trains it as it is (`remove_unused_columns=False`). `hidden`, `embedding`, `similarity` weigh the parts, 0 leaves
    one out. Only the student is in `parameters()` and `state_dict()`; its dropout stays off, as the teacher's is.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        hidden: float = 1.0,
        embedding: float = 1.0,
        similarity: float = 1.0,
        pool: Pool = "mean",
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        depths = [getattr(m.config, "num_hidden_layers", None) for m in (student, teacher)]
        if depths[0] != depths[1]:
            raise ValueError(f"the student has {depths[0]} layers, the teacher {depths[1]}; fix: start from its copy")
        if student is teacher:
            raise ValueError("student and teacher are the same module; fix: teacher=copy.deepcopy(student)")
        if min(hidden, embedding, similarity) < 0 or not hidden + embedding + similarity:
            raise ValueError("the weights of the losses are at least 0, and one is above")
        self.student, self.weights = student, {"hidden": hidden, "embedding": embedding, "similarity": similarity}
        self.pool: Pool = pool
        self.temperature = temperature
        self._teacher = (teacher.eval(),)  # a tuple: no submodule
        self._blocks = tuple(block_modules(model, find(model)) for model in (student, teacher))
        self._hidden_loss = hidden_loss
        self.train()

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def _moved(self, device: torch.device) -> nn.Module:
        """The teacher, which follows the inputs: nothing else would move what is no submodule."""
        return self.teacher if next(self.teacher.parameters()).device == device else self.teacher.to(device)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` [batch, length]; without a mask nothing is padding."""
        inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad():
            taught = states(self._moved(input_ids.device), self._blocks[1], inputs)
        learnt = states(self.student, self._blocks[0], inputs)
        student, teacher = (embed(h[-1], mask, self.pool) for h in (learnt, taught))
        parts: dict[str, Tensor] = {}
        if self.weights["hidden"]:
            parts["hidden"] = self._hidden_loss(learnt, taught, mask)
        if self.weights["embedding"]:
            parts["embedding"] = (1 - (student * teacher).sum(-1)).mean()
        if self.weights["similarity"]:
            with torch.autocast(input_ids.device.type, enabled=False):  # bfloat16 is too coarse for the temperature
                parts["similarity"] = listwise_kl(student, teacher, self.temperature)
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Blocks of both models and the loss on hidden states go through torch.compile, once for all lengths.

        Hooks inside a block are not called: `fit` runs the steps that a pruner observes without it.
        """
        blocks = [block for model in self._blocks for block in model]
        before = [vars(block).get("forward") for block in blocks]  # None: the class's own
        try:
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=True)
            self._hidden_loss = torch.compile(hidden_loss, dynamic=True)
            yield
        finally:
            self._hidden_loss = hidden_loss
            for block, forward in zip(blocks, before, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward


def states(model: nn.Module, blocks: list[nn.Module], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What each block of an encoder gives, [batch, length, width] each; the last is the model's own last hidden state.

    As `output_hidden_states=True` without the embeddings, but it leaves no hooks, which would break up compiled graphs.
    """
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        last = model(**inputs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return (*found[:-1], last)


def embed(hidden: Tensor, mask: Tensor, pool: Pool = "mean") -> Tensor:
    """Sentence embeddings: unit rows [batch, width] in float32, from [batch, length, width] and a 0/1 mask."""
    if pool == "cls":
        return F.normalize(hidden[:, 0].float(), dim=-1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1).float(), dim=-1)  # the mean's length does not matter


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Squared error over the teacher's variance, over tokens that are not padding; mean over layers."""
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs, weight = theirs.float(), mask.unsqueeze(-1).float()
        centred = (theirs - (theirs * weight).sum((0, 1)) / weight.sum()) * weight
        losses.append(((ours.float() - theirs).square() * weight).sum() / centred.square().sum().clamp_min(1e-6))
    return torch.stack(losses).mean()


def one_cycle(step: int, steps: int, warmup: float = 0.05) -> float:
    """Share of the learning rate at `step` of `steps`: a linear rise over `warmup` of them, then a linear fall to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def fit(
    distiller: Distiller,
    batch: Callable[[int], Mapping[str, Tensor]],
    steps: int,
    lr: float = 5e-4,
    pruner: BlockPruner | None = None,
    *,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    clip: float = 1.0,
    checkpoint: str | Path | None = None,
    every: int = 500,
    log: Callable[[int, dict[str, float]], object] | None = None,
    log_every: int = 50,
) -> None:
    """A plain training loop: AdamW over what requires a gradient, warm-up and linear decay, masks after each step.

    `batch(step)` gives the model's inputs, on its device; let it depend on the step alone, and a resumed run repeats
    what an uninterrupted one does. `dtype`: of autocast. `compiled`: through torch.compile, where a GPU and many steps
    make up for the wait. `checkpoint`: a file that is written every `every` steps and resumed from, and is yours to
    remove. `log(step, losses)` gets the means of every `log_every` steps.

    FloatingPointError when the loss is no longer finite; ValueError for a student that is frozen.
    """
    trained = [p for p in distiller.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing of the student requires a gradient; fix: student.requires_grad_()")
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    start = _resume(checkpoint, distiller, optimizer, pruner)
    seen: list[dict[str, Tensor]] = []
    with distiller.compiled() if compiled else nullcontext():
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * one_cycle(step, steps)
            seen.append(_losses(distiller, batch(step), dtype, pruner))
            nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if pruner:
                pruner.step(step + 1)
            if (step + 1) % log_every == 0 or step + 1 == steps:
                _report(step + 1, seen, log)
                seen.clear()
            if checkpoint and ((step + 1) % every == 0 or step + 1 == steps):
                _save(Path(checkpoint), step + 1, distiller, optimizer, pruner)


def _losses(
    distiller: Distiller, inputs: Mapping[str, Tensor], dtype: torch.dtype | None, pruner: BlockPruner | None
) -> dict[str, Tensor]:
    """Forward and backward. Compiled code would not call the hooks of a pruner that observes."""
    observed = pruner is not None and pruner.observing
    with torch.compiler.set_stance("force_eager") if observed else nullcontext():
        with torch.autocast(next(distiller.parameters()).device.type, dtype, enabled=dtype is not None):
            losses = distiller(**inputs)
        losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}


def _report(step: int, seen: list[dict[str, Tensor]], log: Callable[[int, dict[str, float]], object] | None) -> None:
    means = {name: float(torch.stack([losses[name] for losses in seen]).mean()) for name in seen[0]}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss is {means['loss']} at step {step}; fix: a smaller lr, or dtype=bfloat16")
    if log:
        log(step, means)


def _save(
    path: Path, step: int, distiller: Distiller, optimizer: torch.optim.Optimizer, pruner: BlockPruner | None
) -> None:
    state = {"step": step, "model": distiller.state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(path) as part:
        torch.save(state | ({"pruner": pruner.state_dict()} if pruner else {}), part)


def _resume(
    path: str | Path | None, distiller: Distiller, optimizer: torch.optim.Optimizer, pruner: BlockPruner | None
) -> int:
    """The step to go on with."""
    if path is None or not Path(path).exists():
        return 0
    state = torch.load(path, map_location=next(distiller.parameters()).device, weights_only=True)
    distiller.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if pruner:
        if "pruner" not in state:
            raise KeyError(f"{path} holds no masks; fix: resume without a pruner, or start over with another file")
        pruner.load_state_dict(state["pruner"])
    return int(state["step"])
