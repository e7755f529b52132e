"""Trains a graph convolutional network on Cora; every product with the adjacency matrix is `spmm(csr, x)`.

    python examples/gcn.py cora.npz

The file holds `adj_indptr`, `adj_indices`, features as CSR (`x_indptr` ...), labels `y`, `train_idx` and `test_idx`.
In PyTorch Geometric or DGL the same line stands in a layer's message passing.
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.matrix import spmm


class Gcn(nn.Module):
    def __init__(self, adjacency: Tensor, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.adjacency = adjacency
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(spmm(self.adjacency, self.first(F.dropout(x, 0.5, self.training))))
        return spmm(self.adjacency, self.second(F.dropout(x, 0.5, self.training)))


def normalised(pointers: Tensor, cols: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 of a symmetric A, as CSR."""
    n = len(pointers) - 1
    rows = torch.repeat_interleave(torch.arange(n), pointers.diff())
    index = torch.cat([torch.stack([rows, cols]), torch.arange(n).expand(2, n)], 1)
    degree = torch.bincount(index[0], minlength=n).float()
    values = (degree[index[0]] * degree[index[1]]).rsqrt()
    return torch.sparse_coo_tensor(index, values, (n, n), check_invariants=True).coalesce().to_sparse_csr()


def main(path: str, epochs: int = 200) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    pointers, cols, counts = (found[f"x_{k}"] for k in ("indptr", "indices", "data"))
    x = torch.sparse_csr_tensor(pointers, cols, counts.float(), tuple(found["x_shape"])).to_dense()
    x, y = F.normalize(x, p=1).to(device), found["y"].long().to(device)
    model = Gcn(normalised(found["adj_indptr"], found["adj_indices"]), x.shape[1], 16, int(y.max()) + 1).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(epochs):
        adam.zero_grad()
        F.cross_entropy(model(x)[found["train_idx"]], y[found["train_idx"]]).backward()
        adam.step()
    right = (model.eval()(x).argmax(1) == y)[found["test_idx"]].float().mean()
    print(f"test accuracy {right:.3f}")
    return float(right)


if __name__ == "__main__":
    main(sys.argv[1])
