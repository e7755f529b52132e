"""Static activation quantisation: which scale and zero point, from what was seen in calibration.

uint8 q = round(x / scale) + zero; the range always holds 0, which padding and ReLU make common, exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .stats import CalibrationError

KEPT = 1 << 18  # values of every observed tensor at most, evenly spaced
STEPS = 64  # of the search for the least squared error
LEVELS = 255


class Range:
    """Collects activations; `minmax`, `percentile` and `mse` answer (scale, zero)."""

    def __init__(self) -> None:
        self._low, self._high = 0.0, 0.0
        self._sample: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Any shape and float dtype. CalibrationError if NaN or Inf is among it."""
        flat = x.detach().flatten().float()
        if not flat.numel():
            return
        low, high = (float(v) for v in torch.aminmax(flat))
        if not (torch.tensor([low, high]).isfinite()).all():
            raise CalibrationError(
                "NaN or Inf among the activations; fix: calibrate in float32 or bfloat16, and check the model first"
            )
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._sample.append(flat[:: -(-flat.numel() // KEPT)].clone())

    def minmax(self) -> tuple[float, int]:
        """Nothing is cut off."""
        return affine(self._low, self._high)

    def percentile(self, share: float = 0.9999) -> tuple[float, int]:
        """`share` of the values are within; ValueError unless it is above 0.5 and at most 1."""
        if not 0.5 < share <= 1:
            raise ValueError(f"a share is above 0.5 and at most 1, not {share}")
        values = self._values().sort().values
        cut = int((1 - share) / 2 * (len(values) - 1))
        return affine(float(values[cut]), float(values[len(values) - 1 - cut]))

    def mse(self) -> tuple[float, int]:
        """The least squared error of all ranges that are the seen one times 1/64, 2/64 .. 1."""
        values = self._values()
        found = [affine(self._low * i / STEPS, self._high * i / STEPS) for i in range(1, STEPS + 1)]
        return min(found, key=_error(values))

    def _values(self) -> Tensor:
        if not self._sample:
            raise CalibrationError("no activations were observed; fix: run the model on a calibration text first")
        return torch.cat(self._sample)


def affine(low: float, high: float) -> tuple[float, int]:
    """(scale, zero) so that `low` .. `high`, stretched to hold 0, maps to 0 .. 255; (1, 0) if both are 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / LEVELS, torch.finfo(torch.float32).tiny)
    return (1.0, 0) if low == high else (scale, min(LEVELS, max(0, round(-low / scale))))


def _error(values: Tensor) -> Callable[[tuple[float, int]], float]:
    def of(found: tuple[float, int]) -> float:
        scale, zero = found
        back = ((values / scale).round_().add_(zero).clamp_(0, LEVELS) - zero) * scale
        return float((back - values).square_().double().mean())

    return of
