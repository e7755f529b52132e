"""Metric learning with codes that search fast: ArcFace embeddings of digits, dense against sparse.

The shape of the experiments of the FLOPs paper (arXiv 2004.05665, sec. 5.1) on the 1,797 digits of 8 x 8 pixels that
come with scikit-learn. Name the multiplications per comparison (`flops`); the weight of the penalty finds itself.

    python examples/sparse_digits.py
"""

import torch
from torch import Tensor, nn

from gossamer.retrieval.controller import FlopsRegularizer
from gossamer.retrieval.flops import flops, unevenness
from gossamer.retrieval.head import SparseHead
from gossamer.retrieval.losses import ArcFace


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    return nn.functional.normalize((pixels - pixels.mean(0)).float(), dim=1), labels.long()


def precision(codes: Tensor, labels: Tensor, k: int = 10) -> float:
    """Share of the k nearest others of each row that are of its class."""
    near = (codes @ codes.T).fill_diagonal_(-1.0).topk(k, dim=1).indices
    return (labels[near] == labels[:, None]).float().mean().item()


def learn(x: Tensor, labels: Tensor, target: float | None, steps: int) -> nn.Module:
    torch.manual_seed(0)
    head = SparseHead(128, 256, "sthresh", threshold=0.02)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), head)
    arcface = ArcFace(256, 10, scale=16.0, margin=0.3)
    penalty = None if target is None else FlopsRegularizer(flops=target, steps=steps)
    optimizer = torch.optim.Adam([*model.parameters(), *arcface.parameters()], lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        codes = model(x[rows])
        loss = arcface(codes, labels[rows]) + (penalty(codes) if penalty else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main(target: float = 1.0, steps: int = 300) -> tuple[float, float, float]:
    x, labels = digits()
    for asked in (None, target):
        codes = learn(x[:1200], labels[:1200], asked, steps)(x[1200:]).detach()
        cost, found = flops(codes), precision(codes, labels[1200:])
        print(f"{asked=}: {cost:.2f} FLOPs, columns {unevenness(codes):.2f}, precision@10 {found:.3f}")
    return cost, found, precision(x[1200:], labels[1200:])


if __name__ == "__main__":
    main()
