"""Products of 8 bits with a scale a row: quantizing, the pass after the product compiled as C++, all of it on a GPU."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gossamer import cslt, cuda_fp8, cuda_patterns, nvrtc
from gossamer.cslt import CsltError


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
