"""Sparsity that rises while a model learns: the schedule, the masks, what survives an optimizer."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import patterns
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.nn import SparseLinear
from gossamer.train.gradual import BlockPruner, Cubic

LAYERS = ["0", "2"]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))


def train(net: nn.Module, pruner: BlockPruner, steps: int, start: int = 0) -> list[float]:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    found = []
    for step in range(start, steps):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(step))
        (net(x) - x[:, :16].tanh()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(step + 1)
        found.append(pruner.sparsity())
    return found


def test_the_schedule_is_the_cubic_of_its_paper() -> None:
    curve = Cubic(0.8, 10, 110, 10, initial=0.2)
    assert [curve(s) for s in (0, 10, 110, 500)] == [0.2, 0.2, 0.8, 0.8]
    assert curve(60) == pytest.approx(0.8 - 0.6 * 0.5**3)
    assert [s for s in range(200) if curve.due(s)] == list(range(10, 111, 10))
    assert [s for s in range(30) if curve.soon(s)] == [*range(7, 11), *range(17, 21), *range(27, 30)]


def test_bad_schedules_are_refused() -> None:
    for numbers in ((0.5, 0, 10, 5, 0.6), (1.0, 0, 10), (-0.1, 0, 10)):
        with pytest.raises(ValueError, match="0 <= initial <= final < 1"):
            Cubic(*numbers)
    for numbers in ((0.5, 10, 5), (0.5, 0, 5, 0)):
        with pytest.raises(ValueError, match="0 <= begin <= end"):
            Cubic(*numbers)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("width", [1, 4])
def test_sparsity_follows_the_schedule_in_whole_blocks(score: str, width: int) -> None:
    net, curve = model(), Cubic(0.75, 4, 24, 5)
    pruner = BlockPruner(net, curve, LAYERS, score, width)
    found = train(net, pruner, 40)
    assert found == sorted(found)
    assert found[0] == 0 and found[8] == pytest.approx(curve(9), abs=0.02)
    assert found[23:] == [pytest.approx(0.75, abs=0.02)] * 17
    for index in (0, 2):
        weight = net[index].weight.detach()
        kept = patterns.block_sums(weight.abs(), width=width) > 0
        assert torch.equal(patterns.spread(kept, tuple(weight.shape), width=width), weight != 0)
        assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.02), "the optimizer does not fill them again"


def test_what_is_learnt_makes_up_for_what_is_gone() -> None:
    x = torch.randn(512, 24, generator=torch.Generator().manual_seed(99))

    def loss(net: nn.Module) -> float:
        return float((net(x) - x[:, :16].tanh()).square().mean().detach())

    gradual, sudden = model(), model()
    train(sudden, BlockPruner(sudden, Cubic(0.6, 300, 300), LAYERS, "magnitude"), 300)
    train(gradual, BlockPruner(gradual, Cubic(0.6, 20, 150, 10), LAYERS), 300)
    assert loss(gradual) < 0.5 * loss(sudden)


def test_by_default_the_linear_layers_of_the_blocks_are_pruned(bert) -> None:
    net = bert
    pruner = BlockPruner(net, Cubic(0.5, 0, 1, 1))
    assert len(pruner.masks) == 12 and all(".layer." in name for name in pruner.masks)
    assert [len(g) for g in pruner.groups[:2]] == [3, 1], "query, key and value share statistics"
    net(torch.randint(5, 60, (8, 12)))
    pruner.step(1)
    assert pruner.sparsity() == pytest.approx(0.5, abs=0.01)
    assert (net.embeddings.word_embeddings.weight != 0).any(1)[1:].all()


def test_a_model_that_comes_sparse_stays_sparse() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight[4:8] = 0
    pruner = BlockPruner(net, Cubic(0.5, 100, 200), LAYERS)
    train(net, pruner, 10)
    assert not net[0].weight[4:8].any()
    assert pruner.sparsity() == pytest.approx(4 * 24 / (24 * 32 + 32 * 16))


def test_the_state_brings_masks_back() -> None:
    net, curve = model(), Cubic(0.5, 4, 8, 2)
    pruner = BlockPruner(net, curve, LAYERS)
    train(net, pruner, 12)
    other = model()
    resumed = BlockPruner(other, curve, LAYERS)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.sparsity() == pruner.sparsity()
    assert torch.equal(other[0].weight != 0, net[0].weight != 0), "masks are applied at once"
    with pytest.raises(KeyError, match=r"other layers \(2\); fix"):
        BlockPruner(model(), curve, ["0"]).load_state_dict(pruner.state_dict())


def test_finish_stores_int8_blocks() -> None:
    net = model()
    pruner = BlockPruner(net, Cubic(0.5, 4, 8, 2), LAYERS, width=4)
    train(net, pruner, 12)
    x = torch.randn(5, 24)
    before = net(x)
    assert pruner.finish() is net
    assert isinstance(net[0], SparseLinear) and isinstance(net[0].format, BsrInt8) and net[0].format.block == (4, 4)
    assert (net(x) - before).abs().max() < 0.02 * before.abs().max()
    net(x)
    assert not pruner._seen, "nothing is observed any more"


def test_masks_cannot_be_chosen_from_nothing() -> None:
    pruner = BlockPruner(model(), Cubic(0.5, 0, 2, 1), LAYERS)
    with pytest.raises(RuntimeError, match="saw no training input before"):
        pruner.step(1)


def test_only_linear_layers_can_be_named() -> None:
    with pytest.raises(TypeError, match=r"1 is a GELU; fix: name nn\.Linear"):
        BlockPruner(model(), Cubic(0.5, 0, 2), ["1"])


def _rank(rank: int, port: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(model())
    pruner = BlockPruner(net.module, Cubic(0.5, 2, 6, 2), LAYERS)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(8):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(2 * step + rank))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(step + 1)
    torch.save(net.module.state_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_choose_the_same_masks(tmp_path, monkeypatch) -> None:
    import socket

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))  # where the new processes look for this file
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert float((one["0.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_model_has_hooks_only_while_it_is_observed() -> None:
    net = model()
    pruner, seen = BlockPruner(net, Cubic(0.5, 6, 12, 6), LAYERS), []
    for step in range(1, 15):
        seen.append(pruner.observing)
        assert bool(net[0]._forward_pre_hooks) == pruner.observing
        train(net, pruner, step, step - 1)
    assert [s for s, found in enumerate(seen, 1) if found] == [3, 4, 5, 6, 9, 10, 11, 12]
    assert pruner.sparsity() == pytest.approx(0.5, abs=0.02)
