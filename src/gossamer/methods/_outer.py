"""Sparse dictionary learning with the dictionary on the outputs: W = U S, U [M, k] dense, S [k, K] sparse columns.

A dictionary costs k numbers per row of the side that it is on, so it belongs on the short side: for the 576 x 1536
down-projection of SmolLM2 at ratio 0.3 that buys 480 atoms instead of 340, and a third of the error. The input's Gram G
then couples the columns of S: || (W - U S) C ||^2 = tr((W - U S) G (W - U S)^T), one problem instead of one per code.

The same alternation as `_dictionary`: a gradient step picks the support, conjugate gradients on the support give the
values, least squares gives U. Everything is a product with G or with a k x k matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dictionary import EPS, Select, eigenvectors, normalised, solved

# First length of the gradient step that picks supports, and what a round that overshoots leaves of it. As in
# `_dictionary`; the coupling of the columns makes long steps overshoot sooner. A 2:4 support changes only where an
# entry overtakes one of its own four: it takes longer steps for longer (SmolLM2's block 11 at ratio 0.2, 120 rounds:
# 0.0181 of v's output lost instead of 0.0204).
FREE, PATTERN = (1.5, 0.8), (6.0, 0.9)


def learn(
    w: Tensor,
    gram: Tensor,
    k: int,
    select: Select,
    iterations: int,
    steps: int,
    strides: tuple[float, float] = FREE,
) -> tuple[Tensor, Tensor]:
    """(U [b, M, k], S [b, k, K]) for `w` [b, M, K] under `gram` [b, K, K] with a unit diagonal, k <= M; float32.

    `select` maps scores [b, k, K] to the mask of the codes; `strides` is FREE, or PATTERN where it is bound to one.
    """
    seen = w @ gram
    energy = (seen * w).sum((-2, -1))
    atoms = eigenvectors((seen @ w.mT).double())[..., -k:].to(w.dtype)
    codes = atoms.mT @ w
    codes = torch.where(select(codes.abs()), codes, 0)
    atoms, best = _least_squares(seen, codes, codes @ gram, energy)
    atoms_best, codes_best = atoms, codes
    stride = torch.full_like(best, strides[0])
    for _ in range(iterations):
        codes, atoms = (t.mT for t in normalised(codes_best.mT, atoms_best.mT, w.mT))
        codes, image = _pursue(seen, gram, codes, atoms, select, steps, stride[:, None, None])
        atoms, loss = _least_squares(seen, codes, image, energy)
        better = loss < best  # NaN is not better
        best, stride = torch.where(better, loss, best), torch.where(better, stride, strides[1] * stride)
        codes_best = torch.where(better[:, None, None], codes, codes_best)
        atoms_best = torch.where(better[:, None, None], atoms, atoms_best)
    return atoms_best, codes_best


def _pursue(
    seen: Tensor, gram: Tensor, codes: Tensor, atoms: Tensor, select: Select, steps: int, stride: Tensor
) -> tuple[Tensor, Tensor]:
    """New codes for unit atoms, and codes @ gram."""
    inner, target = atoms.mT @ atoms, atoms.mT @ seen
    gradient = torch.baddbmm(target, inner, codes @ gram, alpha=-1)
    mask = select((codes + stride * gradient).abs())
    codes, mask = torch.where(mask, codes, 0), mask.to(codes.dtype)
    image = codes @ gram
    rest = torch.baddbmm(target, inner, image, alpha=-1).mul_(mask)
    p, energy = rest.clone(), _dot(rest, rest)
    for _ in range(steps):
        seen_p = p @ gram
        q = torch.bmm(inner, seen_p).mul_(mask)
        curvature = _dot(p, q)
        alpha = torch.where(curvature > EPS * _dot(p, p), energy / curvature, 0)
        codes.addcmul_(alpha, p)
        image.addcmul_(alpha, seen_p)
        rest.addcmul_(alpha, q, value=-1)
        renewed = _dot(rest, rest)
        p.mul_(torch.where(energy > 0, renewed / energy, 0)).add_(rest)
        energy = renewed
    return codes, image


def _least_squares(seen: Tensor, codes: Tensor, image: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """U = argmin for these codes, and the loss that is left."""
    inner, target = image @ codes.mT, seen @ codes.mT
    level = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(EPS)
    ridge = 1e-6 * level * torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    factor, _ = torch.linalg.cholesky_ex(inner + ridge)
    atoms = solved(factor, target.mT).mT
    return atoms, energy + (atoms * (atoms @ inner - 2 * target)).sum((-2, -1))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """One number per batch entry, [b, 1, 1]."""
    return (x * y).sum((-2, -1), keepdim=True)
