"""2:4 pre-training under Lightning: a mixin, since no callback of Lightning runs between clipping and the step.

Needs no import of Lightning: it overrides five methods of LightningModule by their names.
"""

from __future__ import annotations

from typing import Any

from .sparsifier import Sparsifier


class Lightning24:
    """`class Model(Lightning24, LightningModule)`, with `self.sparsifier = sparsify(self, ...)` in `__init__`.

    Steps after clipping and after the optimizer, for automatic optimization; logs flip_rate and three_zeros; keeps the
    state of the run in Lightning's checkpoints. With manual optimization call the sparsifier's two steps yourself.
    """

    KEY = "gossamer_24"
    sparsifier: Sparsifier
    _resumed: dict[str, Any] | None = None

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)  # type: ignore[misc]
        self.sparsifier.before_step(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        self.sparsifier.after_step()
        if self.sparsifier.step % self.sparsifier.every == 0:
            measured = self.sparsifier.metrics()
            self.log_dict({name: measured[name] for name in ("flip_rate", "three_zeros")})  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[self.KEY] = self.sparsifier.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.KEY not in checkpoint:
            raise KeyError("the checkpoint has no state of 2:4 training; fix: resume from one saved with Lightning24")
        self._resumed = checkpoint[self.KEY]  # the weights are loaded after this hook

    def on_train_start(self) -> None:
        super().on_train_start()  # type: ignore[misc]
        if self._resumed is not None:
            self.sparsifier.load_state_dict(self._resumed)
            self._resumed = None
