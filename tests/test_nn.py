"""SparseLinear and the ops beneath it, for every format in the folder."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gossamer
from gossamer import dispatch, formats, patterns
from gossamer.formats import Format
from gossamer.formats.product import Product
from gossamer.nn import MAX_SHAPES, SparseLinear, describe, sparse_layers, swap

FORMATS = formats.registry.names()
M, K = 12, 20


def stored(name: str, dtype: torch.dtype = torch.float32, m: int = M, k: int = K) -> Format:
    """A random matrix that every format can hold (2:4 sparse), stored in format `name`."""
    torch.manual_seed(len(name))
    weight = torch.randn(m, k)
    return formats.registry[name].encode((weight * patterns.nm(weight.abs())).to(dtype))


def product(dtype: torch.dtype = torch.float32) -> Product:
    """Sparse codes times a dense dictionary of rank 8."""
    left = formats.registry["bitmask"].encode((torch.randn(M, 8) * (torch.rand(M, 8) < 0.5)).to(dtype))
    return Product.of(left, formats.registry["dense"].encode(torch.randn(8, K).to(dtype)))


@pytest.fixture(params=FORMATS)
def a(request: pytest.FixtureRequest) -> Format:
    return stored(request.param)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_dense_product(a: Format, bias: bool) -> None:
    b = torch.randn(M) if bias else None
    x = torch.randn(2, 3, K)
    expected = nn.functional.linear(x, a.decode(), b)
    torch.testing.assert_close(SparseLinear.from_format(a, b)(x), expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_arithmetic_follows_x(a: Format, kind: torch.dtype) -> None:
    layer, x = SparseLinear.from_format(a, torch.randn(M)), torch.randn(5, K, dtype=kind)
    y = layer(x)
    assert y.dtype == kind
    exact = nn.functional.linear(x.double(), a.decode(torch.float64), layer.bias.double())
    # One rounding at the end: half an ulp of the widest answer, whatever x is stored in.
    wide = kind if kind == torch.float64 else torch.float32
    bound = torch.finfo(kind).eps * exact.abs().max() + 64 * torch.finfo(wide).eps
    assert (y.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (K,), (1, K), (2, 3, 4, K)])
def test_shapes_of_x(a: Format, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = SparseLinear.from_format(a)(x)
    assert y.shape == (*shape[:-1], M)
    torch.testing.assert_close(y, x @ a.decode().mT)


def test_x_of_any_strides(a: Format) -> None:
    x = torch.randn(K, 2, 6).permute(2, 1, 0)[::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(SparseLinear.from_format(a)(x), x @ a.decode().mT)


def test_wrong_number_of_features(a: Format) -> None:
    with pytest.raises(ValueError, match=f"x has {K + 1} features .* fix: pass the {K} that the weight takes"):
        SparseLinear.from_format(a)(torch.randn(3, K + 1))
    with pytest.raises(ValueError, match=f"x has no dimensions; fix: pass the {K}"):
        SparseLinear.from_format(a)(torch.tensor(1.0))
    with torch.no_grad(), pytest.raises(ValueError, match="x has no dimensions"):
        SparseLinear.from_format(a)(torch.tensor(1.0))


def test_gradient_is_that_of_the_dense_layer(a: Format) -> None:
    layer, x = SparseLinear.from_format(a, torch.randn(M)), torch.randn(2, 3, K, requires_grad=True)
    layer.bias.requires_grad_()
    dense, x2 = nn.Linear(K, M), x.detach().clone().requires_grad_()
    dense.weight.data, dense.bias.data = a.decode(), layer.bias.detach().clone()
    upstream = torch.randn(2, 3, M)
    layer(x).backward(upstream)
    dense(x2).backward(upstream)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("name", FORMATS)
def test_gradcheck(name: str) -> None:
    layer = SparseLinear.from_format(stored(name, torch.float64, 4, 8))
    x, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.gossamer.linear(x, layer.parts(), layer.layout, bias)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), bias.requires_grad_()))


def test_opcheck(a: Format) -> None:
    parts, layout = list(a.tensors().values()), dispatch.to_layout(a.spec())
    x, bias = torch.randn(2, 3, K, requires_grad=True), torch.randn(M, requires_grad=True)
    torch.library.opcheck(torch.ops.gossamer.linear.default, (x, parts, layout, bias))
    torch.library.opcheck(torch.ops.gossamer.linear.default, (x, parts, layout, None))
    torch.library.opcheck(torch.ops.gossamer.decode.default, (parts, layout, torch.float64))


@pytest.mark.parametrize("bias", [False, True])
def test_compile_keeps_the_graph_whole(a: Format, bias: bool) -> None:
    torch._dynamo.reset()  # or the formats before count as recompilations
    model = nn.Sequential(SparseLinear.from_format(a, torch.randn(M) if bias else None), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        x = torch.randn(batch, K, requires_grad=True)
        x2 = x.detach().clone().requires_grad_()
        torch.testing.assert_close(compiled(x), model(x2), rtol=0, atol=0)
        compiled(x).sum().backward()
        model(x2).sum().backward()
        torch.testing.assert_close(x.grad, x2.grad)


def called(graph: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


def test_compiled_inference_calls_the_layer_by_its_number() -> None:
    torch._dynamo.reset()
    layer, seen = SparseLinear.from_format(stored("bitmask"), torch.randn(M)), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append((called(graph), len(inputs)))
        return graph

    compiled, x = torch.compile(layer, fullgraph=True, backend=backend), torch.randn(2, K)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
        layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)  # what the layer holds now counts
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
        gossamer.prepare(layer, tokens=[2], kernel="reference")
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
        with pytest.raises(ValueError, match="x has 5 features"):
            torch.ops.gossamer.call(torch.randn(2, 5), layer._number, M)
    assert all(targets == [torch.ops.gossamer.part] and inputs == 1 for targets, inputs in seen)


def test_every_copy_has_a_number_of_its_own() -> None:
    layer, x = SparseLinear.from_format(stored("bitmask")), torch.randn(2, K)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)]
    assert len({m._number for m in (layer, *copies)}) == 4
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
    for m in (layer, copies[0], copies[1]):
        torch.testing.assert_close(torch.ops.gossamer.call(x, m._number, M), m(x))
        torch.testing.assert_close(torch.ops.gossamer.part(x, m._address), m(x))
    torch.library.opcheck(torch.ops.gossamer.call.default, (x, layer._number, M))
    torch.library.opcheck(torch.ops.gossamer.part.default, (x, layer._address))


def test_a_layer_that_is_gone_is_not_called() -> None:
    layer, x = SparseLinear.from_format(stored("bitmask")), torch.randn(2, K)
    number = layer._number
    del layer
    with pytest.raises(RuntimeError, match="is gone; fix: keep the model"):
        torch.ops.gossamer.call(x, number, M)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_carries_the_tensors(strict: bool) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(SparseLinear.from_format(stored("bitmask"), torch.randn(M))).eval(), torch.randn(2, K)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), model(x))
    assert torch.ops.gossamer.linear.default in called(program.graph_module)


@pytest.mark.parametrize("name", FORMATS)
def test_dtype_moves_keep_the_stored_tensors(name: str) -> None:
    layer = SparseLinear.from_format(stored(name, torch.bfloat16), torch.randn(M))
    before = {n: p.detach().clone() for n, p in layer.named_parameters() if n != "bias"}
    for move, dtype in [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float32), torch.float32),
    ]:
        move(nn.Sequential(layer))
        assert layer.bias is not None and layer.bias.dtype == dtype
        for tensor, kept in before.items():
            found = layer.get_parameter(tensor)
            assert found.dtype == kept.dtype and torch.equal(found, kept)


def test_device_moves_move_everything(a: Format) -> None:
    layer = SparseLinear.from_format(a, torch.randn(M)).to("meta")
    assert all(p.is_meta for p in layer.parts()) and layer.bias is not None and layer.bias.is_meta
    layer.to_empty(device="cpu")
    for p, (shape, dtype) in zip(layer.parts(), formats.layout(layer.spec).values(), strict=True):
        assert not p.is_meta and tuple(p.shape) == shape and p.dtype == dtype and not p.requires_grad


def test_state_dict_round_trip(a: Format) -> None:
    first = SparseLinear.from_format(a, torch.randn(M))
    second = SparseLinear(first.spec, bias=True)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == [*a.tensors(), "bias"]


def test_deepcopy_is_independent(a: Format) -> None:
    layer = SparseLinear.from_format(a)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.decode(), layer.decode())
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(layer.parts(), twin.parts(), strict=True) if p.numel())


def borrowing() -> nn.Sequential:
    """Two layers of one dictionary, the second borrows it from the first."""
    torch.manual_seed(0)
    first = product()
    second = Product.of(stored("bitmask", m=6, k=8), first.right)
    lender = SparseLinear.from_format(first)
    return nn.Sequential(lender, nn.Identity(), SparseLinear.from_format(second, lender=lender))


def test_a_borrowed_dictionary_is_stored_once() -> None:
    model = borrowing()
    assert [n for n in model.state_dict() if "right_" in n] == ["0.right_weight"]
    assert model[2].parts()[-1] is model[0].right_weight
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held == formats.nbytes(layer.format for layer in sparse_layers(model).values())


def test_a_borrowed_dictionary_follows_its_lender() -> None:
    model = borrowing()
    expected = model[2](x := torch.ones(2, K))
    with torch.no_grad():
        model[0].right_weight.mul_(2)
    torch.testing.assert_close(model[2](x), 2 * expected)


def test_deepcopy_of_a_borrower_borrows_from_the_copy() -> None:
    model = borrowing()
    twin = copy.deepcopy(model)
    assert twin[2].parts()[-1] is twin[0].right_weight
    assert twin[0].right_weight is not model[0].right_weight
    x = torch.randn(2, K)
    assert torch.equal(twin[2](x), model[2](x))


def test_describe_and_swap_are_inverse() -> None:
    model = borrowing()
    described = describe(model)
    assert described["2"]["lender"] == "0"
    skeleton = nn.Sequential(nn.Linear(K, M, bias=False), nn.Identity(), nn.Linear(K, 6, bias=False))
    swap(skeleton, described)
    assert describe(skeleton) == described
    skeleton.load_state_dict(model.state_dict())
    x = torch.randn(2, K)
    assert torch.equal(skeleton[2](x), model[2](x))


def test_swap_makes_the_bias_of_the_layer_it_replaces() -> None:
    spec = stored("bitmask").spec()
    model = nn.Sequential(nn.Linear(K, M, dtype=torch.float16))
    swap(model, {"0": {"spec": spec, "bias": True}}, device="meta")
    assert model[0].bias.dtype == torch.float16 and model[0].bias.is_meta


@pytest.fixture
def prepared(tmp_path: Path) -> SparseLinear:
    layer = SparseLinear.from_format(stored("bitmask"), torch.randn(M))
    gossamer.prepare(layer, tokens=(1, 4), kernel="cpu_bitmask", dtype=torch.float32, lock=tmp_path / "lock.json")
    return layer


def test_what_was_looked_up_once_is_forgotten_with_its_cause(prepared: SparseLinear) -> None:
    """Outside gradients a prepared layer goes a short way, which must not outlive what it was made of."""
    x = torch.randn(3, K)
    with torch.no_grad():
        before = prepared(x)
        prepared.bias = nn.Parameter(torch.zeros(M), requires_grad=False)
        torch.testing.assert_close(prepared(x), x @ prepared.decode(torch.float32).mT)
        prepared.bias = None
        torch.testing.assert_close(prepared(x), x @ prepared.decode(torch.float32).mT)
        twin = copy.deepcopy(prepared)
        twin.weight.mul_(2)
        torch.testing.assert_close(twin(x), 2 * prepared(x))
        prepared.weight = nn.Parameter(3 * prepared.weight, requires_grad=False)
        torch.testing.assert_close(prepared(x), 3 / 2 * twin(x))
        prepared.load_state_dict(twin.state_dict())
        torch.testing.assert_close(prepared(x), twin(x))
        assert not torch.equal(prepared(x), before)


def test_the_short_way_is_not_taken_past_anybody(prepared: SparseLinear) -> None:
    x = torch.randn(3, K)
    with torch.no_grad():
        prepared(x)
    y = prepared(x.requires_grad_())
    assert y.requires_grad
    with torch.no_grad(), FlopCounterMode(display=False), pytest.raises(ValueError, match=f"{K + 1} features"):
        prepared(torch.randn(3, K + 1))
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        prepared(x.detach())
    assert "gossamer.linear.default" in seen
    doubled = torch.func.functional_call(prepared, {"bias": 2 * prepared.bias}, (x.detach(),))
    torch.testing.assert_close(doubled, prepared(x.detach()) + prepared.bias)


def add_one(module: nn.Module, args: object, y: torch.Tensor) -> torch.Tensor:
    return y + 1


def twice_x(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    return 2 * args[0]


class Plus(SparseLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("where", ["layer", "everywhere"])
def test_hooks_are_called(prepared: SparseLinear, where: str) -> None:
    x, everywhere = torch.randn(3, K), nn.modules.module
    after = prepared.register_forward_hook if where == "layer" else everywhere.register_module_forward_hook
    before = prepared.register_forward_pre_hook if where == "layer" else everywhere.register_module_forward_pre_hook
    with torch.no_grad():
        plain, doubled = prepared(x), prepared(2 * x)
        assert prepared._direct
        with after(add_one):
            assert torch.equal(prepared(x), plain + 1)
        with before(twice_x):
            assert torch.equal(prepared(x), doubled)
        assert torch.equal(prepared(x), plain)


@pytest.mark.parametrize("put", ["on the layer", "in its class", "by compile()"])
def test_another_forward_is_called(prepared: SparseLinear, put: str) -> None:
    x, forward = torch.randn(3, K), prepared.forward
    with torch.no_grad():
        plain = prepared(x)
        if put == "on the layer":
            prepared.forward = lambda x, more=1: forward(x) + more  # type: ignore[method-assign]
            assert torch.equal(prepared(x, more=2), plain + 2)
        elif put == "in its class":
            prepared.__class__ = Plus
        else:
            prepared._compiled_call_impl = lambda x: forward(x) + 1
        assert torch.equal(prepared(x), plain + 1) and torch.equal(prepared(x), plain + 1)


def test_a_call_takes_x_by_its_name_and_nothing_else(prepared: SparseLinear) -> None:
    x = torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(prepared(x=x), prepared(x))
        with pytest.raises(TypeError):
            prepared(x, x)
        with pytest.raises(TypeError):
            prepared(x, more=1)


def test_tracers_see_the_op(prepared: SparseLinear) -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, SparseLinear)

    model, x, z = nn.Sequential(prepared), torch.randn(3, K), torch.randn(3, K)
    with torch.no_grad():
        expected = model(z)
        traced = torch.jit.trace(model, (x,), check_trace=False)
        torch.testing.assert_close(traced(z), expected)
        graph = torch.fx.GraphModule(model, Leaves().trace(model))
        assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
        torch.testing.assert_close(graph(z), expected)


@pytest.fixture
def dense() -> SparseLinear:
    """Prepared, and its choice is torch's own product."""
    layer = SparseLinear.from_format(stored("bitmask"), torch.randn(M))
    step = dispatch.Step("vendor", (len(layer.parts()),), {})
    layer.use(torch.float32, [(512, (step,))], (layer.decode(torch.float32),))
    return layer


