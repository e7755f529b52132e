"""The fused passes of 2:4 training: on the CPU their sources compiled as C++ and run thread by thread, on a GPU as they
are; against plain torch, bit for bit, in the layout of cuSPARSELt that was read off an H100."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer import cslt, cuda_patterns, nvrtc, patterns
from gossamer.cslt import CsltError
from gossamer.formats.nm24 import NM

ENTRIES = {
    "pack24_rows": ("PPPPqq", "rows * cols / 64 / 64, 1, 64"),
    "search24": ("PPqq", "(rows / 4 * cols / 8 + 127) / 128, 1, 128"),
    "pack24_tiles": ("PPPPqq", "cols / 64, rows / 64, 128"),
    "act24": ("PPqq", "rows, (cols / 8 + 255) / 256, 256"),
    "act24_back": ("PPPqq", "rows, (cols / 8 + 255) / 256, 256"),
    "mvue24": ("PPPPPPqq", "cols / 64, rows / 64, 64 * (1 + GATED)"),
}


def layout(a: Tensor) -> Tensor:
    """A 2:4 matrix, sizes multiples of 64, as cuSPARSELt 0.8 compresses it on an H100."""
    m, k = a.shape
    stored = NM.encode(a)
    nibbles = torch.stack([stored.index & 15, stored.index >> 4], -1)
    nibbles = nibbles.view(m // 64, 4, 2, 8, k // 64, 2, 2, 2, 2).permute(0, 4, 5, 1, 3, 7, 8, 6, 2).reshape(-1, 2)
    return torch.cat([stored.weight.contiguous().view(torch.uint8).flatten(), nibbles[:, 0] | nibbles[:, 1] << 4])


def as_cpp(file: str) -> str:
    """A device source that a C++ compiler takes, and for each of its entries `run_ENTRY` with the launch around it."""
    source = nvrtc.read(file)
    source = re.sub(r"#if BF16.*?#endif\n", "", source, count=1, flags=re.DOTALL)
    source = re.sub(r"__device__ inline i32 sum_before.*?\n}\n", "", source, flags=re.DOTALL)
    runs = []
    for entry, (args, grid) in ENTRIES.items():
        if f" {entry}(" in source:
            pointers = args.count("P")
            names = ", ".join(f"void* p{i}" for i in range(pointers))
            types = re.search(rf" {entry}\((.*?)\)", source, re.DOTALL)[1].replace("const ", "").split(",")  # type: ignore[index]
            casts = ", ".join(f"({types[i].split('*')[0].strip()}*)p{i}" for i in range(pointers))
            call = f"launch({grid}, [=] {{ {entry}({casts}, rows, cols); }});"
            runs.append(f'extern "C" void run_{entry}({names}, i64 rows, i64 cols) {{ {call} }}')
    header = (Path(__file__).parent / "emulate_cuda.h").read_text()
    return "\n".join([header, source, *runs])


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("emulated")
    if compiler is None:
        pytest.skip("needs g++")
    made: dict[str, ctypes.CDLL] = {}

    def build(file: str, **macros: int) -> ctypes.CDLL:
        name = "_".join([file.removesuffix(".cuh"), *(f"{k}{v}" for k, v in macros.items())])
        if name not in made:
            (folder / f"{name}.cpp").write_text(as_cpp(file))
            flags = [
                "-std=c++20",
                "-O1",
                "-w",
                "-shared",
                "-fPIC",
                "-pthread",
                *(f"-D{k}={v}" for k, v in macros.items()),
            ]
            subprocess.run([compiler, *flags, f"{name}.cpp", "-o", f"{name}.so"], cwd=folder, check=True)
            made[name] = ctypes.CDLL(str(folder / f"{name}.so"))
        return made[name]

    return build


def run(library: ctypes.CDLL, entry: str, *args: Tensor | None, sizes: tuple[int, int]) -> None:
    pointers = [ctypes.c_void_p(None if a is None else a.data_ptr()) for a in args]
    getattr(library, f"run_{entry}")(*pointers, *map(ctypes.c_int64, sizes))


def room(a: Tensor) -> Tensor:
    return torch.full((a.numel() * 9 // 8,), 0xA5, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_rows_are_pruned_and_compressed(emulated, kind: cuda_patterns.Kind) -> None:
    w = torch.randn(128, 192).bfloat16()
    w[0, :8], w[1, :4], w[2, 2] = 0, 1, -0.0
    w[3, 4:8] = torch.tensor([0, 0, 0, 5.0])
    scale = torch.tensor([1.483]) if kind == "soft" else None
    out, dense = room(w), torch.full_like(w, torch.nan)
    library = emulated("pack24_rows.cuh", SOFT=int(kind == "soft"), DENSE=1)
    run(library, "pack24_rows", w, scale, out, dense, sizes=(128, 192))
    expected = cuda_patterns.pruned_reference(w, kind, scale)
    assert torch.equal(dense.view(torch.int16), expected.view(torch.int16))
    # A group with fewer than two non-zeros may name any free places, so it is what they stand for that counts.
    assert torch.equal(unpacked(out, 128, 192), expected.float())


def test_masks_both_ways(emulated) -> None:
    w = torch.randn(128, 192).bfloat16()
    library, masks = emulated("pack24_tiles.cuh"), torch.zeros(32, 48, dtype=torch.int16)
    run(library, "search24", w, masks, sizes=(128, 192))
    mask = cuda_patterns.mask_of(masks)
    assert torch.equal(mask, patterns.transposable24(w))
    out, out_t = room(w), room(w)
    run(library, "pack24_tiles", w, masks, out, out_t, sizes=(128, 192))
    masked = torch.where(mask, w, 0)
    assert torch.equal(out, layout(masked)) and torch.equal(out_t, layout(masked.mT.contiguous()))


ESTIMATORS = [patterns.mvue24, patterns.mvue24_exact]


@pytest.mark.parametrize("exact", [0, 1])
def test_the_estimate_of_a_gradient(emulated, exact: int) -> None:
    g = torch.randn(128, 64).bfloat16()
    uniforms, out = patterns.uniforms24(g.mT.contiguous()), room(g)
    library = emulated("act24.cuh", ACT=0, GATED=0, EXACT=exact, GIVEN=1)
    run(library, "mvue24", None, g, None, out, None, uniforms, sizes=(128, 64))
    assert_same(unpacked(out, 64, 128), ESTIMATORS[exact](g.mT.contiguous(), uniforms).float())


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same places, and values as far as float32 sums in another order round to the same bfloat16."""
    assert torch.equal(found != 0, expected != 0)
    assert torch.allclose(found, expected, rtol=2**-7, atol=0)


