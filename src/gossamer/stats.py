"""What a layer's input looked like in calibration, and the whitening that follows from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

log = logging.getLogger("gossamer")

RIDGE = 1e-6  # of the mean diagonal of the Gram


class CalibrationError(ValueError):
    """Statistics that no method can use (NaN, Inf, no tokens)."""


@dataclass(frozen=True, eq=False)
class Stats:
    """`gram` [K, K] float64: X^T X, uncentred, of `tokens` rows of the input X [tokens, K]."""

    gram: Tensor
    tokens: int

    def check(self, where: str = "layer") -> None:
        """CalibrationError for an empty or non-finite Gram."""
        if self.tokens < 1:
            raise CalibrationError(f"{where}: no calibration tokens reached it; fix: give a longer calibration text")
        if not torch.isfinite(self.gram).all():
            raise CalibrationError(
                f"{where}: NaN or Inf in its calibration activations; fix: calibrate in float32 or bfloat16, "
                "and check the model with `gossamer eval` first"
            )

    def damped(self, ridge: float = RIDGE) -> Tensor:
        """The Gram, made symmetric, plus `ridge` * mean(diagonal); a dead input (all zeros) gets the same ridge."""
        gram = (self.gram + self.gram.mT) / 2
        level = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        return gram + ridge * level * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)

    @cached_property
    def root(self) -> tuple[Tensor, Tensor]:
        """(C, C^-1), float64, with C C^T the damped Gram: ||X E^T||_F = ||E C||_F for an error E [M, K]."""
        gram = self.damped()
        factor, info = torch.linalg.cholesky_ex(gram)
        eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        if int(info) == 0:
            return factor, torch.linalg.solve_triangular(factor, eye, upper=False)
        log.warning("Gram of size %d is not positive definite; using its eigenvalues", gram.shape[0])
        values, vectors = torch.linalg.eigh(gram)
        scale = values.clamp_min(RIDGE * values[-1]).sqrt()
        return vectors * scale, (vectors / scale).mT

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """||X (W - W~)^T||^2 / ||X W^T||^2: the share of the layer's output energy that is lost."""
        error = (weight - approximation).to(self.gram.dtype)
        weight = weight.to(self.gram.dtype)
        lost = torch.einsum("mk,kl,ml->", error, self.gram, error)
        return float(lost / torch.einsum("mk,kl,ml->", weight, self.gram, weight).clamp_min(1e-300))
