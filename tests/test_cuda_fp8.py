"""Products of 8 bits with a scale a row: quantizing, the pass after the product compiled as C++, all of it on a GPU."""

import contextlib
import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import cslt, cuda_fp8, cuda_patterns, nvrtc, patterns
from gossamer.cslt import Algorithm, CsltError, Problem


def test_scales_are_the_least_powers_of_two_that_fit() -> None:
    a = torch.randn(64, 96) * torch.logspace(-20, 20, 64).unsqueeze(-1)
    a[3] = 0
    a[4, 0], a[4, 1:] = 448 * 8, 1.0
    bits, scale = cuda_fp8.quantized(a)
    assert torch.equal(torch.frexp(scale)[0], torch.full((64,), 0.5)) and scale[3] == 1 and scale[4] == 8
    kept = torch.arange(64) != 3
    most = bits.float().abs().amax(-1)[kept]
    assert bool((most > 224 * 15 / 16).all()) and bool((most <= 448).all()) and not bits[3].float().any()
    error = (bits.float() * scale.unsqueeze(-1) - a).abs()
    assert bool((error <= a.abs() / 16 + scale.unsqueeze(-1) * 2**-10).all())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_no_number_of_the_product(value: float) -> None:
    a = torch.tensor([[1.0, 0.0, 2.0, 0.0], [value, 0.0, 3.0, 0.0]])
    bits, scale = cuda_fp8.quantized(a)
    y = (bits.float() @ torch.ones(4, 1)).squeeze(1) * scale
    assert y[0] == 3 and y[1].isnan() and patterns.is_24(bits.float())


def test_one_scale_for_a_whole_matrix() -> None:
    a = torch.randn(64, 96).bfloat16()
    a[0, 0] = -896
    bits, scale = cuda_fp8.quantized_whole(a)
    assert scale == 2.0 and bits[0, 0].float() == -448
    assert bool(((bits.float() * scale - a.float()).abs() <= a.float().abs() / 16 + scale * 2**-10).all())
    bits, scale = cuda_fp8.quantized_whole(a, 0.5)  # a static scale that the largest value does not fit: it saturates
    assert scale == 0.5 and bits[0, 0].float() == -448 and torch.equal(bits[1], (a[1].float() / 0.5).to(cuda_fp8.E4M3))
    assert cuda_fp8.quantized_whole(torch.zeros(4, 4))[1] == 1.0
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"the scale is .*; fix: give a positive one"):
            cuda_fp8.quantized_whole(a, wrong)
    with pytest.raises(ValueError, match="the scale is nan"):
        cuda_fp8.quantized_whole(a * math.nan)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_pass_after_the_product(tmp_path: Path, with_bias: bool) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = re.sub(r"#if BF16.*?#endif\n", "", nvrtc.read("scale24.cuh"), count=1, flags=re.DOTALL)
    source = re.sub(r"__device__ inline i32 sum_before.*?\n}\n", "", source, flags=re.DOTALL)
    header = (Path(__file__).parent / "emulate_cuda.h").read_text()
    call = "launch(tokens, 2, 256, [=] { scale24(d, t, r, b, tokens, rows); });"
    entry = f'extern "C" void run(u16* d, float* t, float* r, u16* b, i64 tokens, i64 rows) {{ {call} }}'
    (tmp_path / "scale.cpp").write_text("\n".join([header, source, entry]))
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, "scale.cpp", "-o", "scale.so"], cwd=tmp_path, check=True)
    d = torch.randn(3, 2080).bfloat16()
    tokens, rows, bias = 2.0 ** torch.randint(-5, 5, (3,)), torch.rand(2080), torch.randn(2080).bfloat16()
    exact = d.double() * (tokens.unsqueeze(-1) * rows).double() + (bias.double() if with_bias else 0)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (d, tokens, rows, bias)]
    ctypes.CDLL(str(tmp_path / "scale.so")).run(
        *pointers[:3], pointers[3] if with_bias else None, ctypes.c_int64(3), ctypes.c_int64(2080)
    )
    assert torch.allclose(d.double(), exact, rtol=2**-8, atol=1e-6)


def test_refusals() -> None:
    x, one = torch.zeros(16, 32).to(cuda_fp8.E4M3), torch.ones(32)
    with pytest.raises(CsltError, match="needs an NVIDIA GPU; fix: multiply in bfloat16"):
        cuda_fp8.multiply(x, one[:16], torch.empty(0), one)
    with pytest.raises(CsltError, match="multiply_whole needs an NVIDIA GPU; fix: multiply in bfloat16"):
        cuda_fp8.multiply_whole(x, 1.0, torch.empty(0), 1.0, 32)


