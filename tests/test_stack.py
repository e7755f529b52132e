"""Stacks: q, k and v in one call, and never somebody else's answer."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import gossamer
from gossamer import dispatch, ops, timing
from gossamer.formats.bitmask import Bitmask
from gossamer.install import _better_together
from gossamer.nn import SparseLinear
from gossamer.prepare import run_dense
from gossamer.race import Group, Option

ROWS = {"q_proj": 24, "k_proj": 8, "v_proj": 8, "o_proj": 24}


def sparse(m: int, k: int = 40) -> Bitmask:
    mask = torch.randperm(m * k).view(m, k) < m * k // 2
    return Bitmask.encode(((torch.rand(m, k) + 1) * mask).bfloat16())


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, m in ROWS.items():
            layer = SparseLinear.from_format(sparse(m), torch.randn(m) if bias else None)
            self.register_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.fixture(autouse=True)
def _stacking_pays(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call takes 1, whatever its size: three in one are ahead, alone the sparse kernel is."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    known = {"cpu_bitmask": 1.0}
    monkeypatch.setattr(timing, "race", lambda runners, *_: {n: known.get(n, 9.0) for n in runners})


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def model(request: pytest.FixtureRequest) -> Attention:
    model = Attention(request.param)
    gossamer.prepare(model)
    return model


def apart(model: Attention) -> Attention:
    """The same layers without their stack."""
    alone = copy.deepcopy(model)
    for layer in alone.children():
        layer.unprepare()
    return alone


@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 17, 40])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_together_as_apart(model: Attention, tokens: int, mode) -> None:
    x = torch.randn(2, tokens // 2, 40) if tokens % 2 == 0 else torch.randn(1, tokens, 40)
    with mode():
        for _ in range(2):
            for found, expected in zip(model(x), apart(model)(x), strict=True):
                torch.testing.assert_close(found, expected)
                assert found.is_contiguous()


def test_one_call_for_three_and_o_by_itself(model: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = model.q_proj.stack
    assert stack is not None and model.k_proj.stack is stack and model.v_proj.stack is stack
    assert model.o_proj.stack is None
    calls, product = [], type(stack)._product
    monkeypatch.setattr(type(stack), "_product", lambda self, x: calls.append(x) or product(self, x))
    with torch.no_grad():
        model(torch.randn(1, 40))
    assert len(calls) == 1
    assert stack.held is None, "all were fetched, nothing is kept"


def test_nobody_gets_an_old_answer(model: Attention) -> None:
    alone, x = apart(model), torch.randn(1, 40)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(3)  # the tensor is the same, its version is not
        torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))
        other = torch.randn(1, 40)
        torch.testing.assert_close(model.v_proj(other), alone.v_proj(other))
        torch.testing.assert_close(model.q_proj(x), alone.q_proj(x))
    with torch.inference_mode():
        y = torch.randn(1, 40)
        model.q_proj(y)
        y.mul_(2)
        torch.testing.assert_close(model.q_proj(y), alone.q_proj(y), msg="the same layer again computes again")


def test_the_layers_keep_their_tensors_and_share_the_memory(model: Attention) -> None:
    fresh = apart(model)
    for name, m in ROWS.items():
        layer = getattr(model, name)
        assert torch.equal(layer.decode(), getattr(fresh, name).decode())
        assert layer.out_features == m
    stack, q = model.q_proj.stack, model.q_proj.weight
    assert stack.operands[0].data_ptr() == q.data_ptr(), "a view, not a copy"
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        q.mul_(2)
        x = torch.randn(1, 40)
        torch.testing.assert_close(model.q_proj(x), apart(model).q_proj(x))
    model.load_state_dict(state)


def test_compiled_whole(model: Attention) -> None:
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        for _ in range(3):
            x = torch.randn(1, 40)
            for found, expected in zip(compiled(x), apart(model)(x), strict=True):
                torch.testing.assert_close(found, expected)
    assert model.q_proj.stack.held is None


def traced(model: nn.Module, x: Tensor) -> list[tuple]:
    """The arguments after x of every `gossamer::call` that a compiler is given."""
    found: list[tuple] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.gossamer.call.default)
        found.extend(n.args[1:] for n in nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=compiler))
    for got, expected in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)
    return found


def test_a_compiled_graph_calls_once_for_three(model: Attention) -> None:
    stack, kept = model.q_proj.stack, len(ops._products)
    with torch.no_grad():
        assert traced(model, torch.randn(1, 1, 40)) == [(stack._number, 40)]
        alone = [(m._number, m.out_features) for m in (model.q_proj, model.k_proj, model.v_proj)]
        assert traced(model, torch.randn(17, 40)) == alone, "more tokens than the stack is for"
        assert traced(model, torch.randn(1, 40).double()) == alone, "not its dtype"
        assert len(ops._products) <= kept, "nothing is kept of a trace"
        model.q_proj.unprepare()
        assert traced(model, torch.randn(1, 40)) == [alone[0], (stack._number, 40)]


def test_a_compiled_graph_never_takes_an_old_answer() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            first = self.q_proj(x)
            x.mul_(2)
            return first, self.q_proj(x), self.k_proj(x), self.k_proj(x + 1)

    model = Twice(False)
    gossamer.prepare(model)
    alone, x = apart(model), torch.randn(1, 40)
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        with torch.no_grad():
            found = torch.compile(model, fullgraph=True, backend=backend)(x.clone())
            for got, expected in zip(found, alone(x.clone()), strict=True):
                torch.testing.assert_close(got, expected)


def test_a_compiled_model_follows_its_layers(model: Attention) -> None:
    torch._dynamo.reset()
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(1, 40)
    with torch.no_grad():
        compiled(x)
        model.k_proj.unprepare()
        model.k_proj.weight = nn.Parameter(model.k_proj.weight * 2, requires_grad=False)
        for got, expected in zip(compiled(x), apart(model)(x), strict=True):
            torch.testing.assert_close(got, expected)


def test_saved_without_a_trace(model: Attention, tmp_path) -> None:
    save_file(model.state_dict(), tmp_path / "prepared.safetensors")
    save_file(apart(model).state_dict(), tmp_path / "plain.safetensors")
    assert (tmp_path / "prepared.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_dense_is_dense_after_a_stack(model: Attention) -> None:
    run_dense(model)
    assert model.q_proj.stack is None
    assert {s.kernel for _, way in dispatch.route(model.q_proj.layout).ways for s in way} == {"vendor"}


def test_loading_other_weights_forgets_what_was_packed(model: Attention) -> None:
    other, x = Attention(model.q_proj.bias is not None), torch.randn(1, 40)
    model.load_state_dict(other.state_dict())
    assert model.q_proj.stack is None and not model.q_proj.prepared
    with torch.no_grad():
        for found, expected in zip(model(x), other(x), strict=True):
            assert torch.equal(found, expected)


def test_explain_tells(model: Attention) -> None:
    rows = {name: row for row in gossamer.explain(model).rows for name in row.layers}
    assert rows["q_proj"].together == 16 and rows["o_proj"].together == 0
    assert "up to 16 tokens in one call" in str(gossamer.explain(model))


def test_no_stack_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(runners, *_):
        rows = next(iter(runners.values()))[0]().shape[-1]
        return {n: float(rows**2) if n == "cpu_bitmask" else 1e9 for n in runners}

    monkeypatch.setattr(timing, "race", race)
    model = Attention(False)
    gossamer.prepare(model, again=True)
    assert model.q_proj.stack is None


def test_unprepare_leaves_the_stack() -> None:
    model = Attention(False)
    gossamer.prepare(model)
    model.q_proj.unprepare()
    x = torch.randn(1, 40)
    with torch.no_grad():
        for found, expected in zip(model(x), apart(model)(x), strict=True):
            torch.testing.assert_close(found, expected)


def test_prepared_in_inference_mode_is_as_good() -> None:
    model = Attention(False)
    with torch.inference_mode():
        gossamer.prepare(model)
    assert not any(p.is_inference() for p in model.parameters())
    assert not any(t.is_inference() for t in model.q_proj.stack.operands)


def test_a_copy_is_called_by_a_number_of_its_own(model: Attention) -> None:
    other = copy.deepcopy(model)
    mine, copied = model.q_proj.stack, other.q_proj.stack
    assert mine._number != copied._number and copied is other.k_proj.stack
    x = torch.randn(1, 40)
    with torch.no_grad():
        copied.operands[0].mul_(2)
        for stack in (mine, copied):
            found = torch.ops.gossamer.call(x, stack._number, sum(stack.rows))
            torch.testing.assert_close(found, stack.run(x), rtol=0, atol=0)
        assert not torch.equal(mine.run(x), copied.run(x))


@pytest.mark.parametrize(
    ("whole", "together", "zeros", "stacks"),
    [(False, 2.9, 0.5, True), (True, 2.7, 0.5, False), (True, 2.3, 0.5, True), (True, 2.3, 0.1, False)],
)
def test_dense_layers_share_a_sparse_call_only_far_ahead(
    whole: bool, together: float, zeros: float, stacks: bool
) -> None:
    stored = Bitmask.encode(torch.where(torch.arange(80).view(2, 40) < zeros * 80, 0, torch.ones(2, 40)))
    layers = [SparseLinear.from_format(stored) for _ in range(3)]
    alone = Group(layers, [], [Option(("vendor" if whole else "cpu_bitmask",), whole, 0, {1: 1.0})])
    option = Option(("cpu_bitmask",), False, 0, {1: together})
    found = _better_together([option], [1], layers, dict.fromkeys(layers, alone))
    assert found == ([(1, option)] if stacks else [])


EDITS = {
    "weight assigned": lambda k: setattr(k, "weight", nn.Parameter(k.weight * 9, requires_grad=False)),
    "weight in place": lambda k: k.weight.mul_(9),
    "bias assigned": lambda k: setattr(k, "bias", nn.Parameter(torch.ones(8), requires_grad=False)),
    "bias in place": lambda k: k.bias.fill_(1),
    "state loaded": lambda k: k.load_state_dict(
        {n: t * 9 if t.is_floating_point() else t for n, t in k.state_dict().items()}
    ),
}


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_is_edited_is_what_runs(edit, compiled: bool, copied: bool) -> None:
    model = Attention(bias=True)
    gossamer.prepare(model)
    model = copy.deepcopy(model) if copied else model
    assert model.k_proj.stack is not None
    run, x = torch.compile(model, backend="aot_eager") if compiled else model, torch.randn(2, 40)
    with torch.no_grad():
        run(x)
        before = model.k_proj.decode().clone(), model.k_proj.bias.clone()
        edit(model.k_proj)
        assert not (torch.equal(model.k_proj.decode(), before[0]) and torch.equal(model.k_proj.bias, before[1]))
        for tokens in (2, 2, 30):
            x = torch.randn(tokens, 40)
            for name, y in zip(("q_proj", "k_proj", "v_proj"), run(x), strict=True):
                layer = model.get_submodule(name)
                torch.testing.assert_close(y, x @ layer.decode(torch.float32).mT + layer.bias, rtol=1e-4, atol=1e-4)
    assert model.k_proj.stack is None
