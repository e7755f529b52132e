"""What codes cost, the penalty that lowers it, and the controller that meets a target."""

import json
import math
import subprocess
import sys

import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.retrieval.controller import FlopsController, FlopsRegularizer, QuadraticRamp
from gossamer.retrieval.fit import fit_head
from gossamer.retrieval.flops import (
    batch_flops,
    batch_nonzeros,
    flops,
    flops_penalty,
    l1_penalty,
    unevenness,
)
from gossamer.retrieval.head import SparseHead


def signed(n, d, density, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, d, generator=generator) < density
    return torch.randn(n, d, generator=generator) * keep


def multiplications(rows, queries):
    """Counted one by one, as the inverted index would do them."""
    return sum(int(q != 0 and x != 0) for query in queries for row in rows for q, x in zip(query, row, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_flops_is_the_count_of_multiplications(n, m, d, density, seed):
    rows, queries = signed(n, d, density, seed), signed(m, d, density, seed + 1)
    a, b = rows.tolist(), queries.tolist()
    assert flops(rows, queries) == pytest.approx(multiplications(a, b) / (n * m))
    others = sum(multiplications(a[:i] + a[i + 1 :], a[i : i + 1]) for i in range(n))
    assert flops(rows) == pytest.approx(others / (n * (n - 1)))
    assert batch_flops(rows) == pytest.approx(flops(rows))
    assert batch_flops(rows, queries) == pytest.approx(flops(rows, queries))


@pytest.mark.parametrize("stored", ["coo", "csr", "scipy", "scipy array"])
def test_every_layout_counts_the_same_and_no_stored_zero(stored):
    rows = signed(6, 5, 0.6, 3)
    coo = rows.to_sparse().coalesce()
    coo.values()[1] = 0.0
    rows[tuple(coo.indices()[:, 1])] = 0.0
    triple = (coo.values().numpy(), coo.indices().numpy())
    given = {
        "coo": lambda: coo,
        "csr": lambda: coo.to_sparse_csr(),
        "scipy": lambda: scipy.sparse.csr_matrix(triple, shape=(6, 5)),
        "scipy array": lambda: scipy.sparse.csr_array(triple, shape=(6, 5)),
    }[stored]()
    assert flops(given) == pytest.approx(flops(rows))
    assert unevenness(given, given) == pytest.approx(unevenness(rows, rows))


def test_unevenness_is_one_when_columns_are_even():
    even = torch.eye(8).repeat(50, 1)
    assert unevenness(even, even) == pytest.approx(1.0)
    uneven = even.clone()
    uneven[:, 0] = 1.0
    assert unevenness(uneven, uneven) > 2


def test_flops_wants_pairs_of_one_dimension():
    with pytest.raises(ValueError, match="at least 2 rows"):
        flops(torch.ones(1, 4))
    with pytest.raises(ValueError, match="fix: encode both alike"):
        flops(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="at least one of each"):
        flops(torch.ones(3, 4), torch.ones(0, 4))


def test_penalty_takes_magnitudes_and_its_gradient_is_right():
    rows, queries = signed(5, 4, 0.8, 1).double().requires_grad_(), signed(3, 4, 0.8, 2).double().requires_grad_()
    by_hand = sum((rows[:, j].abs().mean() * queries[:, j].abs().mean() for j in range(4)), torch.zeros(()))
    assert flops_penalty(rows, queries).item() == pytest.approx(by_hand.item())
    assert torch.autograd.gradcheck(flops_penalty, (rows[rows != 0].detach().view(1, -1).requires_grad_(),))
    assert torch.autograd.gradcheck(lambda a, b: flops_penalty(a + 3.0, b + 3.0), (rows, queries))
    opposite = torch.tensor([[1.0], [-1.0]])
    assert flops_penalty(opposite) == 1.0  # the sum of means without magnitudes would be 0


def test_penalty_of_indicators_is_flops():
    codes = (signed(400, 30, 0.2, 5) != 0).float()
    assert flops_penalty(codes).item() == pytest.approx(flops(codes, codes), rel=1e-5)


def test_leading_dimensions_are_collections_of_their_own():
    first, second = signed(6, 5, 0.5, 1), signed(6, 5, 0.5, 2)
    both = torch.stack([first, second])
    assert flops_penalty(both).item() == pytest.approx((flops_penalty(first) + flops_penalty(second)).item() / 2)
    assert batch_flops(both) == pytest.approx((flops(first) + flops(second)) / 2)
    assert batch_nonzeros(both) == pytest.approx(both.count_nonzero().item() / 12)
    assert l1_penalty(both).item() == pytest.approx(both.abs().sum().item() / 12)


def test_penalty_pushes_busy_columns_hardest_and_l1_does_not():
    codes = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    flops_penalty(codes).backward()
    assert codes.grad[0, 0] == 4 * codes.grad[0, 1]
    codes.grad = None
    l1_penalty(codes).backward()
    assert codes.grad[0, 0] == codes.grad[0, 1]


# Processes of their own and not forks: torch's threads do not survive a fork.
PROCESS = """
import json, os, pathlib, sys, time, torch
from torch import nn
from gossamer.retrieval.flops import batch_flops, batch_nonzeros, column_means, flops_penalty

folder, rank = pathlib.Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
model = nn.Linear(6, 8)
model.load_state_dict(torch.load(folder / "model.pt"))
model = nn.parallel.DistributedDataParallel(model)
x = torch.load(folder / "x.pt")
mine = model(x[:3] if rank == 0 else x[3:]).relu()
penalty = flops_penalty(mine)
penalty.backward()
found = {"penalty": penalty.item(), "flops": batch_flops(mine), "nonzeros": batch_nonzeros(mine)}
found |= {"means": column_means(mine).tolist(), "grad": model.module.weight.grad.tolist()}
(folder / f"{rank}.json").write_text(json.dumps(found))
while not (folder / f"{1 - rank}.json").exists():
    time.sleep(0.01)
os._exit(0)  # gloo's threads at times abort an interpreter that shuts down
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_have_the_penalty_and_the_gradient_of_one(tmp_path):
    model, x = nn.Linear(6, 8), signed(10, 6, 1.0, 4)  # batches of 3 and 7
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    runs = [subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    codes = model(x).relu()
    penalty = flops_penalty(codes)
    penalty.backward()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["penalty"] == pytest.approx(penalty.item(), rel=1e-5)
        assert found["flops"] == pytest.approx(flops(codes.detach()))
        assert found["nonzeros"] == pytest.approx(codes.count_nonzero().item() / 10)
        assert torch.allclose(torch.tensor(found["means"]), codes.mean(0).detach(), atol=1e-6)
        assert torch.allclose(torch.tensor(found["grad"]), model.weight.grad, atol=1e-6)


def test_quadratic_ramp():
    ramp, weights = QuadraticRamp(8.0, 4), []
    for _ in range(6):
        weights.append(ramp.weight)
        ramp.update(math.nan)
    assert weights == [0.0, 0.5, 2.0, 4.5, 8.0, 8.0]


@pytest.fixture(scope="module")
def dense():
    """Clustered unit vectors that lean one way, as sentence embeddings do."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=generator) + 0.5
    rows = centres[torch.arange(2000) % 40] + 0.7 * torch.randn(2000, 32, generator=generator)
    return nn.functional.normalize(rows, dim=1)


def fitted(dense, penalty, activation="relu", **options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more, and lose much where a core is shared
    torch.manual_seed(0)
    head = SparseHead(32, 256, activation, **options)
    fit_head(head, dense, penalty, steps=200, batch=192, rate=3e-3)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return head(dense)


@pytest.mark.parametrize(
    ("activation", "asked"), [("relu", {"flops": 1.0}), ("sthresh", {"flops": 2.0}), ("relu", {"nonzeros": 20.0})]
)
def test_the_controller_lands_within_15_percent(dense, activation, asked):
    codes = fitted(dense, FlopsRegularizer(**asked, steps=200), activation)
    found = flops(codes) if "flops" in asked else batch_nonzeros(codes)
    (target,) = asked.values()
    assert target / 1.15 < found < target * 1.15


def test_columns_are_evener_than_with_l1_at_equal_size(dense):
    even = fitted(dense, FlopsRegularizer(nonzeros=20.0, steps=200))
    schedule = FlopsController(20.0, 200)

    def l1(codes):
        penalty = l1_penalty(codes)
        schedule.update(batch_nonzeros(codes), penalty.item())
        return schedule.weight * penalty

    uneven = fitted(dense, l1)
    assert batch_nonzeros(uneven) == pytest.approx(20.0, rel=0.2)
    assert unevenness(even) < 0.75 * unevenness(uneven)


def test_the_controller_resumes_where_it_was():
    whole, first = FlopsController(2.0, 50), FlopsController(2.0, 50)
    costs = [100.0 * 0.9**i for i in range(40)]
    for cost in costs:
        whole.update(cost)
    for cost in costs[:20]:
        first.update(cost)
    second = FlopsController(2.0, 50)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for cost in costs[20:]:
        second.update(cost)
    assert second.weight == whole.weight and second.goal == whole.goal


def test_a_regularizer_wants_one_target():
    with pytest.raises(ValueError, match="exactly one"):
        FlopsRegularizer(flops=1.0, nonzeros=8.0, steps=10)
    with pytest.raises(ValueError, match="exactly one"):
        FlopsRegularizer()
    with pytest.raises(ValueError, match="steps >= 1"):
        FlopsRegularizer(flops=1.0)
    with pytest.raises(ValueError, match="target > 0"):
        FlopsController(0.0, 10)


def test_a_regularizer_steps_in_training_only():
    regularizer, codes = FlopsRegularizer(flops=1.0, steps=10), signed(8, 6, 0.5, 0)
    regularizer.eval()(codes)
    assert regularizer.progress == 0
    regularizer.train()(codes)
    assert regularizer.progress == 0.1
    assert regularizer.measured == pytest.approx(flops(codes))