def test_torchs_own_product_is_seen_by_all(dense: SparseLinear) -> None:
    x, tangent, seen = torch.randn(3, K), torch.randn(3, K), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = [dense(x), dense(x)][-1]
        assert x.shape in dense._direct[0]
        with Watch():
            y = dense(x)
        torch.testing.assert_close(y, expected)
        assert "aten.addmm.default" in seen and "gossamer.linear.default" not in seen
        torch.testing.assert_close(torch.func.vmap(dense)(x), expected)
        torch.testing.assert_close(torch.func.vmap(dense)(x[:, None]), expected[:, None])
    found, moved = torch.func.jvp(dense, (x,), (tangent,))
    torch.testing.assert_close((found, moved), (expected, tangent @ dense.decode(torch.float32).mT))
    dense(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, dense.decode(torch.float32).sum(0).expand(3, K))
    with torch.no_grad(), pytest.raises(ValueError, match=f"{K + 1} features"):
        dense(torch.randn(3, K + 1))


def test_shapes_without_end(dense: SparseLinear) -> None:
    with torch.no_grad():
        for tokens in (*range(2 * MAX_SHAPES), 0, 600, 1):
            x = torch.randn(1, tokens, K)
            torch.testing.assert_close(dense(x), nn.functional.linear(x, dense.decode(torch.float32), dense.bias))
        assert 0 < len(dense._direct[0]) <= MAX_SHAPES
        assert dense(x.double()).dtype == torch.float64