def test_the_estimate_of_what_is_not_random(emulated) -> None:
    """Groups along the tokens: of no, one and two values, of a large one, of infinities and NaN."""
    inf, nan = torch.inf, torch.nan
    groups = [[0, 0, 0, 0], [0, -3, 0, 0], [0, 0, 0, 2], [1, 0, -1, 0], [0, 0, 3e38, -3e38], [1e-38, 0, 0, 0]]
    groups += [[9, 1, 0, 0], [inf, 1, 2, 3], [1, -inf, inf, 0], [0, 0, nan, 1], [3e38, 3e38, 3e38, -3e38]]
    g = torch.zeros(64, 64).bfloat16()
    for i, group in enumerate(groups):
        g[4 * i : 4 * i + 4] = torch.tensor(group).unsqueeze(-1)
    uniforms, out = patterns.uniforms24(g.mT.contiguous()), room(g)
    uniforms[0], uniforms[1] = 0, 1 - 2**-24
    library = emulated("act24.cuh", ACT=0, GATED=0, EXACT=1, GIVEN=1)
    run(library, "mvue24", None, g, None, out, None, uniforms, sizes=(64, 64))
    found = unpacked(out, 64, 64).view(64, 16, 4)
    given = g.mT.float().view(64, 16, 4)
    assert not found[given == 0].any()
    for i in (0, 1, 2, 3, 4, 5):  # no more than two of them: as they are
        assert torch.equal(found[:, i], given[:, i])
    assert (found[:, 6, 0] == 9).all() and found[:, 6, 1].eq(1).all()
    assert found[:, 7, 0].eq(inf).all() and ((found[:, 7, 1:] == 0) | (found[:, 7, 1:] == 6)).all()
    assert found[:, 8].isinf().any(-1).all() and found[:, 9, 2].isnan().all()
    assert (found[:, 10].abs() > 2e38).sum(-1).eq(2).all()


