"""cpu_bitmask and cpu_bitmask_many against float64, on every instruction set of this CPU."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gossamer import native
from gossamer.formats import Format
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.kernels import Case, Kernel, KernelError, cpu_bitmask
from gossamer.kernels.cpu_bitmask import CpuBitmask
from gossamer.kernels.cpu_bitmask_many import CpuBitmaskMany
from gossamer.kernels.cpu_dense import CpuDense

ISAS = native.isas()
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [*range(1, 18), 40]
MANY = [17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 300]
SHAPES = [(1, 1), (3, 7), (1, 100), (17, 129), (33, 64), (20, 577), (40, 1100)]
KERNELS: list[tuple[type[Kernel], type[Format]]] = [(CpuBitmask, Bitmask), (CpuDense, Dense)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def sparse(shape: tuple[int, int], density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density)).to(dtype)


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(x: Tensor, a: Tensor, bias: Tensor | None = None, kernel: Any = CpuBitmask, as_: Any = Bitmask) -> Tensor:
    packed = kernel.pack(as_.encode(a), x.dtype)
    return kernel.run(x, packed.tensors, packed.meta, bias)


def many(x: Tensor, a: Tensor, bias: Tensor | None = None) -> Tensor:
    """Without the way back to panels, which would be right, too."""
    values, mask, offsets = CpuBitmaskMany.pack(Bitmask.encode(a), x.dtype).tensors
    y = native.bitmask_many(x, values, mask, offsets, a.shape[1], bias)
    assert y is not None
    return y


def check(y: Tensor, x: Tensor, a: Tensor, bias: Tensor | None = None) -> None:
    want = x.double() @ a.double().mT
    want = want if bias is None else want + bias.double()
    assert y.dtype == x.dtype and y.shape == want.shape
    # The bound is on the terms, not on their sum, which may cancel.
    scale = x.double().abs() @ a.double().mT.abs() + (0 if bias is None else bias.double().abs())
    assert (y.double() - want).norm() <= 1e-6 * scale.norm() + (4e-3 * want.norm() if x.dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(isa: str, shape: tuple[int, int], dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    for i, tokens in enumerate(TOKENS):
        x = some((tokens, shape[1]), x_dtype)
        for density in [0.0, 0.5, 1.0, 0.1, 0.9][i % 5 :: 3]:
            a = sparse(shape, density, dtype, i)
            bias = some((shape[0],), DTYPES[i % 2]) if i % 3 else None
            check(linear(x, a, bias), x, a, bias)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 64), (65, 128)], ids=str)
def test_product_of_many(isa: str, shape: tuple[int, int], dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    for i, tokens in enumerate(MANY):
        x, a = some((tokens, shape[1]), x_dtype), sparse(shape, [0.0, 0.5, 1.0, 0.1, 0.9][i % 5], dtype, i)
        bias = some((shape[0],), DTYPES[i % 2]) if i % 3 else None
        check(many(x, a, bias), x, a, bias)


@given(
    st.integers(0, 90), st.integers(0, 300), st.floats(0, 1), st.integers(0, 140),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_shape(
    rows: int, cols: int, density: float, tokens: int, dtype: torch.dtype, x_dtype: torch.dtype, seed: int
) -> None:
    x, a = some((tokens, cols), x_dtype, seed), sparse((rows, cols), density, dtype, seed)
    before = native.isa()
    try:
        for name in ISAS:
            native.set_isa(name)
            check(linear(x, a), x, a)
            check(many(x, a), x, a)
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("shape", [(2, 3, 96), (96,), (1, 1, 96), (0, 96), (3, 0, 96), (5, 8, 96)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    a, x = sparse((40, 96), 0.5, torch.bfloat16), some(shape, torch.float32)
    check(linear(x, a), x, a)
    check(many(x, a), x, a)


@pytest.mark.parametrize("tokens", [2, 5, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_x(isa: str, tokens: int, dtype: torch.dtype) -> None:
    a, wide = sparse((40, 99), 0.5, torch.bfloat16), some((2 * tokens, 3 * 99), dtype)
    for x in (wide[::2, :99], wide[:tokens, 5:104], wide[:tokens, ::3], wide.T[:99].T[:tokens], wide[:1, :99]):
        check(linear(x, a), x, a)
        check(many(x, a), x, a)
    same = wide[:1, :99].expand(tokens, -1)
    check(linear(same, a), same, a)
    check(many(same, a), same, a)


@pytest.mark.parametrize("kernel", [CpuBitmask, CpuBitmaskMany])
@pytest.mark.parametrize("tokens", [1, 16, 20, 140])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_as_in_the_dense_product(isa: str, tokens: int, dtype: torch.dtype, kernel: Any) -> None:
    """0 x NaN and 0 x Inf are NaN, wherever the weight is a zero that is not stored."""
    a = sparse((30, 150), 0.5, torch.bfloat16)
    a[3, 5], a[4, 6], a[5] = float("inf"), float("nan"), 0
    for value in (float("nan"), float("inf"), -float("inf")):
        for column in (0, 77, 149):
            x = some((tokens, 150), dtype)
            x[tokens // 2, column] = value
            want, y = x.double() @ a.double().mT, linear(x, a, None, kernel).double()
            if tokens > 16 and not torch.equal(F.linear(x, a.to(dtype)).isnan(), want.isnan()):
                pytest.skip("torch's own product (2.11, bfloat16) spreads a NaN to the row before")
            assert want.isnan().any() and torch.equal(y.isnan(), want.isnan())
            assert torch.equal(y.isinf(), want.isinf())
    x = some((tokens, 150), dtype)
    y, want = linear(x, a, None, kernel).double(), x.double() @ a.double().mT
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y[want.isinf()], want[want.isinf()])


def test_the_largest_number_is_finite(isa: str) -> None:
    x = torch.full((17, 3), torch.finfo(torch.float32).max)
    assert torch.equal(many(x, torch.tensor([[0.0, 0.5, 0.0]])), x[:, :1] / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_bfloat16_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    exact = torch.tensor([[1.00390625], [1.01171875], [-1.00390625], [3.3895314e38], [1e-40], [float("nan")]])
    want = exact[:, 0].bfloat16().float().nan_to_num(7)
    for f, tokens in ((linear, 1), (many, 17)):
        found = f(torch.ones(tokens, 1, dtype=torch.bfloat16), exact).float().nan_to_num(7)
        assert torch.equal(found, want.expand(tokens, -1))


def test_bits_do_not_depend_on_threads() -> None:
    a = sparse((1500, 700), 0.4, torch.bfloat16)
    a[:100] = sparse((100, 700), 1.0, torch.bfloat16)  # rows of uneven cost
    before = torch.get_num_threads()
    try:
        for tokens, dtype in itertools.product((1, 3, 16, 17, 200), DTYPES):
            x, found = some((tokens, 700), dtype), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(linear(x, a) if tokens <= native.MAX_TOKENS else many(x, a))
            assert all(torch.equal(y, found[0]) for y in found)
    finally:
        torch.set_num_threads(before)


def test_panels_are_many() -> None:
    a, x = sparse((2200, 1024), 0.3, torch.bfloat16), some((17, 1024), torch.bfloat16)
    assert a.nbytes > 2 * cpu_bitmask.PANEL_BYTES
    for same in (x, x.float()):
        check(linear(same, a, some((2200,), x.dtype)), same, a, some((2200,), x.dtype))


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_made_for_many_few_go_where_they_are_faster(tokens: int) -> None:
    a, x = sparse((20, 30), 0.5, torch.float32), some((tokens, 30), torch.float32)
    packed = CpuBitmaskMany.pack(Bitmask.encode(a), x.dtype)
    bound = CpuBitmaskMany.bind(packed.tensors, packed.meta, None)
    assert torch.equal(bound(x), linear(x, a)) and torch.equal(linear(x, a, None, CpuBitmaskMany), linear(x, a))


def test_many_bound_as_run() -> None:
    a, x, bias = sparse((20, 30), 0.5, torch.float32), some((2, 20, 30), torch.float32), some((20,), torch.float32)
    packed = CpuBitmaskMany.pack(Bitmask.encode(a), x.dtype)
    assert torch.equal(CpuBitmaskMany.bind(packed.tensors, packed.meta, bias)(x), many(x, a, bias))
    assert torch.equal(CpuBitmaskMany.run(x, packed.tensors, packed.meta, bias), many(x, a, bias))


def test_packs_where_it_lies() -> None:
    stored = Bitmask.encode(sparse((64, 100), 0.5, torch.bfloat16))
    packed = CpuBitmask.pack(stored, torch.float32)
    assert packed.tensors[0].data_ptr() == stored.weight.data_ptr()
    assert packed.tensors[1].data_ptr() == stored.mask.data_ptr()
    assert packed.nbytes == stored.nbytes + 65 * 8


def test_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Bitmask.encode(torch.ones(4, 4)).spec()
    cpu = torch.device("cpu")
    assert CpuBitmask.refuses(Case(spec, cpu, torch.float32, 1000)) is None
    assert "on the CPU" in str(CpuBitmask.refuses(Case(spec, torch.device("cuda"), torch.float32, 1)))
    assert "x in float32" in str(CpuBitmask.refuses(Case(spec, cpu, torch.float16, 1)))
    assert "values in" in str(CpuBitmask.refuses(Case(spec | {"dtype": "float16"}, cpu, torch.float32, 1)))
    assert CpuBitmaskMany.refuses(Case(spec, cpu, torch.float32, 17)) is None
    assert "more than 16 tokens" in str(CpuBitmaskMany.refuses(Case(spec, cpu, torch.float32, 16)))
    assert "x in float32" in str(CpuBitmaskMany.refuses(Case(spec, cpu, torch.float16, 17)))
    with pytest.raises(KernelError, match="dense"):
        CpuBitmask.pack(Dense.encode(torch.ones(4, 4)), torch.float32)
    monkeypatch.setattr(native, "_built", None)
    assert "pip install" in str(CpuBitmask.refuses(Case(spec, cpu, torch.float32, 1)))


def test_damaged_weights_are_refused() -> None:
    stored = Bitmask.encode(sparse((6, 20), 0.5, torch.float32))
    stored.mask[3, 1] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        CpuBitmask.pack(stored, torch.float32)


def test_wrong_x_is_refused() -> None:
    for f in (linear, many):
        with pytest.raises(ValueError, match="pass the 20 that"):
            f(torch.ones(1, 21), sparse((6, 20), 0.5, torch.float32))


@pytest.mark.parametrize(("kernel", "as_"), KERNELS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_large_matrix_in_steps_is_the_same_to_the_bit(kernel: Any, as_: Any, tokens: int) -> None:
    a, x = sparse((3001, 900), 0.9, torch.float32), some((tokens, 900), torch.float32)
    a[1500:] *= torch.arange(900) % 7 == 0  # uneven: whoever is done first helps
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(linear(x, a, None, kernel, as_))
    finally:
        torch.set_num_threads(threads)
    check(found[0], x, a)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_bias_of_any_dtype_and_strides(kind: torch.dtype, tokens: int) -> None:
    """As `half()` leaves it, or a view; a function of x alone sees it change."""
    a, x = sparse((20, 30), 0.5, torch.float32), some((tokens, 30), torch.float32)
    for bias in (some((20,), torch.float32).to(kind), some((40,), torch.float32)[::2]):
        for kernel, form in ((CpuBitmask, Bitmask), (CpuBitmaskMany, Bitmask), (CpuDense, Dense)):
            packed = kernel.pack(form.encode(a), x.dtype)
            call = kernel.bind(packed.tensors, packed.meta, bias)
            for _ in range(2):
                check(kernel.run(x[:16], packed.tensors, packed.meta, bias), x[:16], a, bias)
                check(call(x[:16]), x[:16], a, bias)
                bias.mul_(2)
            if kernel is not CpuDense:
                check(call(x), x, a, bias)
