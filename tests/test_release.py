"""Packed in place of the stored tensors: they come back bit for bit, and nobody notices that they were gone.

On the CPU with a kernel made up for it, which packs a dense copy; on a GPU with the real ones.
"""

import copy
import io
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

import gossamer
from gossamer import dispatch, timing
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.kernels import Case, Kernel, Packed, cuda_lscd, registry
from gossamer.nn import MOVED, SparseLinear
from gossamer.patterns import nm

ROWS = {"q_proj": 96, "k_proj": 32, "v_proj": 32, "o_proj": 72}
WIDTH = 104
TIMES = {"folded": 1.0, "cuda_lscd": 1.0, "cuda_expand": 2.0}


class Folded(Kernel):
    """A layout that holds the matrix exactly and can be cut anywhere."""

    name, device, formats = "folded", "cpu", ("bitmask",)

    @classmethod
    def refuses(cls, case):
        return None if case.dtype.itemsize == 2 else "x of 16 bits"

    @classmethod
    def pack(cls, a, dtype):
        return Packed((a.decode(dtype).clone(),), {"bf16": dtype == torch.bfloat16})

    @classmethod
    def run(cls, x, packed, meta, bias):
        return linear(x, packed[0], None if bias is None else bias.to(x.dtype))

    @classmethod
    def unpack(cls, packed, meta):
        return packed[0]

    @classmethod
    def rows(cls, packed, begin, end):
        return Packed((packed.tensors[0][begin:end],), packed.meta)


def sparse(m: int, device: str) -> Bitmask:
    mask = torch.randperm(m * WIDTH).view(m, WIDTH) < m * WIDTH // 2
    return Bitmask.encode(((torch.rand(m, WIDTH) + 1) * mask).bfloat16().to(device))


class Attention(nn.Module):
    def __init__(self, device: str, bias: bool = True) -> None:
        super().__init__()
        for name, m in ROWS.items():
            held = torch.randn(m, device=device, dtype=torch.bfloat16) if bias else None
            self.register_module(name, SparseLinear.from_format(sparse(m, device), held))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(x)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "race", race)
    if request.param == "cpu":
        monkeypatch.setitem(registry._plugins, "folded", SimpleNamespace(load=lambda: Folded))
        monkeypatch.setitem(registry.__dict__, "_plugins", registry._plugins)
    dispatch.forget()
    return request.param


def race(runners, *_):
    for calls in runners.values():
        calls[0]()
    return {name: TIMES.get(name, 9.0) for name in runners}


@pytest.fixture
def plain(device: str) -> Attention:
    return Attention(device)


@pytest.fixture
def model(plain: Attention) -> Attention:
    found = copy.deepcopy(plain)
    gossamer.prepare(found, dense_memory=0)
    return found


def inputs(device: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, tokens, WIDTH, device=device).to(dtype)


def same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape and one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=2e-2, atol=0.2)


def same_answers(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    for found, expected in zip(one(x), other(x), strict=True):
        same(found, expected)


def same_bits(one: nn.Module, other: nn.Module) -> None:
    mine, yours = one.state_dict(), other.state_dict()
    assert list(mine) == list(yours)
    for name in mine:
        assert mine[name].dtype == yours[name].dtype and torch.equal(mine[name].cpu(), yours[name].cpu()), name


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 64, 65, 600])
def test_the_answers_stay_the_same(model: Attention, plain: Attention, device: str, tokens: int) -> None:
    assert all(layer.released and layer.prepared for layer in model.children())
    with torch.no_grad():
        same_answers(model, plain, inputs(device, tokens))


def test_nothing_is_there_twice(model: Attention, plain: Attention) -> None:
    assert model.q_proj.stack is model.v_proj.stack is not None and model.o_proj.stack is None
    packed = [t for layer in model.children() for t in layer._packed if t.numel() > 1000]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    assert len(storages) == 2, "one of the stack, one of o"
    stack = {t.untyped_storage().data_ptr() for t in model.q_proj.stack.operands if t.numel() > 1000}
    assert stack < storages.keys()
    assert sum(t.numel() * t.element_size() for t in packed) == sum(storages.values())
    names = {n for n, _ in model.named_parameters()}
    assert names == {f"{n}.bias" for n in ROWS}
    held = sum(layer.held_bytes for layer in model.children())
    assert held == sum(layer.packed_bytes + layer.stored_bytes for layer in plain.children()) + sum(
        layer.packed_bytes for layer in model.children()
    )


def test_they_come_back(model: Attention, plain: Attention) -> None:
    same_bits(model, plain)
    assert model.q_proj.released, "asking for them leaves the layer as it is"
    for name in ROWS:
        mine, yours = model.get_submodule(name), plain.get_submodule(name)
        assert torch.equal(mine.weight, yours.weight) and torch.equal(mine.mask, yours.mask)
        assert torch.equal(mine.decode(), yours.decode())
        assert mine.spec == yours.spec and mine.device == yours.device
    with pytest.raises(AttributeError):
        _ = model.q_proj.nothing
    for layer in model.children():
        layer.unprepare()
    assert not any(layer.released for layer in model.children())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    same_bits(model, plain)


