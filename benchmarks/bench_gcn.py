"""A training step of a graph convolutional network (Kipf and Welling 2017): `SparseMatrix` against torch.sparse.

    python benchmarks/bench_gcn.py --data DATA

Two layers, hidden width 128 to 512, features as wide as the hidden layer, 16 classes, Adam; a step is forward, loss,
backward and update, replayed as a CUDA graph on both sides. torch.sparse runs as CSR, and as COO, which cannot be
captured; the faster counts. The adjacency matrix is float32 on both sides; `variant` says what ours rounds to; its
kernels are chosen by measuring, before the steps are timed. Accuracy is that of Cora's public split, the mean of five
seeds; without a GPU it is all that is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spmm_matrices
from gossamer import timing
from gossamer.matrix import SparseMatrix
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "gcn.jsonl"
WIDTHS = (128, 256, 512)
CLASSES, SEEDS, EPOCHS, EAGER = 16, 5, 200, 20
VARIANTS = {"fp32": None, "tf32": "tf32", "bf16": "bf16"}
Product = Callable[[Tensor], Tensor]


class Gcn(nn.Module):
    def __init__(self, features: int, hidden: int, classes: int, product: Product, dropout: float = 0.5) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, classes)
        self.product, self.dropout = product, dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.product(self.first(F.dropout(x, self.dropout, self.training))))
        return self.product(self.second(F.dropout(x, self.dropout, self.training)))


def normalised(n: int, rows: np.ndarray, cols: np.ndarray, device: torch.device) -> Tensor:
    """D^-1/2 (A + A^T + I) D^-1/2 as a torch.sparse_csr tensor, every edge once."""
    own = np.arange(n)
    index = torch.from_numpy(np.stack([np.concatenate([rows, cols, own]), np.concatenate([cols, rows, own])])).long()
    keys = torch.unique(index[0] * n + index[1])
    index = torch.stack([keys // n, keys % n]).to(device)
    degree = torch.bincount(index[0], minlength=n).float()
    values = (degree[index[0]] * degree[index[1]]).rsqrt()
    return torch.sparse_coo_tensor(index, values, (n, n), is_coalesced=True).to_sparse_csr()


def products(a: Tensor, variants: dict[str, str | None], *widths: int) -> dict[str, Product]:
    coo = a.to_sparse_coo()
    found: dict[str, Product] = {"torch_csr": partial(torch.sparse.mm, a), "torch_coo": partial(torch.sparse.mm, coo)}
    for variant, precision in variants.items():
        own = SparseMatrix(a, precision, measure=True).prepare(*widths).prepare(*widths, transposed=True)
        found[variant] = own.mm
    return found


def step_of(product: Product, n: int, width: int, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Gcn(width, width, CLASSES, product).to(device)
    adam = torch.optim.Adam(model.parameters(), 0.01, capturable=True)
    x, y = torch.randn(n, width, device=device), torch.randint(0, CLASSES, (n,), device=device)

    def step() -> None:
        adam.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        adam.step()

    return step


def step_times(name: str, a: Tensor) -> None:
    """A line per width and variant, and the worst as the summary of the graph."""
    ratios: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for width in WIDTHS:
        steps = {k: step_of(p, a.shape[0], width, a.device) for k, p in products(a, VARIANTS, width, CLASSES).items()}
        times = {}
        for key, step in steps.items():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):  # as torch asks for before capturing a backward pass
                for _ in range(3):
                    step()
            torch.cuda.synchronize()
            times[key] = eager(step) if key == "torch_coo" else timing.race({key: [step]}, a.device, 0.02)[key]
        base = min(v for k, v in times.items() if k.startswith("torch"))
        for variant in VARIANTS:
            case = {"graph": name, "width": width, "variant": variant}
            line = {"bench": "gcn", "case": case, "ours": times[variant], "baseline": "torch.sparse, CSR or COO"}
            line |= {"baseline_value": base, "unit": "us", "ratio": base / times[variant]}
            append(RESULTS, line | environment("cuda"))
            ratios[variant].append(base / times[variant])
        print(name, width, {k: round(v, 1) for k, v in times.items()}, flush=True)
    kept = {k: environment("cuda")[k] for k in ("machine", "commit", "date")}
    for variant, found in ratios.items():
        line = {"bench": "gcn", "summary": "step_ratio", "case": {"graph": name, "variant": variant}}
        line |= {"value": round(min(found), 3), "sense": ">=", "must": 1.3, "unit": "", "n": len(found)}
        append(RESULTS, line | kept)


def eager(step: Callable[[], None]) -> float:
    """Microseconds on the GPU of a step that cannot be captured, launched ahead as far as it lets itself."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)
    begin.record()
    for _ in range(EAGER):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / EAGER


def accuracy(data: Path, device: torch.device) -> None:
    found = np.load(data / "graphs" / "cora.npz")
    n = len(found["adj_indptr"]) - 1
    a = normalised(n, np.repeat(np.arange(n), np.diff(found["adj_indptr"])), found["adj_indices"], device)
    pointers, cols, counts = (torch.from_numpy(found[k]) for k in ("x_indptr", "x_indices", "x_data"))
    x = torch.sparse_csr_tensor(pointers, cols, counts.float(), tuple(found["x_shape"]))
    x = F.normalize(x.to_dense(), p=1).to(device)
    y = torch.from_numpy(found["y"].astype(np.int64)).to(device)
    train, test = (torch.from_numpy(found[k]).to(device) for k in ("train_idx", "test_idx"))
    variants: dict[str, str | None] = {"fp32": None, "bf16": "bf16"} if device.type == "cuda" else {"fp32": None}
    for name, product in products(a, variants, 16, int(y.max()) + 1).items():
        scores = [trained(product, x, y, train, test, seed) for seed in range(SEEDS)]
        print("cora", name, scores)
        case = {"graph": "cora", "variant": name}
        line = {"bench": "gcn", "summary": "test_accuracy", "case": case, "value": round(sum(scores) / SEEDS, 4)}
        kept = {k: environment(device.type)[k] for k in ("machine", "commit", "date")}
        append(RESULTS, line | {"sense": ">=", "must": None, "unit": "", "n": SEEDS} | kept)


def trained(product: Product, x: Tensor, y: Tensor, train: Tensor, test: Tensor, seed: int) -> float:
    """Test accuracy after training with the paper's settings."""
    torch.manual_seed(seed)
    model = Gcn(x.shape[1], 16, int(y.max()) + 1, product).to(x.device)
    adam = torch.optim.Adam(model.parameters(), 0.01, weight_decay=5e-4)
    for _ in range(EPOCHS):
        adam.zero_grad()
        F.cross_entropy(model(x)[train], y[train]).backward()
        adam.step()
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y)[test].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real graphs")
    parser.add_argument(
        "--only", nargs="*", help="graphs, or `cora` for the accuracy", default=["pubmed", "rmat_1M", "cora"]
    )
    asked = parser.parse_args()
    timing.LAUNCHES = 5
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graphs = {
        "pubmed": dict(spmm_matrices.real(asked.data)).get("pubmed"),
        "rmat_1M": lambda: spmm_matrices.rmat(16, 16),
    }
    for name, make in graphs.items():
        if device.type == "cuda" and name in asked.only and make:
            _, shape, rows, cols = make()
            step_times(name, normalised(shape[0], rows, cols, device))
    if "cora" in asked.only:
        accuracy(asked.data, device)


if __name__ == "__main__":
    main()
