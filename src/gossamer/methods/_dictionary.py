"""Sparse dictionary learning as a handful of large matrix products; the default solver of `cospadi`.

For rows A [b, M, K] (whitened weights) find codes S [b, M, k], `select`ed entries per row, and atoms B [b, k, K] that
minimise ||A - S B||_F. The first dimension is a batch. Three stages:

1. eigen start: the leading right singular vectors, up to min(k, M, K) of them;
2. Procrustes rounds: for orthonormal atoms S = select(A B^T) is the exact best code, and B = polar(S^T A) the exact
   best orthonormal dictionary for it. Where k is larger, the leading directions of what is left over follow;
3. alternate: hard-thresholding pursuit for S (a gradient step picks the support, conjugate gradients on that support
   give the values), then least squares for B. A round that does not lower the error is undone.

Stage 2 is the core of COMPOT (arXiv 2602.15200), the pursuit in 3 is GeoPair's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import pad

Select = Callable[[Tensor], Tensor]  # scores [b, M, k] -> bool mask: which codes of each row may be non-zero

EPS = 1e-12

# Length of the gradient step that picks supports. The textbook's 1 / ||B B^T|| (about 0.1 here) moves so few entries
# that forty rounds leave up to twice the error of a step of 2.5 (SmolLM2's gate and up at ratio 0.3); a round that
# overshoots is undone and shortens the step.
STRIDE = 2.5


def learn(a: Tensor, k: int, select: Select, iterations: int, procrustes: int, steps: int) -> tuple[Tensor, Tensor]:
    """(S, B) for `a` [b, M, K], float32; `iterations` of stage 3 with `steps` conjugate gradient steps each."""
    codes, atoms = codes_best, atoms_best = _start(a, k, select, procrustes)
    best = _loss(a, codes, atoms)
    stride = torch.full_like(best, STRIDE)
    for _ in range(iterations):
        codes, atoms = normalised(codes_best, atoms_best, a)
        codes = pursue(a, codes, atoms, select, steps, stride[:, None, None])
        atoms = least_squares(a, codes)
        loss = _loss(a, codes, atoms)
        better = loss < best  # NaN is not better: an entry that broke down keeps its last good pair
        best, stride = torch.where(better, loss, best), torch.where(better, stride, 0.8 * stride)
        codes_best = torch.where(better[:, None, None], codes, codes_best)
        atoms_best = torch.where(better[:, None, None], atoms, atoms_best)
    return codes_best, atoms_best


def _loss(a: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
    return (a - codes @ atoms).square().sum((-2, -1))


def _start(a: Tensor, k: int, select: Select, rounds: int) -> tuple[Tensor, Tensor]:
    rank = min(k, *a.shape[-2:])
    atoms = leading(a, rank)
    for _ in range(rounds):
        atoms = polar(_threshold(a @ atoms.mT, k, select).mT @ a)
    codes = _threshold(a @ atoms.mT, k, select)
    if rank == k:
        return codes, atoms
    return _overcomplete(a, codes, atoms, k, select)


def _overcomplete(a: Tensor, codes: Tensor, atoms: Tensor, k: int, select: Select) -> tuple[Tensor, Tensor]:
    """More atoms than directions: the leading directions of what is left over, as often as it takes."""
    while (missing := k - atoms.shape[-2]) > 0:
        rest = a - codes[..., : atoms.shape[-2]] @ atoms
        atoms = torch.cat([atoms, leading(rest, min(missing, *a.shape[-2:]))], dim=-2)
        wide = pad(codes, (0, atoms.shape[-2] - codes.shape[-1]))
        codes = pursue(a, wide, atoms, lambda scores: select(_widened(scores, k))[..., : scores.shape[-1]], 20)
    return codes, atoms


def _threshold(scores: Tensor, k: int, select: Select) -> Tensor:
    """The codes for orthonormal atoms; chosen, while there are fewer than k, as if the missing ones never mattered."""
    mask = select(_widened(scores.abs(), k))[..., : scores.shape[-1]]
    return torch.where(mask, scores, 0)


def _widened(scores: Tensor, k: int) -> Tensor:
    return pad(scores, (0, k - scores.shape[-1]), value=-1.0)


def leading(a: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors of `a` as rows, from the Gram of its short side in float64."""
    m, k = a.shape[-2:]
    wide = a.double()
    if k <= m:
        return eigenvectors(wide.mT @ wide)[..., -rank:].mT.to(a.dtype).contiguous()
    left = eigenvectors(wide @ wide.mT)[..., -rank:]
    right = left.mT @ wide
    return (right / right.norm(dim=-1, keepdim=True).clamp_min(EPS)).to(a.dtype)


