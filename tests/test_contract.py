"""What every file in the registries' folders must do; a new format or method is tested by being there."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import dispatch, formats, methods, patterns
from gossamer.formats import FormatError
from gossamer.kernels import reference
from gossamer.methods import RatioError
from gossamer.nn import SparseLinear
from gossamer.stats import Stats

FORMATS = formats.registry.names()
METHODS = methods.registry.names()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def matrices(draw: st.DrawFn, rows: int = 33, cols: int = 70) -> Tensor:
    m, k = draw(st.integers(0, rows)), draw(st.integers(0, cols))
    density = draw(st.sampled_from([0.0, 1.0, 0.5, 0.1, 0.9]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a = torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < density)
    return a.to(draw(st.sampled_from(DTYPES)))


def holdable(name: str, a: Tensor) -> Tensor:
    """What is left of `a` in a format that cannot hold everything: of one that rounds, what it does not round."""
    if name == "bsr_int8":
        q = (a.float() * 40).round().clamp(-127, 127)
        full = q.abs() == q.abs().amax(1, keepdim=True) if q.numel() else q.bool()
        return torch.where(full & (q != 0), q.sign() * 127, q).to(a.dtype)  # then the scale of a row is 1
    return torch.where(patterns.nm(a.float().abs()), a, 0) if name == "nm24" else a


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(a=matrices())
def test_decode_inverts_encode(name: str, a: Tensor) -> None:
    a = holdable(name, a)
    found = formats.registry[name].encode(a)
    found.validate()
    assert found.shape == tuple(a.shape)
    assert torch.equal(found.decode(), a + 0.0)
    assert torch.equal(found.decode(torch.float64), a.double() + 0.0)
    assert not found.decode().signbit().logical_and(a == 0).any(), "a zero comes back as -0.0"


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(a=matrices())
def test_every_input_kind_stores_the_same(name: str, a: Tensor) -> None:
    a = holdable(name, a)
    cls = formats.registry[name]
    expected = cls.encode(a)
    strided = torch.stack([a, a], dim=2)[..., 0]
    kinds = [strided, a.t().contiguous().t(), a.to_sparse(), a.to_sparse_csr(), a.clone().requires_grad_()]
    if a.dtype in (torch.float32, torch.float64):
        kinds.append(scipy.sparse.coo_array(a.numpy()))
        kinds.append(scipy.sparse.csc_array(a.numpy()))
    for kind in kinds:
        found = cls.encode(kind)
        assert json.dumps(found.spec()) == json.dumps(expected.spec())
        for one, other in zip(found.tensors().values(), expected.tensors().values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_duplicates_are_summed_and_stored_zeros_dropped(name: str) -> None:
    index = torch.tensor([[0, 0, 1, 2, 2], [1, 1, 2, 0, 0]])
    values = torch.tensor([1.0, 2.0, 0.0, 5.0, -5.0])
    expected = torch.zeros(3, 4)
    expected[0, 1] = 3.0
    cls = formats.registry[name]
    for a in (torch.sparse_coo_tensor(index, values, (3, 4)), scipy.sparse.coo_array((values, tuple(index)), (3, 4))):
        found = cls.encode(a)
        torch.testing.assert_close(found.decode(), expected, rtol=0 if cls.exact else 1e-5, atol=0)
        assert [t.shape for t in found.tensors().values()] == [t.shape for t in cls.encode(expected).tensors().values()]


@pytest.mark.parametrize("name", FORMATS)
def test_special_values(name: str) -> None:
    a = torch.zeros(3, 9)
    a[0, 0], a[1, 4], a[2, 8] = math.nan, math.inf, -math.inf
    a[0, 4] = -0.0
    cls = formats.registry[name]
    if name in ("product", "bsr_int8"):
        with pytest.raises(FormatError, match="NaN or Inf"):
            cls.encode(a)
        return
    found = cls.encode(a).decode()
    assert torch.equal(found.nan_to_num(7.0), a.nan_to_num(7.0))
    assert found[0, 0].isnan()


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(a=matrices())
def test_spec_and_tensors_are_the_whole_format(name: str, a: Tensor) -> None:
    found = formats.registry[name].encode(holdable(name, a))
    spec, tensors = json.loads(json.dumps(found.spec())), found.tensors()
    layout = formats.layout(spec)
    assert list(layout) == list(tensors)
    assert next(iter(tensors)) == "weight"
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout
    assert torch.equal(formats.from_spec(spec, tensors).decode(), found.decode())
    assert found.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("name", FORMATS)
def test_what_does_not_fit_the_spec_is_refused(name: str) -> None:
    found = formats.registry[name].encode(holdable(name, torch.randn(6, 10)))
    spec, tensors = found.spec(), found.tensors()
    for tensor in tensors:
        short = {n: t[:-1] if n == tensor else t for n, t in tensors.items()}
        with pytest.raises(FormatError, match=tensor):
            formats.from_spec(spec, short)
        with pytest.raises(FormatError, match="missing"):
            formats.from_spec(spec, {n: t for n, t in tensors.items() if n != tensor})
    with pytest.raises(FormatError, match=r"newer .* install a newer Gossamer"):
        formats.from_spec(spec | {"version": spec["version"] + 1}, tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_tensor_cannot_pass_for_the_dense_weight(name: str) -> None:
    """A loader without Gossamer must stop at a shape mismatch, or find the true weight."""
    a = holdable(name, torch.randn(16, 24))
    found = formats.registry[name].encode(a)
    if tuple(found.tensors()["weight"].shape) == found.shape:
        assert torch.equal(found.tensors()["weight"], a)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3)])
def test_reference_kernel_against_float64(name: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    a = holdable(name, torch.randn(17, 29)).to(dtype)
    x = torch.randn(*lead, 29, 2)[..., 0].to(dtype)
    bias = torch.randn(17).to(dtype)
    y = reference.linear(x, formats.registry[name].encode(a), bias)
    expected = x.double() @ a.double().mT + bias.double()
    assert y.dtype == dtype and y.shape == expected.shape
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(y.double(), expected, rtol=tolerance, atol=tolerance * 5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_refuses_what_it_could_only_round_off(name: str, dtype: torch.dtype) -> None:
    """Integers came back cut off, and of complex numbers the real part."""
    a = formats.registry[name].encode(holdable(name, torch.randn(9, 21)))
    with pytest.raises(TypeError, match=r"real floating numbers, not torch\..*; fix: pass x.float\(\)"):
        SparseLinear.from_format(a)(torch.ones(4, 21, dtype=dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_op_equals_reference_kernel(name: str) -> None:
    found = formats.registry[name].encode(holdable(name, torch.randn(9, 21)))
    x, parts, layout = torch.randn(4, 21), list(found.tensors().values()), dispatch.to_layout(found.spec())
    torch.testing.assert_close(torch.ops.gossamer.linear(x, parts, layout, None), reference.linear(x, found))
    assert torch.equal(torch.ops.gossamer.decode(parts, layout, torch.float32), found.decode())


def problem(m: int, k: int, seed: int = 0) -> tuple[Tensor, Stats]:
    """A weight and the Gram of inputs that are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x = x * torch.logspace(0, -1.5, k)
    return torch.randn(m, k, generator=generator), Stats((x.mT @ x).double(), 512)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shapes", [[(96, 64)], [(64, 96)], [(64, 64), (32, 64), (32, 64)]])
