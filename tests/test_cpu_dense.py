"""cpu_dense against float64, on every instruction set of this CPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gossamer import native
from gossamer.formats import Format
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.formats.product import Product
from gossamer.kernels import Case
from gossamer.kernels.cpu_dense import CpuDense

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def linear(x: Tensor, a: Format, bias: Tensor | None = None) -> Tensor:
    packed = CpuDense.pack(a, x.dtype)
    return CpuDense.run(x, packed.tensors, packed.meta, bias)


def check(y: Tensor, x: Tensor, a: Tensor, bias: Tensor | None = None) -> None:
    want = x.double() @ a.double().mT + (0 if bias is None else bias.double())
    scale = x.double().abs() @ a.double().mT.abs()
    assert y.dtype == x.dtype and y.shape == want.shape
    assert (y.double() - want).norm() <= 1e-6 * scale.norm() + (4e-3 * want.norm() if x.dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 129), (33, 64), (20, 577), (9, 9001), (0, 5), (5, 0)], ids=str)
def test_product(isa: str, shape: tuple[int, int], dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, bias = torch.randn(shape).to(dtype), torch.randn(shape[0])
    for tokens in range(17):
        x = torch.randn(tokens, shape[1]).to(x_dtype)
        check(linear(x, Dense.encode(a)), x, a)
        check(linear(x, Dense.encode(a), bias), x, a, bias)


def test_strided_x_and_leading_dimensions(isa: str) -> None:
    torch.manual_seed(0)
    a, wide = torch.randn(40, 99).bfloat16(), torch.randn(2, 6, 297)
    for x in (
        wide[:, ::2, :99],
        wide[0, :, ::3],
        wide[0].T[:99].T,
        wide[0, 0, :99],
        wide[:1, :1, :99].expand(3, 5, 99),
    ):
        check(linear(x, Dense.encode(a)), x, a)


def test_packs_any_format() -> None:
    torch.manual_seed(0)
    a, x = torch.randn(30, 50) * (torch.rand(30, 50) < 0.5), torch.randn(2, 50)
    check(linear(x, Bitmask.encode(a.bfloat16())), x, a.bfloat16())
    check(linear(x, Dense.encode(a.half())), x, a.half())
    left, right = torch.randn(30, 8), torch.randn(8, 50)
    product = Product.of(Dense.encode(left), Dense.encode(right))
    torch.testing.assert_close(linear(x, product), x @ (left @ right).mT, rtol=1e-4, atol=1e-4)


def test_uses_the_stored_weight_where_it_lies() -> None:
    stored = Dense.encode(torch.randn(30, 50).bfloat16())
    assert CpuDense.pack(stored, torch.float32).tensors[0].data_ptr() == stored.weight.data_ptr()


def test_refuses_what_it_cannot_run() -> None:
    spec, cpu = Dense.encode(torch.ones(4, 4)).spec(), torch.device("cpu")
    assert CpuDense.refuses(Case(spec, cpu, torch.bfloat16, 16)) is None
    assert "at most 16 tokens" in str(CpuDense.refuses(Case(spec, cpu, torch.bfloat16, 17)))
    assert "x in float32" in str(CpuDense.refuses(Case(spec, cpu, torch.float64, 1)))
    assert "on the CPU" in str(CpuDense.refuses(Case(spec, torch.device("cuda"), torch.float32, 1)))
    with pytest.raises(ValueError, match="17 tokens"):
        native.dense_linear(torch.ones(17, 4), torch.ones(4, 4))


def test_more_tokens_than_it_admits_to() -> None:
    """A layer that was prepared for one token only must not fail on a prompt."""
    torch.testing.assert_close(linear(torch.ones(17, 4), Dense.encode(torch.ones(3, 4))), torch.full((17, 3), 4.0))
