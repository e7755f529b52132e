"""What the codes should keep: similarities of a dense teacher, pairs, triplets or classes. Plain tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def listwise_kl(codes: Tensor, dense: Tensor, temperature: float = 0.05) -> Tensor:
    """KL(softmax(dense similarities / T) || softmax(code similarities / T)), mean over rows.

    `codes` (..., batch, d) and `dense` (..., batch, d'), unit rows; each row ranks the others of its batch.
    """
    own = torch.eye(codes.shape[-2], dtype=torch.bool, device=codes.device)
    student, teacher = ((x @ x.mT).float().masked_fill(own, -1e4) / temperature for x in (codes, dense.detach()))
    log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


def reconstruction(decoded: Tensor, dense: Tensor) -> Tensor:
    """1 - cosine, mean over rows: what is lost of the direction of `dense` (..., d')."""
    return (1 - F.cosine_similarity(decoded, dense.detach(), dim=-1)).mean()


def contrastive(anchors: Tensor, others: Tensor, temperature: float = 0.05) -> Tensor:
    """InfoNCE: anchor i (batch, d) belongs to row i of `others` (n >= batch, d); the rows after are negatives."""
    target = torch.arange(len(anchors), device=anchors.device)
    return F.cross_entropy(anchors @ others.T / temperature, target)


def triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float = 0.2) -> Tensor:
    """max(0, a.n - a.p + margin) on unit rows (batch, d), mean over rows."""
    return (((anchors * negatives).sum(1) - (anchors * positives).sum(1)) + margin).clamp_min(0).mean()


class ArcFace(nn.Module):
    """Additive angular margin over classes (arXiv 1801.07698), the metric loss of the paper's experiments (sec. 5.1).

    `forward(codes, labels)`: cross entropy of scale * cos(angle + margin at the true class). Unit codes (batch, dim).
    """

    def __init__(self, dim: int, classes: int, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) / dim**0.5)
        self.scale, self.margin = scale, margin

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        cosine = codes @ F.normalize(self.weight, dim=1).T
        own = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        angle = (own.acos() + self.margin).clamp_max(torch.pi)
        return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], angle.cos()), labels)