def test_operands_of_other_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fp8, "refusal", lambda device: None)
    monkeypatch.setattr(cuda_fp8.cslt_search, "best", lambda problem, index: (Algorithm(0), 1.0))
    x, packed, ones = torch.zeros(16, 64).to(cuda_fp8.E4M3), torch.zeros(8, dtype=torch.uint8), torch.ones(32)
    wrong: list[tuple[Any, str]] = [
        ((x.float(), ones[:16], packed, ones), r"takes x \[T, K\] in e4m3, not torch.float32 \(16, 64\); fix"),
        ((x, ones[:8], packed, ones), "float32 scales of its rows; fix"),
        ((x, ones[:16], packed, ones.double()), "float32 scales of its rows; fix"),
        ((x, ones[:16], packed, ones.view(1, 32)), "float32 scales of its rows; fix"),
        ((x, ones[:16], packed, ones, ones[:31]), r"takes a bias \[32\], not \(31,\); fix"),
        (
            (x, ones[:16], packed, ones, None, x),
            r"a contiguous dense matrix \[32, 64\] in e4m3, not .* \(16, 64\); fix",
        ),
        ((x, ones[:16], packed, ones), "both operands on one GPU"),
    ]
    for args, message in wrong:
        with pytest.raises(ValueError, match=message):
            cuda_fp8.multiply(*args)
    with pytest.raises(ValueError, match=r"takes a bias \[32\], not \(31,\); fix"):
        cuda_fp8.multiply_whole(x, 1.0, packed, 1.0, 32, ones[:31])
    with pytest.raises(ValueError, match=r"the scales are -1.0 and 1.0; fix: give positive"):
        cuda_fp8.multiply_whole(x, -1.0, packed, 1.0, 32)


class Timer:
    """In place of `cslt_search.microseconds`: says what it was told, and remembers what it was to time."""

    def __init__(self, *times: float) -> None:
        self.left, self.seen = list(times), list[str]()

    def __call__(self, *runs: partial) -> float:
        assert len({r.args[2 if r.func.__name__ != "dense" else 1].data_ptr() for r in runs}) == len(runs) > 1
        self.seen.append(runs[0].func.__name__)
        return self.left.pop(0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Timer]]:
    """Products of cuSPARSELt and of torch in plain torch on this machine, timed as the test says."""

    def dense(x: Tensor, a: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        taken.append("dense")
        y = x.float() @ a.float().mT * x_scale * scale
        return (y if bias is None else y + bias).bfloat16()

    def sparse(packed: Tensor, problem: Problem, b: Tensor, algorithm: Algorithm, alpha: float = 1.0) -> Tensor:
        taken.append("sparse")
        return (b.float() @ packed.float().mT * alpha).bfloat16()

    def timed(*times: float) -> Timer:
        monkeypatch.setattr(cuda_fp8.cslt_search, "microseconds", timer := Timer(*times))
        return timer

    def drawn(p: Problem, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(p.rows, p.depth).to(cuda_fp8.E4M3), torch.zeros(p.columns, p.depth).to(cuda_fp8.E4M3)

    taken: list[str] = []
    monkeypatch.setattr(cuda_fp8, "COLD_BYTES", 3 * 32 * 64)
    monkeypatch.setattr(cuda_fp8, "refusal", lambda device: None)
    monkeypatch.setattr(cuda_fp8, "_dense", dense)
    monkeypatch.setattr(cuda_fp8.cslt, "matmul", sparse)
    monkeypatch.setattr(cuda_fp8.cslt, "compress", lambda a, trusted=False: a)
    monkeypatch.setattr(cuda_fp8.cslt_search, "best", lambda problem, index: (Algorithm(0), 1.0))
    monkeypatch.setattr(cuda_fp8.cslt_search, "operands", drawn)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cuda_fp8, "_held", lambda number, device: torch.tensor(number))
    timed.taken = taken  # type: ignore[attr-defined]
    cuda_fp8.pays.cache_clear()
    yield timed
    cuda_fp8.pays.cache_clear()


@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("times", [[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]], ids=["sparse", "dense", "equal"])
def test_what_pays_is_measured_once(fake_gpu: Callable[..., Timer], each_row: bool, times: list[float]) -> None:
    timer = fake_gpu(*times)
    for _ in range(2):
        assert cuda_fp8.pays(32, 64, 16, 0, each_row) is (times[0] < times[1])
    assert timer.seen == ["multiply" if each_row else "multiply_whole", "dense"]


def test_given_both_matrices_the_faster_product_is_taken(fake_gpu: Any) -> None:
    """One measurement for all tokens up to a power of two; what the library does not take runs dense."""
    a, scale = cuda_fp8.quantized_whole(torch.randn(32, 64))
    x, x_scale = cuda_fp8.quantized_whole(torch.randn(64, 64))
    bias, expected = torch.randn(32).bfloat16(), x.float() @ a.float().mT * (x_scale * scale)
    fake_gpu(1.0, 2.0, 2.0, 1.0, 1.0, 2.0)  # up to 16 tokens sparse, up to 32 dense, up to 64 sparse
    for tokens, way in (
        (16, ["sparse"]),
        (32, ["dense"]),
        (48, ["sparse"]),
        (64, ["sparse"]),
        (17, ["dense"]),
        (0, []),
    ):
        for own in (None, bias):
            fake_gpu.taken.clear()
            y = cuda_fp8.multiply_whole(x[:tokens], x_scale, a, scale, 32, own, a)
            wanted = expected[:tokens] + (0 if own is None else own)
            assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), wanted, rtol=2e-2, atol=1e-1)
            assert fake_gpu.taken == way
    assert [cuda_fp8._size(n) for n in (1, 16, 17, 128, 129, 16384, 20000)] == [16, 16, 32, 128, 256, 16384, 16384]


