"""Products of 8 bits with a scale a row: quantizing, the pass after the product compiled as C++, all of it on a GPU."""

import contextlib
import ctypes
import math
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from gossamer import cslt, cuda_fp8, cuda_patterns, nvrtc
from gossamer.cslt import Algorithm, CsltError


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
    for args, message in (
        ((x.float(), ones[:16], packed, ones), r"takes x \[T, K\] in e4m3, not torch.float32 \(16, 64\); fix"),
        ((x, ones[:8], packed, ones), "float32 scales of its rows; fix"),
        ((x, ones[:16], packed, ones.double()), "float32 scales of its rows; fix"),
        ((x, ones[:16], packed, ones.view(1, 32)), "float32 scales of its rows; fix"),
        ((x, ones[:16], packed.to("meta"), ones), "all operands on the GPU of x, cpu; fix"),
        ((x, ones[:16], packed, ones, ones[:31]), r"takes a bias \[32\], not \(31,\); fix"),
        ((x, ones[:16], packed, ones), "both operands on one GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda_fp8.multiply(*args)
    with pytest.raises(ValueError, match=r"takes a bias \[32\], not \(31,\); fix"):
        cuda_fp8.multiply_whole(x, 1.0, packed, 1.0, 32, ones[:31])


@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("times", [[1.0, 2.0], [2.0, 1.0]], ids=["sparse", "dense"])
def test_what_pays_is_measured_once(monkeypatch: pytest.MonkeyPatch, each_row: bool, times: list[float]) -> None:
    runs, left = [], list(times)

    def timed(run: partial) -> float:
        runs.append(run.func)
        return left.pop(0)

    operands = torch.zeros(32, 64).to(cuda_fp8.E4M3), torch.zeros(16, 64).to(cuda_fp8.E4M3)
    monkeypatch.setattr(cuda_fp8.cslt_search, "microseconds", timed)
    monkeypatch.setattr(cuda_fp8.cslt_search, "operands", lambda problem, index: operands)
    monkeypatch.setattr(cuda_fp8.cslt, "compress", lambda a: a)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    cuda_fp8.pays.cache_clear()
    for _ in range(2):
        assert cuda_fp8.pays(32, 64, 16, 0, each_row) is (times[0] < times[1])
    assert runs == [cuda_fp8.multiply if each_row else cuda_fp8.multiply_whole, torch._scaled_mm]
    cuda_fp8.pays.cache_clear()


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
