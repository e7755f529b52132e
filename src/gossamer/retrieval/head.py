"""`SparseHead`: a linear layer and a sparse activation that turn dense embeddings into sparse codes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import activations
from .activations import SThresh, TopK, keep_largest


class SparseHead(nn.Module):
    """codes = normalise(activation(W x + b)): (..., input_dim) -> (..., dim), unit rows with exact zeros.

    `activation`: relu, sthresh (option `threshold`) or topk (options `k`, `start`). `decode` goes back with W^T,
    tied, for the reconstruction that training without labels asks for. A row of zeros stays one.
    """

    def __init__(self, input_dim: int, dim: int, activation: str = "topk", **options: float) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, dim)
        self.activation = activations.create(activation, **options)
        self.offset = nn.Parameter(torch.zeros(input_dim))
        self.reset()

    def reset(self) -> None:
        """Rows in random directions, so that W^T decodes; of unit length, or such that a threshold passes a third."""
        size = 1.0
        if isinstance(self.activation, SThresh) and self.activation.threshold > 0:
            size = self.activation.threshold * self.linear.in_features**0.5
        with torch.no_grad():
            self.linear.weight.copy_(size * nn.functional.normalize(torch.randn_like(self.linear.weight), dim=1))
            self.linear.bias.zero_()

    def forward(self, x: Tensor, max_active_dims: int | None = None) -> Tensor:
        """Codes of `x`; `max_active_dims` keeps at most that many non-zeros a row."""
        codes = self.activation(self.linear(x - self.offset))
        if max_active_dims is not None:
            codes = keep_largest(codes, max_active_dims)
        return nn.functional.normalize(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """(..., dim) -> (..., input_dim), up to scale: the codes are unit vectors."""
        return codes @ self.linear.weight

    def anneal(self, progress: float) -> None:
        """Tell an annealed activation how far training is (0 to 1)."""
        if isinstance(self.activation, TopK):
            self.activation.anneal(progress)

    def config(self) -> dict:
        """What `SparseHead(**config)` needs to build this head again."""
        sizes = {"input_dim": self.linear.in_features, "dim": self.linear.out_features}
        return sizes | self.activation.config()  # type: ignore[operator]