def test_without_memory_to_time_it_is_dense_this_time(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, x, ones = torch.zeros(32, 64).to(cuda_fp8.E4M3), torch.zeros(16, 64).to(cuda_fp8.E4M3), torch.ones(32)
    best, full = cuda_fp8.cslt_search.best, [True]

    def fails(problem: Problem, index: int) -> Any:
        if full:
            raise torch.OutOfMemoryError(full.pop())
        return best(problem, index)

    monkeypatch.setattr(cuda_fp8.cslt_search, "best", fails)
    fake_gpu(1.0, 2.0)
    cuda_fp8.multiply_whole(x, 1.0, a, 1.0, 32, None, a)
    cuda_fp8.multiply_whole(x, 1.0, a, 1.0, 32, None, a)
    assert fake_gpu.taken == ["dense", "sparse"]
    monkeypatch.setattr(cuda_fp8.cslt_search, "best", lambda problem, index: None)  # no algorithm is right
    cuda_fp8.pays.cache_clear()
    cuda_fp8.multiply(x, ones[:16], a, ones, None, a)
    assert fake_gpu.taken == ["dense", "sparse", "dense"]
    with pytest.raises(CsltError, match="no right algorithm"):
        cuda_fp8.multiply(x, ones[:16], a, ones)


def test_scales_are_made_once_and_the_number_of_kept_ones_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, waits = torch.device("cpu"), list[torch.device]()
    stream = SimpleNamespace(synchronize=lambda: waits.append(cpu))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(cuda_fp8, "_scales", {})
    monkeypatch.setattr(cuda_fp8, "MOST_SCALES", 2)
    found = [cuda_fp8._held(number, cpu) for number in (0.5, 2.0, 7.0)]
    assert [t.item() for t in found] == [0.5, 2.0, 7.0] and len(cuda_fp8._scales) == 2
    assert cuda_fp8._held(0.5, cpu) is found[0] and cuda_fp8._held(7.0, cpu) is not found[2]
    assert len(waits) == 2
    monkeypatch.setattr(cuda_fp8, "_scales", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda_fp8._held(0.5, cpu).item() == 0.5 and not cuda_fp8._scales  # its memory is the graph's


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_ops_are_whole_to_torch_compile(fake_gpu: Any, with_bias: bool) -> None:
    """Their fakes say what the products return; nothing in them is traced."""
    fake_gpu(2.0, 1.0)
    (a, scale), (x, x_scale) = cuda_fp8.quantized(torch.randn(32, 64)), cuda_fp8.quantized(torch.randn(48, 64))
    bias = torch.randn(32).bfloat16() if with_bias else None
    rows, whole = torch.ops.gossamer.rows24.default, torch.ops.gossamer.whole24.default
    tests = "test_faketensor", "test_aot_dispatch_static"  # the other two do not know 8 bits
    torch.library.opcheck(rows, (x, x_scale, a, scale, bias, a), test_utils=tests)
    torch.library.opcheck(whole, (x, 2.0, a, 0.5, 32, bias, None), test_utils=tests)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    if reason := cuda_fp8.refusal(torch.device("cuda")):
        pytest.skip(reason)
    a = cuda_patterns.pruned_reference(torch.randn(256, 512, device="cuda").bfloat16() * torch.rand(256, 1).cuda() ** 9)
    x = torch.randn(96, 512, device="cuda").bfloat16() * 1e3
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    (a8, scale), (x8, x_scale) = cuda_fp8.quantized(a), cuda_fp8.quantized(x)
    exact = (x8.double() * x_scale.double().unsqueeze(-1)) @ (a8.double() * scale.double().unsqueeze(-1)).mT
    for own in (None, bias):
        y = cuda_fp8.multiply(x8, x_scale, cslt.compress(a8), scale, own)
        expected = exact if own is None else exact + own.double()
        assert float((y.double() - expected).norm() / expected.norm()) < 1e-2
    with pytest.raises(ValueError, match="pass quantized"):
        cuda_fp8.multiply(x, x_scale, cslt.compress(a8), scale)
    with pytest.raises(ValueError, match="all operands on the GPU of x, cuda:0; fix"):
        cuda_fp8.multiply(x8, x_scale, cslt.compress(a8).cpu(), scale)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [0, 16, 33, 96])
def test_with_the_dense_matrix_on_the_gpu(sparse: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of both products, compiled; tokens that the library does not take run dense."""
    if reason := cuda_fp8.refusal(torch.device("cuda")):
        pytest.skip(reason)
    monkeypatch.setattr(cuda_fp8, "pays", lambda *shape: sparse)
    torch.compiler.reset()
    a = cuda_patterns.pruned_reference(torch.randn(256, 512, device="cuda").bfloat16())
    x, bias = torch.randn(tokens, 512, device="cuda").bfloat16(), torch.randn(256, device="cuda", dtype=torch.bfloat16)
    (a8, scale), (x8, x_scale) = cuda_fp8.quantized(a), cuda_fp8.quantized(x)
    (a1, scale1), (x1, x_scale1) = cuda_fp8.quantized_whole(a), cuda_fp8.quantized_whole(x)
    packed, packed1 = cslt.compress(a8), cslt.compress(a1)

    @torch.compile(fullgraph=True)
    def both(x8: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        by_rows = cuda_fp8.multiply(x8, x_scale, packed, scale, bias, a8)
        return by_rows, cuda_fp8.multiply_whole(x1, x_scale1, packed1, scale1, 256, bias, a1)

    exact = (x8.double() * x_scale.double().unsqueeze(-1)) @ (a8.double() * scale.double().unsqueeze(-1)).mT
    exact1 = (x1.double() * x_scale1) @ (a1.double() * scale1).mT
    for y, expected in zip(both(x8, x1), (exact, exact1), strict=True):
        assert y.shape == (tokens, 256)
        assert not tokens or float((y.double() - expected - bias.double()).norm() / expected.norm()) < 1e-2


@pytest.mark.gpu
def test_one_scale_on_the_gpu() -> None:
    if reason := cuda_fp8.refusal(torch.device("cuda")):
        pytest.skip(reason)
    a = cuda_patterns.pruned_reference(torch.randn(256, 512, device="cuda").bfloat16())
    x, bias = (
        torch.randn(96, 512, device="cuda").bfloat16() * 1e3,
        torch.randn(256, device="cuda", dtype=torch.bfloat16),
    )
    (a8, scale), (x8, x_scale) = cuda_fp8.quantized_whole(a), cuda_fp8.quantized_whole(x)
    packed, exact = cslt.compress(a8), (x8.double() * x_scale) @ (a8.double() * scale).mT
    scales = torch.tensor(x_scale, device="cuda"), torch.tensor(scale, device="cuda")
    dense = torch._scaled_mm(x8, a8.mT, *scales, out_dtype=torch.bfloat16)
    y = cuda_fp8.multiply_whole(x8, x_scale, packed, scale, 256)
    for expected, found in (
        (exact, y),
        (dense.double(), y),
        (exact + bias.double(), cuda_fp8.multiply_whole(x8, x_scale, packed, scale, 256, bias)),
        (7 * exact, cuda_fp8.multiply_whole(x8, 7 * x_scale, packed, scale, 256)),
    ):
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_fp8.multiply_whole(x8, x_scale, packed, scale, 256)
    y.zero_()
    graph.replay()
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-2
    with pytest.raises(ValueError, match="bytes of cslt.compress on the left"):
        cuda_fp8.multiply(x8, torch.ones(96, device="cuda"), packed, torch.ones(288, device="cuda"))
    assert all(isinstance(cuda_fp8.pays(256, 512, 96, 0, each_row), bool) for each_row in (False, True))