def test_fit_stores_what_size_promised(name: str, shapes: list[tuple[int, int]], ratio: float) -> None:
    method = methods.create(name)
    weights, stats = [problem(m, k, i)[0] for i, (m, k) in enumerate(shapes)], problem(*shapes[0])[1]
    found = method.fit(weights, stats, ratio)
    promised = method.size(shapes, ratio)
    assert [f.shape for f in found] == shapes
    assert formats.nbytes(found) == sum(promised)
    assert len(promised) == len(shapes)
    stored = 1 - sum(promised) / sum(methods.dense_bytes(s) for s in shapes)
    assert ratio <= stored + 1e-9 and stored - ratio < 0.03, "a few bytes less, never more"
    for weight, each in zip(weights, found, strict=True):
        each.validate()
        assert stats.relative_error(weight, each.decode(torch.float32)) < 0.5


@pytest.mark.parametrize("name", METHODS)
def test_fit_is_deterministic_and_leaves_its_input_alone(name: str) -> None:
    weight, stats = problem(48, 64)
    before = weight.clone()
    one, two = (methods.create(name).fit([weight], stats, 0.3)[0] for _ in range(2))
    assert torch.equal(weight, before)
    for left, right in zip(one.tensors().values(), two.tensors().values(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", METHODS)
def test_methods_survive_a_rank_one_gram_and_dead_inputs(name: str) -> None:
    """Inputs that are all alike, and channels that are always zero, as massive activations and padding make them."""
    weight = torch.randn(40, 32)
    x = torch.ones(64, 1) * torch.randn(1, 32)
    x[:, :5] = 0
    found = methods.create(name).fit([weight], Stats((x.mT @ x).double(), 64), 0.3)[0]
    assert found.decode().isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_a_ratio_out_of_reach_is_refused_before_work(name: str) -> None:
    with pytest.raises(RatioError, match="out of reach"):
        methods.create(name).size([(4, 4)], 0.99)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_knobs_are_named(name: str) -> None:
    with pytest.raises(TypeError, match="no knob wibble; it has: .*dtype"):
        methods.create(name, wibble=1)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(KeyError, match="unknown format 'csc'; there are: bcsr, bitmask, bsr_int8, csr, dense"):
        formats.registry["csc"]
    with pytest.raises(KeyError, match="unknown method 'prune'; there are: block, cospadi"):
        methods.registry["prune"]


def test_a_huge_sparse_matrix_is_never_made_dense() -> None:
    """200,000 x 20,000 would be 16 GB in float32."""
    rows, cols = np.random.default_rng(0).integers([200_000, 20_000], size=(1000, 2)).T
    a = scipy.sparse.coo_array((np.ones(1000, np.float32), (rows, cols)), shape=(200_000, 20_000))
    found = formats.registry["bitmask"].encode(a)
    found.validate()
    assert found.tensors()["weight"].sum() == 1000
    assert found.density < 1e-6