ACTS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def feed_forward(z: Tensor, dh: Tensor, act: str, gated: bool) -> tuple[Tensor, Tensor]:
    """(h, dz) in float32."""
    z = z.float().requires_grad_()
    gate, up = z.chunk(2, -1) if gated else (z, torch.ones(()))
    h = ACTS[act](gate) * up
    h.backward(dh.float())
    assert z.grad is not None
    return h.detach(), z.grad


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("act", "gated"), [("silu", True), ("gelu_tanh", False), ("gelu_tanh", True)])
def test_activations(emulated, act: str, gated: bool) -> None:
    z, dh = torch.randn(128, 64 * (1 + gated)).bfloat16(), torch.randn(128, 64).bfloat16()
    h, dz = feed_forward(z, dh, act, gated)
    library = emulated("act24.cuh", ACT=cuda_patterns.ACTS[act], GATED=int(gated), EXACT=1, GIVEN=1)
    found, back, fused, out = torch.empty_like(dh), torch.empty_like(z), torch.empty_like(z), room(z)
    run(library, "act24", z, found, sizes=(128, 64))
    run(library, "act24_back", z, dh, back, sizes=(128, 64))
    uniforms = patterns.uniforms24(z.mT.contiguous())
    run(library, "mvue24", z, dh, fused, out, None, uniforms, sizes=(128, 64))
    assert error(found, h) < 4e-3 and error(back, dz) < 4e-3
    assert torch.equal(back, fused)
    assert_same(unpacked(out, z.shape[1], z.shape[0]), patterns.mvue24_exact(back.mT.contiguous(), uniforms).float())


@pytest.mark.parametrize("exact", [0, 1])
def test_philox_is_a_function_of_its_seed_and_unbiased(emulated, exact: int) -> None:
    g = torch.randn(64, 64).bfloat16()
    library = emulated("act24.cuh", ACT=0, GATED=0, EXACT=exact, GIVEN=0)

    def drawn(seed: int) -> Tensor:
        out = room(g)
        run(library, "mvue24", None, g, None, out, torch.tensor([seed]), None, sizes=(64, 64))
        return out

    one = drawn(7)
    assert torch.equal(one, drawn(7)) and not torch.equal(one, drawn(8))
    mean = torch.stack([unpacked(drawn(seed), 64, 64) for seed in range(200)]).mean(0)
    # The variance of an estimate is about half of the energy, so that of the mean of 200 a 400th.
    assert error(mean, g.mT.float()) < 0.08


