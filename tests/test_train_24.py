"""The methods and the run: what is multiplied, what decays, when; state, resume and the end."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from gossamer import patterns, train
from gossamer.train import FST, SRSTE, SSTE, STE, Dense, Fp8Products, Products, Sparse24Linear, sparsify
from gossamer.train.measures import flip_rate, mu, three_zeros
from gossamer.train.sparse_products import SparseProducts

METHODS = [STE(), SRSTE(), SRSTE(decay_on="weights"), FST(mvue=False, dense_tail=0), SSTE(), SSTE(beta="dynamic")]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.decay_on}")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))

    def forward(self, x):
        return x + self.mlp(self.attn(x))


def model(seed=0, blocks=2):
    torch.manual_seed(seed)
    return nn.Sequential(*[Block() for _ in range(blocks)])


def batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 16, generator=generator) for _ in range(steps)]


def fit(net, optimizer, data):
    losses = []
    for x in data:
        loss = (net(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(method, steps=12, every=4, **options):
    net = model()
    sparse = sparsify(net, method, steps=steps, every=every, **options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    fit(net, optimizer, batches(steps))
    return net, sparse


def test_the_swap_changes_no_key_no_parameter_and_no_optimizer():
    net = model()
    before, keys = dict(net.named_parameters()), list(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters())
    sparse = sparsify(net, FST(dense_tail=0))
    assert list(net.state_dict()) == keys and list(dict(net.named_parameters())) == list(before)
    assert all(p is before[n] for n, p in net.named_parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
    assert [layer.label for layer in sparse.layers] == ["0.mlp.0", "0.mlp.2", "1.mlp.0", "1.mlp.2"]
    assert type(net[0].attn) is nn.Linear and isinstance(net[0].mlp[0], Sparse24Linear)
    assert copy.deepcopy(net).state_dict().keys() == net.state_dict().keys()


@every_method
def test_the_forward_pass_multiplies_with_2_of_4_and_the_gradient_is_straight_through(method):
    net = model()
    dense = copy.deepcopy(net[0].mlp[0])
    sparsify(net, method)
    layer, x = net[0].mlp[0], torch.randn(3, 5, 16)
    projected = layer.projected()
    assert patterns.is_24(projected) and 0 < projected.ne(0).sum() <= projected.numel() // 2
    y = layer(x)
    torch.testing.assert_close(y, x @ projected.T + layer.bias)
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).expand(32, 16))
    assert torch.equal(layer.weight, dense.weight)


def test_projections_are_those_of_the_papers():
    w = torch.randn(8, 16)
    hard = w * patterns.nm(w.abs())
    torch.testing.assert_close(STE().project(w, {}), hard)
    torch.testing.assert_close(SRSTE().project(w, {}), hard)
    mask = patterns.transposable24(w)
    torch.testing.assert_close(FST().project(w, FST().state(w)), w * mask)
    soft = patterns.soft24(w)
    beta = (w * soft).sum() / soft.square().sum()
    torch.testing.assert_close(SSTE().project(w, SSTE().state(w)), beta * soft)
    torch.testing.assert_close(SSTE(beta="dynamic").project(2 * w, {}), 2 * beta * soft)
    torch.testing.assert_close(SSTE(beta="one").project(w, {}), soft)
    frozen = SSTE().state(w)
    torch.testing.assert_close(SSTE().project(w.abs() ** 3, frozen), beta * patterns.soft24(w.abs() ** 3))


@pytest.mark.parametrize("method", [SRSTE(decay=0.5), FST(decay=0.5, dense_tail=0, mvue=False)], ids=lambda m: m.name)
def test_decay_on_gradients_is_added_once_after_clipping(method):
    net = model()
    sparse = sparsify(net, method)
    layer = sparse.layers[0]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    sparse.before_step()
    expected = 1 + 0.5 * layer.weight * ~method.mask(layer.weight, layer.state())
    torch.testing.assert_close(layer.weight.grad, expected.detach())
    assert (net[0].attn.weight.grad == 1).all()


def test_decay_on_weights_follows_the_learning_rate_and_needs_it():
    net = model()
    sparse = sparsify(net, SRSTE(decay=0.5, decay_on="weights"))
    layer, before = sparse.layers[0], sparse.layers[0].weight.clone()
    sparse.before_step(torch.optim.SGD(net.parameters(), lr=0.1))
    torch.testing.assert_close(layer.weight, torch.where(patterns.hard24(layer.weight), before, 0.95 * before))
    with pytest.raises(ValueError, match=r"needs learning rates; fix: before_step\(optimizer\)"):
        sparse.before_step()
    with pytest.raises(ValueError, match=r"0.mlp.0.weight is not in this optimizer.*fix"):
        sparse.before_step(torch.optim.SGD(net[0].attn.parameters(), lr=0.1))


def test_a_weight_that_two_layers_share_decays_and_is_settled_once():
    net = model()
    net[1].mlp = net[0].mlp
    net[1].mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    net[1].mlp[0].weight = net[0].mlp[0].weight
    sparse = sparsify(net, SSTE())
    projected = net[0].mlp[0].projected()
    sparse.finalize()
    assert net[1].mlp[0].weight is net[0].mlp[0].weight
    assert torch.equal(net[0].mlp[0].weight, projected)
    net = model()
    net[1].mlp[0].weight = net[0].mlp[0].weight
    with pytest.raises(ValueError, match=r"shares its weight with 1.mlp.0, which stays dense; fix"):
        sparsify(net, SSTE(), filter="0.mlp.*")


def test_masks_of_fst_are_refreshed_every_so_many_steps_and_only_then():
    net = model()
    sparse = sparsify(net, FST(refresh=3, dense_tail=0))
    layer = sparse.layers[0]
    first = layer.state()["mask"].clone()
    address = layer.state()["mask"].data_ptr()
    with torch.no_grad():
        layer.weight.normal_()
    for _ in range(2):
        sparse.after_step()
        assert torch.equal(layer.state()["mask"], first)
    sparse.after_step()
    assert torch.equal(layer.state()["mask"], patterns.transposable24(layer.weight))
    assert not torch.equal(layer.state()["mask"], first) and layer.state()["mask"].data_ptr() == address


def test_the_schedule_goes_through_a_dense_start_and_a_dense_tail():
    net = model()
    sparse = sparsify(net, SSTE(dense_tail=0.25), steps=8, dense_start=0.5)
    phases = []
    for _ in range(8):
        phases.append(sparse.phase)
        assert all(layer.dense == (sparse.phase == "dense") for layer in sparse.layers)
        sparse.after_step()
    assert phases == ["dense"] * 4 + ["sparse"] * 2 + ["dense"] * 2
    x = torch.randn(2, 16)
    assert torch.equal(net[0].mlp[0](x), nn.functional.linear(x, net[0].mlp[0].weight, net[0].mlp[0].bias))


def test_beta_is_solved_for_when_the_sparse_phase_begins():
    net = model()
    sparse = sparsify(net, SSTE(), steps=4, dense_start=0.5)
    layer = sparse.layers[0]
    sparse.after_step()
    assert not layer.state()
    with torch.no_grad():
        layer.weight.normal_()
    sparse.after_step()
    soft = patterns.soft24(layer.weight)
    torch.testing.assert_close(layer.state()["beta"], patterns.mse_scale(layer.weight, soft).detach())


@every_method
def test_finalize_leaves_exactly_2_of_4_with_positive_zeros(method):
    net, sparse = trained(method)
    parameters, x = dict(net.named_parameters()), torch.randn(4, 16)
    expected, layers = net(x), sparse.layers
    sparse.finalize()
    assert all(type(layer) is nn.Linear and not layer._buffers for layer in layers)
    for layer in layers:
        assert patterns.is_24(layer.weight)
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    torch.testing.assert_close(net(x), expected)
    assert all(p is parameters[n] for n, p in net.named_parameters())
    assert sparse.metrics()["step"] == 12
    for again in (sparse.finalize, sparse.state_dict):
        with pytest.raises(RuntimeError, match="finalized already; fix"):
            again()


@pytest.mark.parametrize("method", [FST(), SSTE(dense_tail=0.5), Dense()], ids=lambda m: m.name)
def test_finalize_refuses_what_ends_dense_unless_that_is_asked_for(method):
    net, sparse = trained(method)
    weights = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match=r'has no 2:4 model to keep.*fix: finalize\(keep="dense"\)'):
        sparse.finalize()
    sparse.finalize(keep="dense")
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters())
    assert type(net[0].mlp[0]) is nn.Linear
    with pytest.raises(RuntimeError, match="finalized already"):
        sparse.finalize(keep="dense")


@pytest.mark.parametrize("method", [*METHODS, FST(refresh=5), Dense()], ids=repr)
@pytest.mark.parametrize("cut", [3, 7, 11])
def test_a_run_resumes_to_the_bit(method, cut):
    def start(seed=0):
        net = model(seed)
        sparse = sparsify(net, method, steps=12, every=4)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        sparse.attach(optimizer)
        return net, sparse, optimizer

    data = batches(12)
    net, sparse, optimizer = start()
    whole = fit(net, optimizer, data[:cut])
    # Generators are the loop's to keep: MVUE draws from torch's own.
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict(), sparse.state_dict(), torch.get_rng_state()))
    whole += fit(net, optimizer, data[cut:])

    net2, sparse2, optimizer2 = start(seed=5)
    net2.load_state_dict(kept[0])
    optimizer2.load_state_dict(kept[1])
    sparse2.load_state_dict(kept[2])
    torch.set_rng_state(kept[3])
    assert fit(net2, optimizer2, data[cut:]) == whole[cut:]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), net2.parameters(), strict=True))
    assert sparse2.metrics() == sparse.metrics() != {}


def test_measures_are_those_of_the_definition():
    net = model()
    sparse = sparsify(net, SSTE(), every=2)
    assert sparse.metrics() == {}
    sparse.after_step()
    before = [patterns.nm(layer.weight.abs()) for layer in sparse.layers]
    with torch.no_grad():
        for layer in sparse.layers:
            layer.weight += 0.1 * torch.randn_like(layer.weight)
        sparse.layers[0].weight[:, :4] = 1  # ties: nothing is left of these groups
    sparse.after_step()
    after = [patterns.nm(layer.weight.abs()) for layer in sparse.layers]
    flipped = sum(int((a != b).sum()) for a, b in zip(after[1:], before[1:], strict=True))
    flipped += int((patterns.hard24(sparse.layers[0].weight) != before[0]).sum())
    entries = sum(layer.weight.numel() for layer in sparse.layers)
    zeros = sum(int((layer.projected().view(-1, 4) != 0).sum(1).le(1).sum()) for layer in sparse.layers)
    assert zeros >= 32
    expected = {"step": 2, "flip_rate": flipped / entries, "three_zeros": 4 * zeros / entries}
    assert sparse.metrics() == pytest.approx(expected)


def test_flip_rate_three_zeros_and_mu():
    a = torch.tensor([[1, 1, 0, 0]]).bool()
    assert flip_rate(a, a) == 0 and flip_rate(a, ~a) == 1 and flip_rate(a, a.roll(1, 1)) == 0.5
    assert three_zeros(torch.tensor([[1.0, 2, 0, 0, 0, 0, -0.0, 1, 0, 0, 0, 0]])) == 2
    assert mu({1: 0.2, 2: 0.4, 9: 1}, {1: 0.1, 2: 0.1}) == pytest.approx(3)
    assert mu({1: 0.2, 2: 0.4}, {1: 0.1, 2: 0.1}, last=0.5) == pytest.approx(4)
    assert mu({1: 0.2}, {1: 0.0}) == math.inf
    with pytest.raises(ValueError, match="no common step; fix"):
        mu({1: 0.1}, {2: 0.1})


@pytest.mark.parametrize("tokens", [8, 10])
def test_mvue_is_unbiased_and_only_for_the_gradient_of_the_weight(tokens):
    x, w = torch.randn(tokens, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    dz = torch.randn(tokens, 6)
    (x @ w.T).backward(dz)
    dx, dw = x.grad.clone(), w.grad.clone()
    total, draws = torch.zeros_like(w), 2000
    for _ in range(draws):
        x.grad = w.grad = None
        Products(mvue=True).linear(x, w, None).backward(dz)
        total += w.grad
    torch.testing.assert_close(x.grad, dx)
    assert not torch.equal(w.grad, dw)
    assert ((total / draws - dw).norm() / dw.norm()) < 0.1
    assert patterns.is_24(Products.sampled(dz))


def test_fp8_rounds_forward_and_backward_to_what_eight_bits_hold():
    x, w = torch.randn(16, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    y = Fp8Products().linear(x, w, None)
    exact = x @ w.T
    error = (y - exact).norm() / exact.norm()
    assert 0.005 < error < 0.06
    y.backward(torch.ones_like(y))
    grads = x.grad.clone()
    x.grad = None
    exact.backward(torch.ones_like(y))
    assert 0.01 < (grads - x.grad).norm() / x.grad.norm() < 0.2  # e5m2 keeps two bits after the point
    zero = Fp8Products().linear(torch.zeros(4, 32), w, None)
    assert (zero == 0).all()
    assert isinstance(SSTE(fp8=True, mvue=True).products(), Fp8Products) and SSTE(fp8=True, mvue=True).products().mvue


def test_other_products_can_be_plugged_in():
    class Counting(Products):
        calls: list = []  # noqa: RUF012

        def forward(self, x, w):
            assert patterns.is_24(w)
            self.calls.append("forward")
            return super().forward(x, w)

        def grad_input(self, dz, w):
            self.calls.append("grad_input")
            return super().grad_input(dz, w)

        def grad_weight(self, dz, x):
            self.calls.append("grad_weight")
            return super().grad_weight(dz, x)

    x = torch.randn(2, 3, 16)
    plain, plugged = model(), model()
    sparsify(plain, SSTE())
    sparsify(plugged, SSTE(), products=Counting())
    for net in (plain, plugged):
        net(x).square().sum().backward()
    assert Counting.calls.count("forward") == Counting.calls.count("grad_input") == 4
    assert Counting.calls.count("grad_weight") == 4
    for a, b in zip(plain.parameters(), plugged.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_sparse_products_are_a_word_and_follow_the_method():
    x, nets = torch.randn(3, 16), [model(), model()]
    sparsify(nets[0], SSTE())
    made = sparsify(nets[1], SSTE(), products="sparse").layers[0].products
    assert isinstance(made, SparseProducts) and not made.tiles and not made.mvue
    for net in nets:
        net(x).square().sum().backward()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    made = sparsify(model(), FST(dense_tail=0), products="sparse").layers[0].products
    assert isinstance(made, SparseProducts) and made.tiles and made.mvue
    with pytest.raises(ValueError, match="multiplies as Fp8Products does; fix"):
        sparsify(model(), SSTE(fp8=True), products="sparse")
    with pytest.raises(ValueError, match="products='dense' is unknown; fix"):
        sparsify(model(), SSTE(), products="dense")


def test_compiled_decay_and_measures_are_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = []
    for compiled in (False, True):
        net = model()
        sparse = sparsify(net, SRSTE(decay=0.1), every=2)
        if compiled:
            assert sparse.compile() is sparse
        for _ in range(2):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            sparse.before_step()
            net[0].mlp[0].weight.data.sub_(net[0].mlp[0].weight.grad, alpha=0.05)
            sparse.after_step()
        found.append((sparse.metrics(), net[0].mlp[0].weight.clone()))
    assert found[0][0] == found[1][0] and found[0][0]["flip_rate"] > 0
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("method", [SRSTE(), FST(refresh=4, mvue=False)], ids=lambda m: m.name)
def test_suggest_decay_finds_a_decay_whose_mu_is_in_the_interval(method):
    found = train.suggest_decay(model, warm_up, method=method, steps=40, interval=(0.5, 0.9))
    assert found.feasible and 0.5 <= found.mu <= 0.9 and found.tried[found.decay] == found.mu
    assert found.dense_flip_rate > 0
    rising = [found.tried[d] for d in sorted(found.tried)]
    assert rising[0] >= rising[-1]


def warm_up(net, sparse, steps):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    fit(net, optimizer, batches(steps))


def test_a_probe_that_cannot_answer_says_why():
    with pytest.raises(ValueError, match=r"took 0 steps, not 8; fix: sparsifier.attach"):
        train.suggest_decay(model, lambda *_: None, steps=8)
    with pytest.raises(ValueError, match="s_ste has no decay"):
        train.suggest_decay(model, warm_up, method=SSTE())
    with pytest.raises(ValueError, match="no mask flipped"):
        train.suggest_decay(model, lambda net, sparse, n: [sparse.after_step() for _ in range(n)], steps=8)


def test_nan_gradients_are_found_before_they_reach_a_checkpoint():
    net = model()
    sparse = sparsify(net, SSTE(), every=1)
    optimizer = torch.optim.AdamW(net.parameters())
    sparse.attach(optimizer)
    fit(net, optimizer, [torch.full((4, 16), math.nan)])
    for asked in (sparse.metrics, sparse.state_dict, sparse.finalize):
        with pytest.raises(
            FloatingPointError, match=r"4 weights are not finite \(0.mlp.0, .*fix: resume from the last"
        ):
            asked()


def test_grad_scaler_skips_a_step_without_decay_or_count():
    net = model()
    sparse = sparsify(net, SRSTE(decay=0.1, decay_on="weights"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = sparse.layers[0].weight.clone()
    for scale in (math.inf, 1.0):
        loss = net(torch.randn(4, 16)).square().mean() * scale
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scale == math.inf:
            assert sparse.step == 0 and torch.equal(sparse.layers[0].weight, before)
    assert sparse.step == 1 and not torch.equal(sparse.layers[0].weight, before)


def test_bad_models_and_filters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"matches nothing; linear layers: 0.attn, .*fix: filter="):
        sparsify(model(), SSTE(), filter="*.feed.*")
    with pytest.raises(ValueError, match="matches nothing; linear layers: none"):
        sparsify(nn.ReLU(), SSTE())
    odd = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))})
    with pytest.raises(ValueError, match=r"mlp.0 has in_features=6, no multiple of 4; fix"):
        sparsify(odd, SSTE())
    with pytest.raises(ValueError, match=r"mlp.1 has out_features=6, .*tiles of fst need; fix"):
        sparsify(odd, FST(dense_tail=0), filter="mlp.1")
    sparsify(odd, SSTE(), filter="mlp.1")
    with torch.device("meta"), pytest.raises(ValueError, match="meta device; fix"):
        sparsify(model(), SSTE())
    net = model()
    sparsify(net, SSTE())
    with pytest.raises(ValueError, match="0.mlp.0 trains 2:4 already; fix"):
        sparsify(net, SSTE())

    class Odd(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    with pytest.raises(ValueError, match="a Odd, which may multiply in its own way; fix"):
        sparsify(nn.ModuleDict({"mlp": nn.ModuleList([Odd(4, 4)])}), SSTE())
    with pytest.raises(ValueError, match=r"holds torch.int8; fix"):
        whole = nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(4, 4)])})
        whole["mlp"][0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        sparsify(whole, SSTE())
    assert type(model()[0].mlp[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": FST()}, r"fst with dense_tail=0.167 .* needs the number of optimizer steps; fix: sparsify"),
        ({"method": SSTE(), "dense_start": 0.5}, "needs the number of optimizer steps"),
        ({"method": FST(), "steps": 10, "dense_start": 0.9}, "leave no sparse step"),
        ({"method": SSTE(), "steps": 0}, "steps=0; fix"),
        ({"method": SSTE(), "every": 0}, "every=0; fix"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparsify(model(), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STE(dense_tail=1.0), "dense_tail=1.0 is no share"),
        (lambda: SRSTE(decay=-1), "decay=-1; fix"),
        (lambda: SRSTE(decay_on="both"), "decay_on='both' is unknown; fix: gradients or weights"),
        (lambda: FST(refresh=0), "refresh=0; fix"),
        (lambda: SSTE(beta="best"), "beta='best' is unknown; fix"),
    ],
)
def test_bad_knobs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_another_run_or_model_is_refused():
    state = sparsify(model(), FST(dense_tail=0)).state_dict()
    with pytest.raises(
        ValueError, match=r"the state is of .*fst.*this run is .*s_ste.*fix: resume with the same method"
    ):
        sparsify(model(), SSTE()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another model: 2.mlp.0, 2.mlp.2 differ; fix"):
        sparsify(model(blocks=3), FST(dense_tail=0)).load_state_dict(state)
    with pytest.raises(ValueError, match="version 7; fix"):
        sparsify(model(), FST(dense_tail=0)).load_state_dict(state | {"version": 7})
    with pytest.raises(RuntimeError, match="attached already; fix"):
        sparse = sparsify(model(), SSTE())
        optimizer = torch.optim.SGD(model().parameters())
        sparse.attach(optimizer).attach(optimizer)


def test_the_default_filter_takes_the_feed_forward_layers_of_known_models():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    found = {}
    for config in (llama, bert):
        net = transformers.AutoModel.from_config(config)
        found[config.model_type] = [x.label.rpartition("layer")[2] for x in sparsify(net, SSTE()).layers]
    assert found["llama"] == ["s.0.mlp.gate_proj", "s.0.mlp.up_proj", "s.0.mlp.down_proj"]
    assert found["bert"] == [".0.intermediate.dense", ".0.output.dense"]
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    net = nn.ModuleDict({"block": layer})
    assert [x.label for x in sparsify(net, SSTE()).layers] == ["block.linear1", "block.linear2"]


def test_the_names_of_the_package_are_there():
    assert all(getattr(train, name).__name__ == name for name in train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = train.nothing