def eigenvectors(gram: Tensor) -> Tensor:
    """The eigenvectors of symmetric matrices [b, n, n] as columns, by ascending eigenvalue.

    On a GPU torch takes the matrices of a batch one after the other, and one of this size leaves most of it idle: four
    threads, a stream each, keep it busy.
    """
    if not gram.is_cuda or gram.shape[0] < 2:
        return torch.linalg.eigh(gram).eigenvectors
    ready = torch.cuda.current_stream(gram.device)

    def solve(part: Tensor) -> Tensor:
        stream = torch.cuda.Stream(gram.device)
        stream.wait_stream(ready)
        with torch.cuda.stream(stream):
            found = torch.linalg.eigh(part).eigenvectors
        stream.synchronize()
        found.record_stream(ready)
        return found

    with ThreadPoolExecutor(4) as pool:
        return torch.cat(list(pool.map(solve, gram.chunk(4))))


def polar(b: Tensor) -> Tensor:
    """The orthonormal rows nearest to `b` [.., k, K], k <= K, by products alone.

    Newton-Schulz: nine quintic steps lift the small singular values (3.4-fold each, the coefficients of Muon), six
    cubic ones send all to 1. Directions below ~1e-5 of the largest stay short, which the least squares that follow
    mend. An eigensolver in float32 does not converge on some real Grams; in float64 it takes most of the time on a GPU.
    """
    x = b / b.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(EPS)
    for _ in range(9):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    for _ in range(6):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


def pursue(a: Tensor, codes: Tensor, atoms: Tensor, select: Select, steps: int, stride: Tensor | float = 1.0) -> Tensor:
    """One round of hard-thresholding pursuit: new supports from a gradient step, values from masked CG.

    For unit atoms and codes that are optimal on their support, a step of length 1 compares what each entry in use would
    cost to drop with what each unused one would gain alone; see STRIDE.
    """
    gram, target = atoms @ atoms.mT, a @ atoms.mT
    gradient = torch.baddbmm(target, codes, gram, alpha=-1)
    mask = select((codes + stride * gradient).abs())
    return masked_cg(gram, target, torch.where(mask, codes, 0), mask.to(a.dtype), steps)


def masked_cg(gram: Tensor, target: Tensor, codes: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Per row: argmin_s s H s^T / 2 - s t^T over the support, `steps` of CG from `codes` (zero off the mask).

    H is singular on some supports once atoms outnumber what a row can tell apart; a direction without curvature ends
    that row's search instead of dividing by it.
    """
    codes = codes.clone()
    rest = torch.baddbmm(target, codes, gram, alpha=-1).mul_(mask)
    p, q = rest.clone(), torch.empty_like(rest)
    energy = _dot(rest, rest)
    floor = energy * 1e-10
    for _ in range(steps):
        torch.bmm(p, gram, out=q)
        curvature = _dot(p, q)  # p is zero off the support, so q need not be masked for this
        alive = (curvature > EPS * _dot(p, p)) & (energy > floor)
        alpha = torch.where(alive, energy / curvature, 0)
        codes.addcmul_(alpha, p)
        rest.addcmul_(alpha, q.mul_(mask), value=-1)
        renewed = _dot(rest, rest)
        p.mul_(torch.where(alive, renewed / energy, 0)).add_(rest)
        energy = renewed
    return codes


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)


def least_squares(a: Tensor, codes: Tensor) -> Tensor:
    """B = argmin ||A - S B||: (S^T S + ridge)^-1 S^T A; an atom that no code uses comes out as zero."""
    gram = codes.mT @ codes
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(EPS)
    eye = torch.eye(gram.shape[-1], dtype=a.dtype, device=a.device)
    factor, _ = torch.linalg.cholesky_ex(gram + 1e-6 * level * eye)
    return solved(factor, codes.mT @ a)


def solved(factor: Tensor, target: Tensor) -> Tensor:
    """(L L^T)^-1 target; torch.cholesky_solve would loop over the batch on a GPU."""
    half = torch.linalg.solve_triangular(factor, target, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def normalised(codes: Tensor, atoms: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms of unit length, codes scaled to match; a dead atom is replaced by the worst-explained row."""
    norms = atoms.norm(dim=-1)
    dead = norms <= 1e-6 * norms.amax(dim=-1, keepdim=True)
    scale = torch.where(dead, 1, norms)
    codes, atoms = codes * scale.unsqueeze(-2), atoms / scale.unsqueeze(-1)
    if dead.any():
        atoms = torch.where(dead.unsqueeze(-1), _worst_rows(a - codes @ atoms, dead), atoms)
        codes = codes.masked_fill(dead.unsqueeze(-2), 0)
    return codes, atoms


def _worst_rows(rest: Tensor, dead: Tensor) -> Tensor:
    """[.., k, K]: for the i-th dead atom the unit row with the i-th largest error; other entries are unused."""
    order = rest.norm(dim=-1).argsort(dim=-1, descending=True)
    rank = (dead.long().cumsum(-1) - 1).clamp_min(0) % order.shape[-1]
    index = order.gather(-1, rank)
    rows = rest.gather(-2, index.unsqueeze(-1).expand(*index.shape, rest.shape[-1]))
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(EPS)