def unpacked(out: Tensor, m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse of `layout`, float32."""
    values = out[: m * k].view(dtype).view(m, k // 2).float()
    byte = out[m * k :]
    nibbles = torch.stack([byte & 15, byte >> 4], -1).view(m // 64, k // 64, 2, 4, 8, 2, 2, 2, 2)
    nibbles = nibbles.permute(0, 3, 8, 4, 1, 2, 7, 5, 6).reshape(m, k // 4)
    where = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    return torch.zeros(m, k // 4, 4).scatter_(-1, where, values.view(m, k // 4, 2)).view(m, k)


def test_the_layout_comes_back() -> None:
    a = cuda_patterns.pruned_reference(torch.randn(128, 192).bfloat16())
    assert torch.equal(unpacked(layout(a), 128, 192), a.float())


def test_refusals() -> None:
    w = torch.randn(64, 64).bfloat16()
    assert cuda_patterns.refusal(w) == "an NVIDIA GPU"
    with pytest.raises(CsltError, match="transposable needs an NVIDIA GPU; fix: use patterns.py"):
        cuda_patterns.transposable(w)


def test_a_mask_read_from_nibbles() -> None:
    # rows (0,1) (0,1) (2,3) (2,3), and (0,3) (1,2) (0,3) (1,2)
    masks = torch.tensor([[0xEE44, 0x9C9C - 0x10000]]).to(torch.int16)
    found = cuda_patterns.mask_of(masks)
    rows = ("1100 1001", "1100 0110", "0011 1001", "0011 0110")
    assert found.int().tolist() == [[int(c) for c in row.replace(" ", "")] for row in rows]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_the_gpu_as_the_library_compresses(dtype: torch.dtype) -> None:
    w = torch.randn(192, 320, device="cuda").to(dtype)
    packed, dense = cuda_patterns.prune(w)
    assert torch.equal(dense, cuda_patterns.pruned_reference(w)) and torch.equal(packed, cslt.compress(dense))
    if cuda_patterns.refusal(w):
        return
    masks = cuda_patterns.transposable(w)
    masked = torch.where(cuda_patterns.mask_of(masks), w, 0)
    out, out_t = cuda_patterns.compressed_both(w, masks)
    assert torch.equal(cuda_patterns.mask_of(masks), patterns.transposable24(w))
    assert torch.equal(out, cslt.compress(masked)) and torch.equal(out_t, cslt.compress(masked.mT.contiguous()))
    uniforms = patterns.uniforms24(w.mT.contiguous())
    for exact in (False, True):
        found = unpacked(cuda_patterns.estimate_t(w, uniforms, exact=exact).cpu(), 320, 192, dtype)
        expected = ESTIMATORS[exact](w.mT.contiguous(), uniforms).cpu().float()
        same = ((found != 0) == (expected != 0)) & torch.isclose(found, expected, rtol=2**-7, atol=0)
        assert float((~same).float().mean()) < 1e-3


def test_activations_that_the_kernels_cannot_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    z, dh = torch.zeros(64, 128).bfloat16(), torch.zeros(64, 64).bfloat16()
    with pytest.raises(CsltError, match=r"cuda_patterns.activate needs an NVIDIA GPU.*; fix: use torch's own"):
        cuda_patterns.activate(z, "silu", True)
    monkeypatch.setattr(cuda_patterns.nvrtc, "refusal", lambda device: None)
    for wrong in (z[:, :120], z.float(), z.view(2, 32, 128)):
        with pytest.raises(
            CsltError, match=r"activate needs bfloat16 or float16 \[tokens, multiple of 16\], not .*; fix"
        ):
            cuda_patterns.activate(wrong, "silu", True)
        with pytest.raises(CsltError, match="activate_backward needs bfloat16"):
            cuda_patterns.activate_backward(wrong, dh, "silu", True, False)
    for other in (dh[:32], dh[:, :32], dh.half()):
        with pytest.raises(ValueError, match="fix: pass the z that dh is the gradient for"):
            cuda_patterns.activate_backward(z, other, "silu", True, False)
    with pytest.raises(CsltError, match="cuda_patterns.activate_backward needs an NVIDIA GPU; fix"):
        cuda_patterns.activate_backward(z, dh, "silu", True, True)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_on_the_gpu(act: cuda_patterns.Act, gated: bool) -> None:
    z, dh = torch.randn(128, 256 * (1 + gated)).bfloat16(), torch.randn(128, 256).bfloat16()
    h, dz = feed_forward(z, dh, act, gated)
    assert error(cuda_patterns.activate(z.cuda(), act, gated).cpu(), h) < 4e-3
    alone, none = cuda_patterns.activate_backward(z.cuda(), dh.cuda(), act, gated, False)
    assert none is None and error(alone.cpu(), dz) < 4e-3
    fused, estimate = cuda_patterns.activate_backward(z.cuda(), dh.cuda(), act, gated, True)
    assert torch.equal(alone, fused) and estimate is not None
    strided = z.mT.contiguous().mT.cuda()
    assert torch.equal(cuda_patterns.activate(strided, act, gated), cuda_patterns.activate(z.cuda(), act, gated))
    assert torch.equal(cuda_patterns.activate_backward(strided, dh.cuda(), act, gated, False)[0], alone)
    with pytest.raises(CsltError, match="multiples of 64"):
        cuda_patterns.activate_backward(z[:100].cuda(), dh[:100].cuda(), act, gated, True)