def test_saved_without_a_trace(model: Attention, plain: Attention, tmp_path) -> None:
    save_file(model.state_dict(), tmp_path / "prepared.safetensors")
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    assert (tmp_path / "prepared.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    gossamer.save(model, tmp_path / "folder")
    loaded = gossamer.load(tmp_path / "folder", model=dense_skeleton())
    same_bits(loaded, plain)


def dense_skeleton() -> nn.Module:
    model = Attention("cpu")
    for name, m in ROWS.items():
        model.set_submodule(name, nn.Linear(WIDTH, m, dtype=torch.bfloat16))
    return model


def test_copied_pickled_moved(model: Attention, plain: Attention, device: str, caplog) -> None:
    x = inputs(device, 3)
    with torch.no_grad():
        again = copy.deepcopy(model)
        assert again.q_proj.released
        same_answers(again, plain, x)
        same_answers(pickle.loads(pickle.dumps(model)), plain, x)
        file = io.BytesIO()
        torch.save(model, file)
        there = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=False)
        same_answers(there, copy.deepcopy(plain).cpu(), x.cpu())
        same_bits(there, plain)
        model.half()
        assert model.q_proj.released and model.q_proj.weight.dtype == torch.bfloat16
        model.bfloat16().to(device)
        assert model.q_proj.released, "it is there already"
        same_answers(model, plain, x)
    again.to("meta")
    assert not again.q_proj.released and again.q_proj.weight.is_meta
    assert MOVED in caplog.text
    model.cpu()
    same_bits(model, plain)
    if device == "cuda":
        assert not model.q_proj.prepared
        same_answers(model, plain.cpu(), x.cpu())


def test_loading_other_weights(model: Attention, device: str) -> None:
    other = Attention(device)
    model.load_state_dict(other.state_dict())
    assert not model.q_proj.released
    same_bits(model, other)
    gossamer.prepare(model, dense_memory=0)
    model.q_proj.weight = other.k_proj.weight
    assert not model.q_proj.released and model.k_proj.released
    assert model.q_proj.weight is other.k_proj.weight


def test_prepared_again(model: Attention, plain: Attention, device: str) -> None:
    layouts = [layer.layout for layer in model.children()]
    gossamer.prepare(model, dense_memory=0)
    assert [layer.layout for layer in model.children()] == layouts
    same_bits(model, plain)
    gossamer.prepare(model, dtype=torch.float32)
    assert device == "cuda" or not model.q_proj.released
    with torch.no_grad():
        same_answers(model, plain, inputs(device, 2, torch.float32))
    same_bits(model, plain)


