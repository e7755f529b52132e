"""What each method promises beyond the contract."""

import itertools

import pytest
import torch
from torch import Tensor

from gossamer import formats, methods, patterns
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.product import Product
from gossamer.methods import RatioError, _dictionary, _ksvd
from gossamer.stats import Stats


def layer(m: int = 96, k: int = 64, seed: int = 0) -> tuple[Tensor, Stats, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x = x * torch.logspace(0, -1, k)
    return torch.randn(m, k, generator=generator), Stats((x.mT @ x).double(), 1024), x


def error(name: str, ratio: float = 0.4, **knobs: object) -> float:
    weight, stats, _ = layer()
    found = methods.create(name, **knobs).fit([weight], stats, ratio)[0]
    return stats.relative_error(weight, found.decode(torch.float32))


def test_more_knowledge_means_less_error() -> None:
    assert error("sparsegpt") < error("wanda") < error("magnitude")
    assert error("cospadi") < error("svd")


def test_more_bytes_mean_less_error() -> None:
    for name in methods.registry:
        assert error(name, 0.2) < error(name, 0.4) < error(name, 0.6)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_pruning_to_n_of_m(name: str, n: int, m: int) -> None:
    weight, stats, _ = layer()
    method = methods.create(name, format="nm24", n=n, m=m)
    with pytest.raises(RatioError, match=r"stores .* at ratio (0\.\d+), not 0.01; fix: ask for ratio") as caught:
        method.size([(96, 64)], 0.01)
    ratio = float(str(caught.value).split("at ratio ")[1].split(",")[0])
    found = method.fit([weight], stats, ratio)[0]
    assert (found.decode() != 0).view(96, -1, m).sum(-1).max() <= n
    assert found.nbytes == method.size([(96, 64)], ratio)[0]


def test_pruning_keeps_values_or_repairs_them() -> None:
    weight, stats, _ = layer()
    for name, repairs in (("magnitude", False), ("wanda", False), ("sparsegpt", True)):
        found = methods.create(name, dtype="float32").fit([weight], stats, 0.3)[0].decode()
        kept = found != 0
        assert torch.equal(found[kept], weight[kept]) != repairs


def test_sparsegpt_is_the_update_of_its_paper() -> None:
    """One column pruned whole: the others move by the closed form -w_j [H^-1]_j / [H^-1]_jj."""
    weight, stats, _ = layer(8, 12)
    method = methods.create("sparsegpt", damp=0.01)
    inverse = torch.linalg.inv(stats.damped(0.01))
    expected = weight.double() - torch.outer(weight[:, 0].double() / inverse[0, 0], inverse[0])
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w = weight.clone()
    w[:, 0] *= 1e-6  # the smallest scores are all in the first column
    pruned, _ = method._prune_block(w, upper, 8 * 11)
    assert (pruned[:, 0] == 0).all()
    moved = weight.double() * torch.tensor([1e-6] + [1.0] * 11) - pruned.double()
    full = (weight.double() - expected) * 1e-6
    assert torch.allclose(moved[:, 1:], full[:, 1:], atol=1e-6)


def test_svd_is_the_best_of_its_rank() -> None:
    weight, stats, _ = layer()
    found = methods.create("svd", dtype="float32").fit([weight], stats, 0.4)[0]
    assert isinstance(found, Product)
    rank = found.left.shape[1]
    root, _ = stats.root
    values = torch.linalg.svdvals(weight.double() @ root)
    best = float(values[rank:].square().sum() / values.square().sum())
    assert stats.relative_error(weight, found.decode()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("codes", ["bitmask", "nm24"])
def test_one_dictionary_per_group(codes: str) -> None:
    weight, stats, _ = layer()
    group = list(weight.split([32, 48, 16]))
    shared = methods.create("cospadi", codes=codes).fit(group, stats, 0.3)
    alone = methods.create("cospadi", codes=codes, share=False).fit(group, stats, 0.3)
    assert len({f.right.weight.data_ptr() for f in shared}) == 1
    assert len({f.right.weight.data_ptr() for f in alone}) == 3
    assert formats.nbytes(shared) < sum(f.nbytes for f in shared)

    def lost(found: list[formats.Format]) -> float:
        return stats.relative_error(weight, torch.cat([f.decode(torch.float32) for f in found]))

    assert lost(shared) < lost(alone)
    if codes == "nm24":
        for each in shared:
            padded = torch.nn.functional.pad(each.left.decode() != 0, (0, -each.left.shape[1] % 4))
            assert padded.unflatten(1, (-1, 4)).sum(-1).max() <= 2


def test_exactly_s_entries_a_row() -> None:
    weight, stats, _ = layer()
    for solver in ("fast", "ksvd"):
        method = methods.create("cospadi", solver=solver, side="in", iterations=3)
        k, s = (budget := method._budget([(96, 64)], 0.3)).k, budget.s
        left = method.fit([weight], stats, 0.3)[0].left
        assert isinstance(left, Bitmask) and left.shape == (96, k)
        assert ((left.decode() != 0).sum(1) == s).all()


def test_fit_many_equals_fit() -> None:
    problems = [layer(seed=i) for i in range(3)]
    for share in (True, False):
        method = methods.create("cospadi", share=share)
        groups = [list(w.split([64, 32])) for w, _, _ in problems]
        many = method.fit_many(groups, [s for _, s, _ in problems], 0.3)
        for group, (weight, stats, _), found in zip(groups, problems, many, strict=True):
            # Batched products round differently, and supports follow: as good, not the same bits.
            errors = [
                stats.relative_error(weight, torch.cat([f.decode(torch.float32) for f in parts]))
                for parts in (method.fit(group, stats, 0.3), found)
            ]
            assert errors[1] == pytest.approx(errors[0], abs=2e-3) and errors[0] < 0.2


def test_bad_knobs_are_refused() -> None:
    for knobs, text in (
        ({"codes": "csr"}, "codes is"),
        ({"solver": "adam"}, "solver is"),
        ({"rho": 0.5}, "at least 1"),
        ({"side": "in", "codes": "nm24", "solver": "ksvd"}, "free supports"),
        ({"side": "out"}, "side is"),
    ):
        with pytest.raises(ValueError, match=text):
            methods.create("cospadi", **knobs)
    with pytest.raises(ValueError, match="format is"):
        methods.create("wanda", format="csr")
    with pytest.raises(ValueError, match="n of m is 1 <= n <= m <= 16, not 8:20"):
        methods.create("wanda", format="nm24", n=8, m=20)
    for name in methods.registry:
        with pytest.raises(ValueError, match="dtype is a float of 16 bits or more"):
            methods.create(name, dtype="int8")


def test_no_alternation_is_none() -> None:
    assert error("cospadi", iterations=0) > error("cospadi", iterations=20)


def test_methods_that_need_statistics_say_so() -> None:
    for name in methods.registry:
        if methods.registry[name].needs_stats:
            with pytest.raises(ValueError, match="needs calibration statistics"):
                methods.create(name).fit([torch.randn(16, 16)], None, 0.3)


def test_masked_cg_solves_each_row_on_its_support() -> None:
    atoms, a = torch.randn(1, 20, 30), torch.randn(1, 6, 30)
    mask = patterns.top_per_row(torch.rand(1, 6, 20), 7)
    gram, target = atoms @ atoms.mT, a @ atoms.mT
    found = _dictionary.masked_cg(gram, target, torch.zeros(1, 6, 20), mask.float(), 40)
    assert not found[~mask].any()
    for i in range(6):
        support = mask[0, i]
        best = torch.linalg.lstsq(atoms[0, support].mT, a[0, i]).solution
        assert torch.allclose(found[0, i, support], best, atol=1e-4)


def test_masked_cg_survives_directions_without_curvature() -> None:
    atoms = torch.randn(1, 1, 30).expand(1, 20, 30)  # one atom, twenty times
    a = torch.randn(1, 6, 30)
    found = _dictionary.masked_cg(atoms @ atoms.mT, a @ atoms.mT, torch.zeros(1, 6, 20), torch.ones(1, 6, 20), 30)
    assert found.isfinite().all()
    best = (a @ atoms[:, :1].mT) / atoms[:, :1].square().sum(-1, keepdim=True) * atoms[:, :1]
    assert torch.allclose(found @ atoms, best, atol=1e-4)


@pytest.mark.parametrize("k", [12, 40, 100])  # under-, overcomplete, more than two start-ups deep
def test_the_solver_never_gets_worse(k: int) -> None:
    a = torch.randn(2, 60, 32) * torch.logspace(0, -1, 32)

    def loss(iterations: int) -> Tensor:
        codes, atoms = _dictionary.learn(a, k, lambda z: patterns.top_per_row(z, k // 6), iterations, 5, 3)
        assert codes.shape == (2, 60, k) and atoms.shape == (2, k, 32)
        return (a - codes @ atoms).square().sum((1, 2))

    losses = [loss(i) for i in (0, 1, 5, 20)]
    assert all((later <= earlier * (1 + 1e-6)).all() for earlier, later in itertools.pairwise(losses))
    assert (losses[-1] < 0.9 * losses[0]).all()


def test_polar_is_the_nearest_orthonormal_matrix() -> None:
    b = torch.randn(2, 20, 30) * torch.logspace(0, -1.5, 20)[:, None]
    u, _, v = torch.linalg.svd(b, full_matrices=False)
    assert torch.allclose(_dictionary.polar(b), u @ v, atol=2e-3)
    assert _dictionary.polar(torch.zeros(1, 3, 4)).isfinite().all()


def test_dead_atoms_come_back_to_life() -> None:
    a = torch.randn(1, 30, 16)
    codes, atoms = torch.randn(1, 30, 5), torch.randn(1, 5, 16)
    atoms[:, 2] = 0
    codes, atoms = _dictionary.normalised(codes, atoms, a)
    assert torch.allclose(atoms.norm(dim=-1), torch.ones(1, 5))
    assert not codes[..., 2].any()


def test_omp_finds_planted_codes() -> None:
    atoms = torch.linalg.qr(torch.randn(2, 24, 24)).Q[:, :20]
    mask = patterns.top_per_row(torch.rand(2, 15, 20), 4)
    codes = torch.where(mask, torch.randn(2, 15, 20) + 3, 0)
    assert torch.allclose(_ksvd.omp(codes @ atoms, atoms, 4), codes, atol=1e-4)


def test_omp_is_least_squares_on_its_support() -> None:
    atoms = torch.nn.functional.normalize(torch.randn(1, 30, 16), dim=-1)
    a = torch.randn(1, 9, 16)
    codes = _ksvd.omp(a, atoms, 5)
    assert ((codes != 0).sum(-1) == 5).all()
    for i in range(9):
        support = codes[0, i] != 0
        best = torch.linalg.lstsq(atoms[0, support].mT, a[0, i]).solution
        assert torch.allclose(codes[0, i, support], best, atol=1e-3)


def test_ksvd_falls_and_keeps_supports() -> None:
    a = torch.randn(2, 50, 16)
    atoms = _ksvd.random_rows(a, 20)
    codes = _ksvd.omp(a, atoms, 5)
    before = (a - codes @ atoms).square().sum()
    better, atoms = _ksvd.sweep(a, codes, atoms, 8)
    assert (a - better @ atoms).square().sum() < before
    assert torch.equal(better != 0, codes != 0)
    assert torch.allclose(atoms.norm(dim=-1), torch.ones(2, 20), atol=1e-4)


def test_ksvd_atom_update_is_the_best_rank_one() -> None:
    a, used = torch.randn(1, 12, 8), torch.arange(12) < 7
    before = torch.where(used, 1.0, 0.0)[None, :, None]
    code, atom = _ksvd._rank_one(a, before, torch.zeros(1, 1, 8) + 0.3, 16)
    values = torch.linalg.svdvals(a[0, :7] + 0.3)
    lost = (a[0, :7] + 0.3 - code[0, :7] @ atom[0]).square().sum()
    assert lost < 1.02 * values[1:].square().sum() + 0.01 * values[0].square()
    assert not code[0, 7:].any()


def test_ksvd_leaves_an_idle_atom_alone() -> None:
    code, atom = _ksvd._rank_one(torch.randn(2, 6, 4), torch.zeros(2, 6, 1), torch.ones(2, 1, 4), 8)
    assert not code.any() and (atom == 1).all()
