"""Which kernel runs: the prediction, the lock file, GOSSAMER_KERNEL, what happens when a kernel fails."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gossamer import dispatch, lock
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.formats.product import Product
from gossamer.kernels import Case, KernelError, reference, registry
from gossamer.kernels.cpu_bitmask import CpuBitmask
from gossamer.nn import SparseLinear
from gossamer.once import say

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.delenv("GOSSAMER_KERNEL", raising=False)
    monkeypatch.delenv("GOSSAMER_LOCK", raising=False)
    dispatch.forget()
    say.cache_clear()
    yield
    dispatch.forget()


def sparse(m: int = 24, k: int = 40, dtype: torch.dtype = torch.bfloat16) -> Bitmask:
    return Bitmask.encode((torch.randn(m, k) * (torch.rand(m, k) < 0.5)).to(dtype))


def case(tokens: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    return Case(sparse().spec(), torch.device(device), dtype, tokens)


def test_a_kernel_for_the_format_is_predicted_before_the_oracle() -> None:
    assert dispatch.choose(case()).name == "cpu_bitmask"
    assert dispatch.choose(case(dtype=torch.float64)).name == "reference"
    assert dispatch.eligible(case(device="cuda"))[-1].name == "reference"
    assert "cpu_bitmask" not in {k.name for k in dispatch.eligible(case(device="cuda"))}


def test_the_lock_file_decides_for_layers_that_were_not_prepared() -> None:
    book = lock.load(CPU)
    book.merge(lock.key(case().spec, CPU, torch.float32), 1, {"cpu_bitmask": 9.0, "reference": 2.0, "vendor": 0.1})
    book.save()
    dispatch.forget()
    assert dispatch.choose(case(1)).name == "reference", "a dense copy is not made on the fly"
    assert dispatch.choose(case(8)).name == "cpu_bitmask", "no time for this many tokens: predicted"


def test_buckets_cover_every_number_of_tokens() -> None:
    assert [dispatch.bucket(n) for n in (0, 1, 3, 17, 512, 10**6)] == [1, 1, 4, 32, 512, 512]


def test_a_kernel_asked_for_by_name_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_KERNEL", "reference")
    assert dispatch.choose(case()).name == "reference"
    monkeypatch.setenv("GOSSAMER_KERNEL", "cpu_bitmask")
    assert dispatch.choose(case()).name == "cpu_bitmask"
    with pytest.raises(
        KernelError, match="cpu_bitmask.*asked for by name.*needs x in float32 or bfloat16.*; fix: name another"
    ):
        dispatch.choose(case(dtype=torch.float64))
    with pytest.raises(KernelError, match="needs x on cpu"):
        dispatch.choose(case(device="cuda"))
    monkeypatch.setenv("GOSSAMER_KERNEL", "no_such")
    with pytest.raises(KeyError, match="unknown kernel 'no_such'; there are: .*cpu_bitmask"):
        dispatch.choose(case())


def failing(x: Tensor, *_: object) -> Tensor:
    raise KernelError("broken on purpose")


def test_a_kernel_chosen_automatically_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CpuBitmask, "run", failing)
    a, x = sparse(), torch.randn(3, 40)
    with caplog.at_level(logging.WARNING, "gossamer"):
        for _ in range(3):
            assert torch.equal(SparseLinear.from_format(a)(x), reference.linear(x, a))
    assert [r.message for r in caplog.records].count(
        "cpu_bitmask failed (broken on purpose); reference runs instead"
    ) == 1


def test_a_kernel_asked_for_by_name_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBitmask, "run", failing)
    monkeypatch.setenv("GOSSAMER_KERNEL", "cpu_bitmask")
    with pytest.raises(KernelError, match="broken on purpose"):
        SparseLinear.from_format(sparse())(torch.randn(3, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_a_product_runs_factor_by_factor_and_rounds_once(dtype: torch.dtype, tokens: int) -> None:
    a = Product.of(sparse(24, 10), Dense.encode(torch.randn(10, 40).bfloat16()))
    x, bias = torch.randn(tokens, 40).to(dtype), torch.randn(24)
    exact = x.double() @ (a.left.decode(torch.float64) @ a.right.decode(torch.float64)).mT + bias
    y = SparseLinear.from_format(a, bias)(x)
    assert y.dtype == dtype
    wide = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    bound = torch.finfo(dtype).eps * exact.abs().amax().nan_to_num() + 256 * wide if tokens else 0
    assert ((y.double() - exact).abs() <= bound).all()


def test_the_layout_string_carries_the_choices_and_nothing_else_changes() -> None:
    a = sparse()
    ways = [(1, (dispatch.Step("cpu_bitmask", (0, 1, 2), {"cols": 40}),)), (8, (dispatch.Step("vendor", (3,), {}),))]
    found = dispatch.route(dispatch.to_layout(a.spec(), torch.float32, ways))
    assert found.spec == a.spec()
    assert found.dtype == torch.float32
    assert [found.way(n)[0].kernel for n in (0, 1, 2, 8, 9, 1000)] == ["cpu_bitmask"] * 2 + ["vendor"] * 4
    assert dispatch.route(dispatch.to_layout(a.spec())).dtype is None


def test_every_kernel_declares_its_domain() -> None:
    for name in registry:
        kernel = registry[name]
        assert kernel.name == name
        assert kernel.device in ("any", "cpu", "cuda")
        assert kernel.formats or name == "reference"
        assert kernel.__doc__