def test_another_dtype_and_gradients(model: Attention, plain: Attention, device: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens in (2, 100):
            x = inputs(device, tokens, dtype).requires_grad_()
            y = x.detach().clone().requires_grad_()
            for found, expected in zip(model(x), plain(y), strict=True):
                same(found, expected)
                found.sum().backward(retain_graph=True)
                expected.sum().backward(retain_graph=True)
            same(x.grad, y.grad)


@pytest.mark.parametrize("tokens", [5, 80])
def test_compiled_whole(model: Attention, plain: Attention, device: str, tokens: int) -> None:
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        for _ in range(3):
            x = inputs(device, tokens)
            for found, expected in zip(compiled(x), plain(x), strict=True):
                same(found, expected)


def test_no_memory_leaves_a_layer_as_it_was(plain: Attention, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Folded if device == "cpu" else cuda_lscd.CudaLscd
    model, pack, module = copy.deepcopy(plain), kernel.pack.__func__, sys.modules["gossamer.prepare"]
    grant, timed = module._grant, []

    def failing(cls, a, dtype):
        if timed and a.shape[0] == ROWS["o_proj"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pack(cls, a, dtype)

    monkeypatch.setattr(module, "_grant", lambda *args: (timed.append(True), grant(*args)))
    monkeypatch.setattr(kernel, "pack", classmethod(failing))
    with pytest.raises(torch.OutOfMemoryError, match="fix: make room"):
        gossamer.prepare(model, dense_memory=0)
    assert model.q_proj.released and not model.o_proj.prepared
    same_bits(model, plain)
    with torch.no_grad():
        same_answers(model, plain, inputs(device, 2))


def test_what_does_not_come_back_is_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(registry[n] for n in ("folded", "cuda_expand") if n in TIMES and registry_has(n, device))
    unpack = kernel.unpack.__func__

    def lossy(cls, packed, meta):
        dense = unpack(cls, packed, meta).clone()
        dense[0, dense[0].argmax()] += 1
        return dense

    monkeypatch.setattr(kernel, "unpack", classmethod(lossy))
    model = Attention(device)
    before = copy.deepcopy(model)
    gossamer.prepare(model)
    assert not any(layer.released for layer in model.children())
    same_bits(model, before)


def registry_has(name: str, device: str) -> bool:
    return (name == "folded") == (device == "cpu")


@pytest.mark.gpu
def test_dense_copies_on_a_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    dispatch.forget()
    slow_beyond = {"cuda_lscd": 1.0, "cuda_expand": 8.0, "vendor": 2.0}
    monkeypatch.setattr(timing, "race", lambda runners, *_: {n: slow_beyond.get(n, 9.0) for n in runners})
    plain = Attention("cuda")
    model = copy.deepcopy(plain)
    found = gossamer.prepare(model)
    ways = dispatch.route(model.o_proj.layout).ways
    assert [[s.kernel for s in way] for _, way in ways] == [["cuda_lscd"], ["vendor"]]
    assert model.o_proj.released and found.copies > 0
    for tokens in (1, 64, 65, 700):
        same_answers(model, plain, inputs("cuda", tokens))
    same_bits(model, plain)
    slow_beyond["vendor"] = 0.1
    gossamer.prepare(model, again=True)
    assert [s.kernel for _, way in dispatch.route(model.o_proj.layout).ways for s in way] == ["vendor"]
    assert model.o_proj.released, "it comes back from the dense copy"
    assert model.o_proj.held_bytes == 2 * WIDTH * ROWS["o_proj"]
    same_bits(model, plain)


@pytest.mark.gpu
def test_a_kernel_that_a_gpu_has_no_memory_for(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "race", lambda runners, *_: {n: TIMES.get(n, 9.0) for n in runners})
    dispatch.forget()
    a = torch.randn(64, 128).bfloat16()
    plain = SparseLinear.from_format(NM.encode((a * nm(a.float().abs())).cuda()))
    layer, kernel, asked = copy.deepcopy(plain), registry["cuda_nm24_vendor"], []

    def hungry(cls, a, dtype):
        asked.append(a.shape)
        return Packed((torch.empty(1 << 50, dtype=dtype, device="cuda"),))

    if kernel.refuses(Case(plain.spec, plain.device, torch.bfloat16, 512)):
        pytest.skip("the library's products of 2:4 matrices are not for this GPU")
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "pack", classmethod(hungry))
        gossamer.prepare(layer, dtype=torch.bfloat16, dense_memory=0)
    assert asked and "no memory to try out cuda_nm24_vendor; layers run without it" in caplog.text
    chosen = {s.kernel for _, way in dispatch.route(layer.layout).ways for s in way}
    assert "cuda_nm24" in chosen and kernel.name not in chosen
    x = torch.randn(3, 128, device="cuda").bfloat16()
    with torch.no_grad():
        same(layer(x), plain(x))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 200])
def test_under_a_cuda_graph(tmp_path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "race", race)
    dispatch.forget()
    plain, x = Attention("cuda"), inputs("cuda", tokens)
    model = copy.deepcopy(plain)
    gossamer.prepare(model, dense_memory=0)
    with torch.inference_mode():
        model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for one, other in zip(found, plain(x), strict=True):
            same(one, other)


@pytest.mark.gpu
def test_compiled_with_graphs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "race", race)
    dispatch.forget()
    plain = Attention("cuda")
    model = copy.deepcopy(plain)
    gossamer.prepare(model, dense_memory=0)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(5):
            x = inputs("cuda", 8)
            for found, expected in zip(compiled(x), plain(x), strict=True):
                same(found, expected)


@pytest.mark.gpu
def test_the_clock_on_a_gpu() -> None:
    a, b = torch.randn(64, 64, device="cuda"), torch.randn(4096, 4096, device="cuda")
    calls = {"small": [lambda: a @ a], "large": [lambda: b @ b], "waits": [lambda: float(a.sum())]}
    found = timing.race(calls, torch.device("cuda"), 0.001)
    assert 0 < found["small"] < found["large"] and found["waits"] > 0
    assert torch.randn(3, device="cuda").isfinite().all(), "no capture was broken off"


def test_a_transformers_model(device: str, tiny_folder, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).to(device)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            pruned = layer.weight.detach() * (torch.rand(layer.weight.shape) < 0.5).to(device)
            model.set_submodule(name, SparseLinear.from_format(Bitmask.encode(pruned)))
    plain = copy.deepcopy(model)
    gossamer.prepare(model, dense_memory=0)
    layer = model.model.layers[0].mlp.gate_proj
    assert layer.released and layer.stack is not None
    ids = torch.arange(1, 9, device=device).view(2, 4)
    with torch.no_grad():
        same(model(ids).logits, plain(ids).logits)
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 8)
    gossamer.save(model, tmp_path / "small")
    same_bits(gossamer.load(tmp_path / "small"), plain)
    assert layer.released, "saving leaves the model prepared"
    dense = gossamer.densify(model)
    assert torch.equal(dense.model.layers[0].mlp.gate_proj.weight, plain.model.layers[0].mlp.gate_proj.decode())