def test_a_bias_of_another_dtype_is_read_on_every_call() -> None:
    layer, x = SparseLinear.from_format(stored("bitmask", torch.bfloat16), torch.zeros(M)), torch.randn(3, K).bfloat16()
    dense = layer.decode(torch.bfloat16)
    layer.use(torch.bfloat16, [(512, (dispatch.Step("vendor", (len(layer.parts()),), {}),))], (dense,))
    with torch.no_grad():
        before = [layer(x), layer(x)][-1]
        layer.bias.add_(100)
        torch.testing.assert_close(layer(x), before + 100, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("edit", ["assigned", "in place", "assigned in the lender", "in place in the lender"])
def test_a_prepared_layer_runs_what_is_stored(edit: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it packed, a dense copy here, belongs to what was stored when it was prepared."""
    lender, _, layer = borrowing()
    x = torch.randn(3, K)
    layer.use(
        torch.float32, [(512, (dispatch.Step("vendor", (len(layer.parts()),), {}),))], (layer.decode(torch.float32),)
    )
    with torch.no_grad():
        before = layer(x)
        owner, name = (lender, "right_weight") if "lender" in edit else (layer, "weight")
        held = owner.get_parameter(name)
        if "assigned" in edit:
            setattr(owner, name, nn.Parameter(held * 3, requires_grad=False))
        else:
            held.mul_(3)
        torch.testing.assert_close(layer(x), 3 * before, rtol=1e-2, atol=1e-2)
    assert not layer.prepared
    assert ("edited" in caplog.text) == (edit != "assigned")


def test_edited_values_are_noticed_in_every_format(a: Format) -> None:
    names = [n for n in formats.layout(a.spec()) if n in ("weight", "scale", "right_weight")]
    for name in names:
        layer = SparseLinear.from_format(a)
        step = dispatch.Step("vendor", (len(layer.parts()),), {})
        layer.use(torch.float32, [(512, (step,))], (layer.decode(torch.float32),))
        with torch.no_grad():
            layer.get_parameter(name).zero_()
            assert not layer(torch.randn(2, a.shape[1])).any()
        assert not layer.prepared
    assert names


def test_transforms_of_torch_func_and_forward_mode(a: Format) -> None:
    layer, x = SparseLinear.from_format(a, torch.randn(a.shape[0])), torch.randn(3, a.shape[1])
    dense, tangent = a.decode(torch.float32), torch.randn(3, a.shape[1])
    tangents = (torch.func.jvp(layer, (x,), (tangent,))[1], torch.func.jacfwd(layer)(x[0]) @ tangent.mT)
    torch.testing.assert_close(tangents[0], tangent @ dense.mT)
    torch.testing.assert_close(tangents[1], dense @ tangent.mT)
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), dense)
    torch.testing.assert_close(torch.vmap(layer)(x), x @ dense.mT + layer.bias)
    with forward_ad.dual_level(), torch.no_grad():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(found.tangent, tangent @ dense.mT)
