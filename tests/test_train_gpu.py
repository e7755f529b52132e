"""2:4 training on a GPU: the same masks, FP8 units, compiled and captured steps, fp16 with a GradScaler."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import patterns
from gossamer.train import FST, SRSTE, SSTE, Fp8Products, Products, sparsify

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.gpu
METHODS = [SRSTE(decay=0.01), FST(refresh=2, dense_tail=0, mvue=False), SSTE(), SSTE(beta="dynamic"), SSTE(fp8=True)]


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))}).cuda()["mlp"]


def test_patterns_are_those_of_the_cpu():
    w = torch.cat([torch.randn(64, 256), torch.zeros(4, 256), torch.randint(-2, 3, (60, 256)).float()])
    u = patterns.uniforms24(w)
    for f in (patterns.hard24, patterns.soft24, patterns.transposable24):
        assert torch.equal(f(w.cuda()).cpu(), f(w)), f.__name__
    for f in (patterns.mvue24, patterns.mvue24_exact):
        torch.testing.assert_close(f(w.cuda(), u.cuda()).cpu(), f(w, u))
    assert patterns.is_24(patterns.mvue24(w.cuda()))


def test_fp8_units_give_the_numbers_of_the_simulation():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 units")
    x, w = (torch.randn(n, 128, device="cuda", dtype=torch.bfloat16) for n in (32, 64))
    found = Fp8Products().forward(x, w)
    simulated = Fp8Products().forward(x.cpu(), w.cpu())
    torch.testing.assert_close(found.cpu().float(), simulated.float(), rtol=0.02, atol=0.1)
    exact = x.float() @ w.float().T
    assert 0.005 < (found - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_compiled_step_is_the_eager_one(method):
    eager = model()
    compiled = copy.deepcopy(eager)
    x = torch.randn(32, 64, device="cuda")
    torch._dynamo.reset()
    for net in (eager, compiled):
        sparse = sparsify(net, method, filter="*", every=2)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True, eps=1e-3)
        sparse.attach(optimizer)
        run = torch.compile(net, fullgraph=True) if net is compiled else net
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                y = run(x)
            y.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sparse.metrics()["step"] == 2
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_a_captured_step_follows_the_weights_and_new_masks():
    net, x = model(), torch.randn(32, 64, device="cuda")
    sparse = sparsify(net, FST(dense_tail=0, mvue=False), filter="*")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        net(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
    with torch.no_grad():
        for layer in sparse.layers:
            layer.weight.normal_()
            layer.renew()
    graph.replay()
    torch.testing.assert_close(y, net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_estimate_of_one_pass_is_unbiased_and_varies_as_the_oracle_does(dtype):
    dz = torch.randn(150, 70, device="cuda").to(dtype)  # a last short group, sizes that cut blocks
    dz[torch.rand(150, 70, device="cuda") < 0.3] = 0
    dz[4:8] = 0
    drawn = torch.stack([Products.sampled(dz) for _ in range(400)]).float()
    padded = nn.functional.pad(dz.float(), (0, 0, 0, 2)).mT
    oracle = torch.stack([patterns.mvue24(padded)[:, :150] for _ in range(400)])
    assert all(patterns.is_24(nn.functional.pad(e, (0, 2))) for e in drawn[:20])
    assert float((drawn.mean(0) * dz.mT).sum() / (dz * dz).sum()) == pytest.approx(1, abs=0.02)
    assert float((drawn.mean(0) - dz.mT).norm() / (oracle.mean(0) - dz.mT).norm()) == pytest.approx(1, abs=0.1)
    assert float(drawn.var(0).sum() / oracle.var(0).sum()) == pytest.approx(1, abs=0.05)


def test_mvue_draws_anew_in_every_replay():
    dz = torch.randn(64, 32, device="cuda")
    Products.sampled(dz)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = Products.sampled(dz)
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert patterns.is_24(drawn) and not torch.equal(first, drawn)


@pytest.mark.parametrize("method", ["dense", "s_ste", "sr_ste", "fst_no_mvue"])
def test_steps_of_the_example_are_the_same_captured(method, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from pretrain.loop import METHODS, Run, Training

    monkeypatch.setitem(METHODS, "fst_no_mvue", lambda: FST(mvue=False, refresh=5))
    text = torch.randint(97, 123, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    run, curves = Run(method, None, "tiny", 24, 16, 2, 1e-2, 4, 0, 4), []
    for graphs in (False, True):
        torch._dynamo.reset()
        training, curve = Training(run, text, compile=True, graphs=graphs), []
        assert (training.captured is not None) == graphs
        training.train(curve.append)
        curves.append(curve)
    for plain, captured in zip(*curves, strict=True):
        assert captured["step"] == plain["step"] and captured["loss"] == pytest.approx(plain["loss"], abs=0.01)
        assert captured["flip_rate"] == pytest.approx(plain["flip_rate"], rel=0.2, abs=0.003)
    assert curves[1][-1]["loss"] < 0.8 * curves[1][0]["loss"]


def test_half_precision_with_a_grad_scaler_trains_and_ends_2_of_4():
    net = model()
    sparse = sparsify(net, SRSTE(), filter="*")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    sparse.attach(optimizer)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    x = torch.randn(64, 64, device="cuda")
    for _ in range(20):
        with torch.autocast("cuda", torch.float16):
            loss = (net(x).float() - x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and sparse.step >= 18
    sparse.finalize()
    assert patterns.is_24(net[0].weight) and patterns.is_24(net[2].weight)
