"""What runs on the CPU runs the same on a GPU: formats, ops, methods."""

import copy
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer import dispatch, formats, methods, nn, patterns
from gossamer.checkpoint import densify
from gossamer.formats.dense import Dense
from gossamer.formats.product import Product
from gossamer.kernels import reference
from gossamer.stats import Stats

pytestmark = pytest.mark.gpu

SHAPES = [(17, 29, 0.5), (64, 128, 0.0), (33, 64, 1.0), (1, 7, 0.5), (0, 8, 0.5)]


def sparse(m: int, k: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    a = torch.randn(m, k) * (torch.rand(m, k) < density)
    return torch.where(patterns.nm(a.abs()), a, 0).to(dtype)


@pytest.mark.parametrize("name", formats.registry.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k", "density"), SHAPES)
def test_formats_are_the_same_bits_on_both_devices(
    name: str, dtype: torch.dtype, m: int, k: int, density: float
) -> None:
    a = sparse(m, k, density, dtype)
    here, there = formats.registry[name].encode(a), formats.registry[name].encode(a.cuda())
    there.validate()
    assert here.spec() == there.spec()
    for one, other in zip(here.tensors().values(), there.tensors().values(), strict=True):
        assert torch.equal(one, other.cpu())
    assert torch.equal(there.decode().cpu(), a + 0.0 if here.exact else here.decode())


@pytest.mark.parametrize("name", formats.registry.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_on_a_second_stream(name: str, dtype: torch.dtype) -> None:
    a = sparse(48, 64, 0.5, dtype).cuda()
    layer = nn.SparseLinear.from_format(formats.registry[name].encode(a), torch.randn(48, dtype=dtype, device="cuda"))
    x = torch.randn(5, 64, dtype=dtype, device="cuda")
    assert layer.bias is not None
    expected = x.double() @ layer.decode(torch.float64).mT + layer.bias.double()  # some formats round
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=5 * tolerance)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = layer(x)
    stream.synchronize()
    assert torch.equal(other, layer(x))


def test_layers_move_between_devices_without_a_change() -> None:
    layer = nn.SparseLinear.from_format(formats.registry["bitmask"].encode(sparse(48, 64, 0.5, torch.bfloat16)))
    before = layer.decode()
    moved = layer.cuda().to(torch.float16)
    assert moved.weight.is_cuda and moved.weight.dtype == torch.bfloat16
    assert torch.equal(moved.decode().cpu(), before)
    assert torch.equal(layer.cpu().decode(), before)


def test_compiled_whole_with_gradient() -> None:
    layer = nn.SparseLinear.from_format(formats.registry["bitmask"].encode(sparse(48, 64, 0.5, torch.float32).cuda()))
    x = torch.randn(5, 64, device="cuda", requires_grad=True)
    torch.compile(layer, fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.decode().sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", methods.registry.names())
def test_methods_fit_as_well_as_on_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight, gram = torch.randn(96, 64, generator=generator), (x.mT @ x).double()
    here = methods.create(name).fit([weight], Stats(gram, 512), 0.3)[0]
    there = methods.create(name).fit([weight.cuda()], Stats(gram.cuda(), 512), 0.3)[0]
    assert there.nbytes == here.nbytes
    errors = [Stats(gram, 512).relative_error(weight, f.decode(torch.float32).cpu()) for f in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_op_equals_the_reference_kernel() -> None:
    found = formats.registry["product"].encode(torch.randn(9, 21).cuda())
    x, parts = torch.randn(4, 21, device="cuda"), list(found.tensors().values())
    y = torch.ops.gossamer.linear(x, parts, dispatch.to_layout(found.spec()), None)
    assert torch.equal(y, reference.linear(x, found))


@pytest.mark.parametrize(("kernel", "codes"), [("cuda_lscd", "bitmask"), ("cuda_nm24", "nm24")])
def test_codes_of_a_product_on_the_kernels_for_few_tokens(kernel: str, codes: str, tmp_path: Path) -> None:
    s, d = sparse(256, 128, 0.4, torch.bfloat16).cuda(), torch.randn(128, 520, device="cuda").bfloat16()
    a = Product.of(formats.registry[codes].encode(s), Dense.encode(d))
    model = torch.nn.Sequential(nn.SparseLinear.from_format(a))
    gossamer.prepare(model, tokens=[1, 16, 256], dtype=torch.bfloat16, kernel=kernel, lock=tmp_path / "lock.json")
    for tokens in (0, 1, 16, 300):
        assert kernel in [step.kernel for step in dispatch.route(model[0].layout).way(max(tokens, 1))]
        x = torch.randn(tokens, 520, device="cuda").bfloat16()
        expected = x.double() @ d.double().mT @ s.double().mT
        error = (model(x).double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert float(error) < 1e-2, f"{error:.1e} of {tokens} tokens"


@pytest.mark.parametrize(("kernel", "how"), [("cuda_lscd", {}), ("cuda_nm24", {"format": "nm24"})])
def test_generate_with_a_static_cache(kernel: str, how: dict[str, str], tiny_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).cuda().eval()
    ratio = 0.4375 if how else 0.4
    sparse = gossamer.compress(copy.deepcopy(dense), method="magnitude", ratio=ratio, **how)
    dense = densify(copy.deepcopy(sparse), torch.bfloat16)
    gossamer.prepare(sparse, tokens=[1, 16], dtype=torch.bfloat16, kernel=kernel, lock=tmp_path / "lock.json")
    ids = torch.arange(1, 13, device="cuda").view(2, 6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    for model in (sparse, dense):
        assert model.generate(ids, **options).shape == (2, 11)
    with torch.inference_mode():
        found, expected = sparse(ids).logits.double(), dense(ids).logits.double()
    assert float((found - expected).norm() / expected.norm()) < 3e-2
