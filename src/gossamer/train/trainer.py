"""2:4 pre-training under the Trainer of transformers: one callback steps, logs, saves and resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .measures import mu
from .sparsifier import Sparsifier


class Sparse24Callback(TrainerCallback):
    """`Sparse24Callback(sparsify(model, SSTE(), steps=...)).install(trainer)`, or one of `Trainer(callbacks=[...])`.

    Logs flip_rate and three_zeros, and mu where `dense_flips` {step: rate} of a dense run are given. Keeps the state of
    the run in every checkpoint and continues from it. Changes nothing else.
    """

    FILE = "gossamer_24.pt"

    def __init__(self, sparsifier: Sparsifier, dense_flips: Mapping[int, float] | None = None) -> None:
        self.sparsifier, self.dense_flips = sparsifier, dense_flips or {}
        self._optimizer: Any = None

    def install(self, trainer: Any) -> Sparse24Callback:
        """Stand before the trainer's reporters (TensorBoard, ...), which otherwise log before this callback adds."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        planned = self.sparsifier.schedule.steps
        if planned is not None and planned != state.max_steps:
            raise ValueError(
                f"the run was planned for {planned} steps, the trainer takes {state.max_steps}; fix: "
                f"sparsify(..., steps={state.max_steps})"
            )
        self._optimizer = kwargs.get("optimizer")
        if state.global_step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)

    def _resume(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, so the masks of this run are lost; fix: resume from a "
                "checkpoint that was saved with Sparse24Callback"
            )
        self.sparsifier.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sparsifier.before_step(self._optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sparsifier.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        measured = self.sparsifier.metrics()
        if logs is None or not measured:
            return
        found = {name: measured[name] for name in ("flip_rate", "three_zeros")}
        step = int(measured["step"])
        if step in self.dense_flips:
            found["mu"] = mu({step: measured["flip_rate"]}, self.dense_flips)
        logs |= found
        state.log_history[-1] |= found  # the trainer copied the logs into it before it called us

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = self.sparsifier.state_dict()  # on every rank: it may gather
        if state.is_world_process_zero:
            torch.save(kept, Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)
