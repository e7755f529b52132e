"""CoSpaDi's own solver: batched orthogonal matching pursuit, then K-SVD by power iteration; the reference.

Section 3 and appendix A.3, A.8 of arXiv 2509.22075: random rows of the data as first atoms, exactly s entries per
code, one atom after the other replaced by the rank-1 approximation (8 power iterations) of what the others leave of the
rows that use it, 60 alternations. An atom that nothing uses is left as it is. The first dimension is a batch, so that
many layers of one shape are solved at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
SEED = 42
CHUNK_BYTES = 4 << 30  # of the triangular factors that the pursuit keeps per row


def learn(a: Tensor, k: int, s: int, iterations: int, power: int = 8) -> tuple[Tensor, Tensor]:
    """(codes [b, M, k], atoms [b, k, K]) for rows `a` [b, M, K], float32."""
    atoms = random_rows(a, k)
    codes = a.new_zeros(*a.shape[:2], k)
    for _ in range(iterations):
        codes = omp(a, atoms, s)
        codes, atoms = sweep(a, codes, atoms, power)
    return codes, atoms


def random_rows(a: Tensor, k: int) -> Tensor:
    """k rows of `a`, a random choice without repetition while there are enough, of unit length."""
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(a.shape[1], generator=generator) for _ in range(-(-k // a.shape[1]))]
    atoms = a[:, torch.cat(orders)[:k].to(a.device)].clone()
    if k > a.shape[1]:  # a row that is there twice would be one atom twice
        noise = torch.randn(atoms.shape, generator=generator).to(atoms)
        atoms[:, a.shape[1] :] += 0.1 * atoms.norm(dim=-1, keepdim=True)[:, a.shape[1] :] * noise[:, a.shape[1] :]
    return atoms / atoms.norm(dim=-1, keepdim=True).clamp_min(EPS)


def omp(a: Tensor, atoms: Tensor, s: int) -> Tensor:
    """Orthogonal matching pursuit: exactly s entries per row, unit atoms; codes [b, M, k]."""
    per_row = 4 * s * (s + 2)
    step = max(1, CHUNK_BYTES // (per_row * a.shape[0]))
    gram = atoms @ atoms.mT
    return torch.cat([_omp(rows @ atoms.mT, gram, s) for rows in a.split(step, dim=1)], dim=1)


def _omp(target: Tensor, gram: Tensor, s: int) -> Tensor:
    """On correlations `target` [b, m, k] = A B^T and `gram` [b, k, k] = B B^T.

    `inverse` is L^-1, L the Cholesky factor of the Gram of the atoms chosen so far: a new atom appends one row to it,
    and that row times one number is what the least-squares values change by.
    """
    b, m, _ = target.shape
    entry = torch.arange(b, device=target.device)[:, None].expand(b, m)
    inverse = target.new_zeros(b, m, s, s)
    chosen = torch.zeros(b, m, s, dtype=torch.long, device=target.device)
    values, codes, rest = target.new_zeros(b, m, s), torch.zeros_like(target), target
    taken = torch.zeros_like(target, dtype=torch.bool)
    for i in range(s):
        pick = rest.abs().masked_fill_(taken, -1).argmax(-1, keepdim=True)
        taken.scatter_(-1, pick, True)
        column = gram[entry, pick.squeeze(-1)]
        before = inverse[..., :i, :i]
        w = before @ column.gather(-1, chosen[..., :i]).unsqueeze(-1)
        diagonal = (column.gather(-1, pick) - w.square().sum(-2)).clamp_min(EPS).sqrt()
        inverse[..., i, :i] = -(w.mT @ before).squeeze(-2) / diagonal
        inverse[..., i, i] = 1 / diagonal.squeeze(-1)
        chosen[..., i] = pick.squeeze(-1)
        values[..., : i + 1] += rest.gather(-1, pick) / diagonal * inverse[..., i, : i + 1]
        codes.scatter_(-1, chosen[..., : i + 1], values[..., : i + 1])
        rest = torch.baddbmm(target, codes, gram, alpha=-1)
    return codes


def sweep(a: Tensor, codes: Tensor, atoms: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """One pass of K-SVD over all atoms: new codes and atoms."""
    codes, atoms = codes.clone(), atoms.clone()
    rest = torch.baddbmm(a, codes, atoms, alpha=-1)
    for i in range(atoms.shape[1]):
        old_code, old_atom = codes[:, :, i, None], atoms[:, None, i]
        code, atom = _rank_one(rest, old_code, old_atom, power)
        rest.baddbmm_(old_code, old_atom).baddbmm_(code, atom, alpha=-1)
        codes[:, :, i, None], atoms[:, None, i] = code, atom
    return codes, atoms


def _rank_one(rest: Tensor, code: Tensor, atom: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """Power iteration on rest + code atom over the rows that use the atom: code [b, M, 1], unit atom [b, 1, K]."""
    used = code != 0
    part = torch.where(used, torch.baddbmm(rest, code, atom), 0)
    # Of unit Frobenius norm, the largest singular value lies in [K^-1/2, 1]: no step needs a normalisation of its own.
    size = part.square().sum((1, 2), keepdim=True).sqrt().clamp_min(EPS)
    scaled, v = part / size, atom
    for _ in range(power):
        v = (scaled @ v.mT).mT @ scaled
    v = v / v.norm(dim=-1, keepdim=True)
    fitted = part @ v.mT
    fine = torch.isfinite(v).all(-1, keepdim=True) & used.any(1, keepdim=True)
    return torch.where(fine, fitted, code), torch.where(fine, v, atom)
