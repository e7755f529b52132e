"""`cuda_lscd` beside Sputnik's CSR product in float16: kernels alone, cold weights, one run.

    python benchmarks/bench_lscd_sputnik.py libsputnik.so --out FOLDER

The library is Sputnik's own, built by you; nothing of it is part of Gossamer. Shapes, masks and timing are those of
bench_lscd.py, but every row has an even number of values, as Sputnik wants it. Summary "geomean_vs_sputnik": Sputnik's
time / ours, geometric mean over shapes and tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench_lscd import RESULTS, SHAPES, copies, timed, uniform
from gossamer.formats.bitmask import Bitmask
from gossamer.kernels.cuda_lscd import CudaLscd, launch
from results import append, environment

MUST = {0.5: 3.0, 0.6: 3.0, 0.7: 3.0, 0.8: 2.0, 0.9: 1.5}
SYMBOL = "_ZN7sputnik8CudaSpmmEiiiiPKiPK7__half2S1_PK6short2S4_PS2_P11CUstream_st"  # CudaSpmm in half precision
TOLERANCE = 2e-3


def even_rows(a: Tensor) -> Tensor:
    """Without the first value of rows that have an odd number."""
    odd = (a != 0).sum(1) % 2 == 1
    first = (a != 0).to(torch.uint8).argmax(1)
    a[odd, first[odd]] = 0
    return a


def csr(a: Tensor) -> list[Tensor]:
    """Rows by falling length, values, row offsets, 16-bit columns."""
    counts, (_, columns) = (a != 0).sum(1), (a != 0).nonzero(as_tuple=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return [counts.argsort(descending=True).int(), a[a != 0], offsets, columns.short()]


def sputnik(library: ctypes.CDLL, shape: tuple[int, int], matrix: list[Tensor], x_t: Tensor, y_t: Tensor) -> None:
    """y^T [M, N] = A x^T, x^T [K, N]."""
    rows, values, offsets, columns = matrix
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (rows, values, offsets, columns, x_t, y_t)]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = library[SYMBOL](*shape, x_t.shape[1], values.numel(), *pointers, stream)
    if error:
        raise RuntimeError(f"Sputnik: CUDA error {error}")


def check(y: Tensor, x: Tensor, a: Tensor, who: str) -> None:
    expected = x.float() @ a.float().mT if a.numel() < 1 << 27 else torch.mm(x, a.t()).float()
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise ArithmeticError(f"{who}: relative error {error:.1e} at {tuple(a.shape)}, {len(x)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--sparsities", type=float, nargs="*", default=list(MUST))
    args = parser.parse_args()
    library, path, ratios = ctypes.CDLL(str(args.library.resolve())), args.out / "lscd.jsonl", {}
    torch.manual_seed(0)
    for shape in SHAPES:
        for sparsity in args.sparsities:
            a = even_rows(uniform(*shape, sparsity).half())
            packed = CudaLscd.pack(Bitmask.encode(a), torch.float16)
            ours, theirs = copies(packed.tensors), copies(csr(a))
            for n in args.tokens:
                x = torch.randn(n, shape[1], device="cuda", dtype=torch.float16)
                y, x_t, y_t = x.new_empty(n, shape[0]), x.t().contiguous(), x.new_empty(shape[0], n)
                us, spread = timed([partial(launch, x, s, packed.meta, None, y) for s in ours])
                base, _ = timed([partial(sputnik, library, shape, s, x_t, y_t) for s in theirs], 3)
                check(y, x, a, "cuda_lscd")
                check(y_t.t(), x, a, "Sputnik")
                case = {"shape": list(shape), "sparsity": sparsity, "tokens": n, "variant": "fp16 vs Sputnik"}
                line = {"bench": "lscd", "case": case, "ours": us, "baseline": "Sputnik CSR, half precision"}
                line |= {"baseline_value": base, "unit": "us", "ratio": base / us, "spread": spread}
                append(path, line | environment("cuda"))
                ratios.setdefault(sparsity, []).append(base / us)
    for sparsity, found in ratios.items():
        value = math.prod(found) ** (1 / len(found))
        line = {"bench": "lscd", "summary": "geomean_vs_sputnik", "case": {"sparsity": sparsity}, "value": value}
        append(path, line | {"sense": ">=", "must": MUST[sparsity], "unit": "x", "n": len(found)} | environment("cuda"))
        print(f"{sparsity}: {value:.2f}x of Sputnik (must {MUST[sparsity]}), {min(found):.2f}-{max(found):.2f}")


if __name__ == "__main__":
    main()
