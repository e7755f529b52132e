"""Training sparse encoders with sentence-transformers' trainer: one loss and one callback.

    loss = SparseLoss(model, FlopsRegularizer(flops=1.0, steps=2000))
    trainer = SparseEncoderTrainer(model, args, train_dataset, loss=loss, callbacks=[FlopsCallback(loss)])

A head alone, on embeddings that are there already, trains faster: see fit.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .activations import TopK
from .controller import FlopsRegularizer
from .fit import ANNEALING
from .losses import contrastive, listwise_kl, reconstruction, triplet


class SparseLoss(nn.Module):
    """What codes should keep, plus what they may cost.

    `keep`: "similarities" needs no labels: every column of texts of the dataset is ranked by a dense teacher and
    decoded back. "pairs" takes columns (anchor, positive, negatives...), "triplets" (anchor, positive, negative).
    The teacher is the head's own input where the encoder is frozen; where it learns, pass the dense encoder as
    `teacher`. `two_encoders`: the first column asks, the others are indexed; the cost is that of such searches.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: FlopsRegularizer | None,
        keep: Literal["similarities", "pairs", "triplets"] = "similarities",
        teacher: nn.Module | None = None,
        temperature: float = 0.05,
        margin: float = 0.2,
        reconstruction_weight: float = 1.0,
        two_encoders: bool = False,
    ) -> None:
        super().__init__()
        if keep not in ("similarities", "pairs", "triplets"):
            raise ValueError(f"keep={keep!r} is unknown; fix: similarities, pairs or triplets")
        if keep == "similarities" and teacher is None and _encoder_learns(model):
            raise ValueError(
                "the encoder learns, so its own embeddings cannot teach it; fix: SparseLoss(..., teacher=dense_encoder)"
            )
        self.model, self.regularizer, self.keep = model, regularizer, keep
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.temperature, self.margin = temperature, margin
        self.reconstruction_weight, self.two_encoders = reconstruction_weight, two_encoders

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """One dict of features per column -> the parts of the loss, which the trainer adds up and logs."""
        columns = [dict(f) for f in sentence_features]
        taught = self._taught(columns)
        self._anneal()
        outputs = [self.model(f) for f in columns]
        codes = [o["sentence_embedding"] for o in outputs]
        dense = taught if taught is not None else [o.get("dense_embedding") for o in outputs]
        losses = {self.keep: self._kept(codes, dense)}
        if self.training and self.reconstruction_weight:
            decoded = torch.cat([o["decoded_embedding"] for o in outputs])
            losses["reconstruction"] = self.reconstruction_weight * reconstruction(decoded, torch.cat(dense))
        if self.regularizer is not None:
            losses["penalty"] = self._cost(codes)
        return losses

    def _kept(self, codes: list[Tensor], dense: list[Tensor]) -> Tensor:
        if self.keep == "similarities":
            return listwise_kl(torch.cat(codes), torch.cat(dense), self.temperature)
        if self.keep == "pairs":
            return contrastive(codes[0], torch.cat(codes[1:]), self.temperature)
        return triplet(codes[0], codes[1], codes[2], self.margin)

    def _cost(self, codes: list[Tensor]) -> Tensor:
        assert self.regularizer is not None
        if self.two_encoders:
            return self.regularizer(torch.cat(codes[1:]), codes[0])
        return self.regularizer(torch.cat(codes))

    @torch.no_grad()
    def _taught(self, columns: list[dict[str, Any]]) -> list[Tensor] | None:
        if self.teacher is None:
            return None
        found = [self.teacher(dict(f))["sentence_embedding"] for f in columns]
        return [nn.functional.normalize(f, dim=-1) for f in found]

    def _anneal(self) -> None:
        if self.regularizer is None:
            return
        for module in self.model.modules():
            if isinstance(module, TopK):
                module.anneal(self.regularizer.progress / ANNEALING)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        cost = {} if self.regularizer is None else self.regularizer.get_config_dict()
        return {"keep": self.keep, "temperature": self.temperature} | cost


def _encoder_learns(model: nn.Module) -> bool:
    before = list(model.children())[:-1]
    return any(p.requires_grad for module in before for p in module.parameters())


class FlopsCallback(TrainerCallback):
    """Logs what the codes cost and the weight of the penalty; keeps the schedule in checkpoints, to resume it."""

    FILE = "gossamer_flops.json"

    def __init__(self, loss: SparseLoss) -> None:
        if loss.regularizer is None:
            raise ValueError("the loss has no regularizer to follow; fix: leave the callback out")
        self.regularizer = loss.regularizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
        if state.global_step and file.exists():
            self.regularizer.schedule.load_state_dict(json.loads(file.read_text()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None:
            unit = "nonzeros" if self.regularizer.counts_nonzeros else "flops"
            found = {unit: self.regularizer.measured, "flops_weight": self.regularizer.schedule.weight}
            logs |= found
            if state.log_history:  # the trainer copied the logs into it before it called us
                state.log_history[-1] |= found

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / self.FILE).write_text(json.dumps(self.regularizer.schedule.state_dict()))
