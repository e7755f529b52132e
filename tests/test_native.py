"""The compiled core against plain torch, on every instruction set of this CPU."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import native

ISAS = native.isas()
DTYPES = sorted(native.DTYPES, key=str)
SHAPES = [(1, 1), (3, 7), (17, 129), (64, 577), (0, 5), (5, 0), (0, 0)]
UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 3], ids="threads={}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits_of(x: Tensor) -> Tensor:
    """The raw bits, so that NaN equals itself and -0.0 differs from 0.0."""
    return x.contiguous().view(UNSIGNED[x.itemsize])


def nonzero(x: Tensor) -> Tensor:
    sign = torch.iinfo(UNSIGNED[x.itemsize]).max >> (x.itemsize == 1)
    return (bits_of(x) & sign if x.is_floating_point() else bits_of(x)) != 0


def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    kept = nonzero(x)
    padded = torch.zeros(rows, (cols + 7) // 8 * 8, dtype=torch.int64)
    padded[:, :cols] = kept
    weights = 1 << torch.arange(8)
    return bits_of(x)[kept], (padded.view(rows, (cols + 7) // 8, 8) * weights).sum(-1).to(torch.uint8)


def random_bits(shape: tuple[int, int], dtype: torch.dtype, density: float, seed: int = 0) -> Tensor:
    """Any bit pattern at all, NaN and Inf included."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (shape[0], shape[1] * dtype.itemsize), dtype=torch.uint8, generator=g)
    x = raw.view(dtype) if raw.numel() else torch.zeros(shape, dtype=dtype)
    bits = bits_of(x).clone()
    bits[torch.rand(shape, generator=g) >= density] = 0
    return bits.view(dtype)


def check(x: Tensor) -> None:
    values, mask = native.pack_bitmask(x)
    want_values, want_mask = oracle(x)
    assert values.dtype == x.dtype
    assert torch.equal(bits_of(values), want_values)
    assert torch.equal(mask, want_mask)
    assert torch.equal(native.popcount_rows(mask), nonzero(x).sum(1))
    back = native.unpack_bitmask(values, mask, x.shape)
    assert torch.equal(bits_of(back), torch.where(nonzero(x), bits_of(x), 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.5, 1])
def test_round_trip(isa: str, shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    check(random_bits(shape, dtype, density))


@given(st.integers(0, 40), st.integers(0, 300), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_shape(rows: int, cols: int, density: float, dtype: torch.dtype, seed: int) -> None:
    before = native.isa()
    try:
        for name in ISAS:
            native.set_isa(name)
            check(random_bits((rows, cols), dtype, density, seed))
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_threads(isa: str, threads: int, dtype: torch.dtype) -> None:
    check(random_bits((1021, 3001), dtype, 0.4))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_special_floats(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -0.0, 2.0, -0.0]).to(dtype)[None]
    values, mask = native.pack_bitmask(x)
    assert mask.tolist() == [[0b10111100, 0]]
    back = native.unpack_bitmask(values, mask, x.shape)
    assert torch.equal(back.float().isnan(), x.float().isnan())
    assert torch.equal(back.float().nan_to_num(), x.float().nan_to_num())
    assert not torch.signbit(back[0, 1].float()) and not torch.signbit(back[0, 8].float())


def test_strided(isa: str) -> None:
    x = random_bits((40, 300), torch.float16, 0.5)
    for view in (x[::3], x[:, 5:77], x[1::2, 100:], x.T, x[:, ::2], x[:1].expand(4, -1), x[:, :1]):
        check(view)


def test_widens_bfloat16(isa: str, threads: int) -> None:
    for shape in [*SHAPES, (700, 1501)]:
        x = random_bits(shape, torch.bfloat16, 0.5)
        wide = native.unpack_bitmask(*native.pack_bitmask(x), shape, torch.float32)
        assert wide.dtype == torch.float32
        assert torch.equal(bits_of(wide), torch.where(nonzero(x), bits_of(x).int() << 16, 0))


def test_converts() -> None:
    x = random_bits((9, 33), torch.int16, 0.5)
    assert torch.equal(native.unpack_bitmask(*native.pack_bitmask(x), x.shape, torch.float32), x.float())


def test_stays_inside_its_buffers(isa: str) -> None:
    """Every buffer ends where an unreadable page begins."""
    rows, cols = 3, 141
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        x = guarded(random_bits((rows, cols), dtype, 0.6))
        values, mask = native.pack_bitmask(x)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), native.popcount_rows(mask).cumsum(0)])
        mask, values, out = guarded(mask), guarded(values), guarded(torch.empty_like(x))
        assert torch.equal(bits_of(native.unpack_bitmask(values, mask, x.shape)), bits_of(x) * nonzero(x))
        core, wide = native.require(), x.itemsize
        at = (mask.data_ptr(), values.data_ptr(), offsets.data_ptr())
        core.bitmask_unpack(*at, rows, cols, wide, out.data_ptr(), cols * wide, 1)
        assert torch.equal(bits_of(out), bits_of(x) * nonzero(x))
        packed = guarded(torch.zeros_like(values))
        source = (x.data_ptr(), rows, cols, cols * wide, wide, x.is_floating_point())
        core.bitmask_pack(*source, mask.data_ptr(), offsets.data_ptr(), packed.data_ptr(), 1)
        assert torch.equal(bits_of(packed), bits_of(values))


def guarded(x: Tensor) -> Tensor:
    """A copy of x whose last byte is the last one before a page that may not be touched."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    area = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    copy = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape)
    return copy.copy_(x)


def test_damaged_input_is_refused() -> None:
    x = random_bits((6, 20), torch.float32, 0.5)
    values, mask = native.pack_bitmask(x)
    flipped, padding = mask.clone(), mask.clone()
    flipped[3, 1] ^= 1
    padding[2, 2] |= 0x80
    with pytest.raises(ValueError, match="damaged"):
        native.unpack_bitmask(values, flipped, x.shape)
    with pytest.raises(ValueError, match="past column 20"):
        native.unpack_bitmask(values, padding, x.shape)
    with pytest.raises(ValueError, match="damaged"):
        native.unpack_bitmask(values[:-1], mask, x.shape)
    for shape in [(6, 28), (5, 20), (-6, 20)]:
        with pytest.raises(ValueError):
            native.unpack_bitmask(values, mask, shape)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        native.pack_bitmask(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="matrix"):
        native.pack_bitmask(torch.zeros(2))
    with pytest.raises(ValueError, match="uint8"):
        native.popcount_rows(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="17 tokens"):
        native.dense_linear(torch.zeros(17, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="pass the 2 that"):
        native.dense_linear(torch.zeros(1, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="itemsize"):
        native.require().bitmask_count(0, 0, 0, 0, 3, False, 0, 1)


def sparse(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A dense bfloat16 matrix and its values, mask and offsets."""
    g = torch.Generator().manual_seed(0)
    a = (torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < 0.5)).bfloat16()
    values, mask = native.pack_bitmask(a)
    return a, values, mask, native.row_offsets(values, mask, a.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_products_stay_inside_their_buffers(isa: str, tokens: int, dtype: torch.dtype) -> None:
    """Weights, x, bias and offsets all end where an unreadable page begins."""
    for rows, cols in [(1, 1), (3, 141), (7, 64), (2, 4097)]:
        a = random_bits((rows, cols), torch.int8, 0.4).to(dtype)
        values, mask = native.pack_bitmask(a)
        offsets = native.row_offsets(values, mask, a.shape)
        x, bias = guarded(torch.ones(tokens, cols, dtype=dtype)), guarded(torch.ones(rows, dtype=dtype))
        want = (a.double().sum(1) + 1).expand(tokens, -1).to(dtype)
        packed = (guarded(values), guarded(mask), guarded(offsets)) if len(values) else (values, guarded(mask), offsets)
        torch.testing.assert_close(native.bitmask_linear(x, *packed, cols, bias), want)
        torch.testing.assert_close(native.dense_linear(x, guarded(a), bias), want)


def test_threads_are_those_of_torch() -> None:
    """The one OpenMP runtime of a process that has loaded torch and us is torch's, and it does our work."""
    script = """
import os, re, torch
from gossamer import native
assert native.require().threads_of() == "openmp"
names = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = [n for n in names if re.match(r"lib[gi]?omp", os.path.basename(n))]
assert len(runtimes) == 1 and os.path.dirname(torch.__file__) in runtimes[0], runtimes
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_calls_from_several_python_threads(threads: int) -> None:
    a, values, mask, offsets = sparse(1500, 1100)
    x = [torch.randn(1, 1100, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    alone = [native.bitmask_linear(one, values, mask, offsets, 1100) for one in x]
    with ThreadPoolExecutor(8) as pool:
        for together in (
            list(pool.map(lambda one: native.bitmask_linear(one, values, mask, offsets, 1100), x)) for _ in range(20)
        ):
            assert all(torch.equal(y, z) for y, z in zip(together, alone, strict=True))
        packs = list(pool.map(lambda _: native.pack_bitmask(a), range(8)))
    assert all(torch.equal(v, values) and torch.equal(m, mask) for v, m in packs)


FORK = """
import os, sys, torch
from gossamer import native
a = torch.where(torch.rand(3000, 2000) < 0.5, torch.randn(3000, 2000), 0).bfloat16()
torch.set_num_threads(2)
values, mask = native.pack_bitmask(a)
offsets = native.row_offsets(values, mask, a.shape)
x = torch.randn(1, 2000)
y = native.bitmask_linear(x, values, mask, offsets, 2000)
assert native.require().threads_of() == "openmp"
child = os.fork()
if child == 0:  # numpy compares: torch's own parallel operations do hang here
    same = torch.equal(native.bitmask_linear(x, values, mask, offsets, 2000), y)
    back = native.unpack_bitmask(*native.pack_bitmask(a), a.shape)
    same &= bool((back.view(torch.int16).numpy() == a.view(torch.int16).numpy()).all())
    os._exit(0 if same and native.require().threads_of() == "threads" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(native.bitmask_linear(x, values, mask, offsets, 2000), y)
"""


def test_after_fork() -> None:
    """The child has none of the parent's OpenMP threads; it must not wait for them."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_inside_a_parallel_region_the_caller_works_alone() -> None:
    """Called from a thread of somebody's OpenMP team, as a callback of a parallel loop would be."""
    _, values, mask, offsets = sparse(1500, 1100)
    x = torch.randn(1, 1100)
    want, found = native.bitmask_linear(x, values, mask, offsets, 1100), {}
    openmp = ctypes.CDLL(None)
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: found.__setitem__(openmp.omp_get_thread_num(), native.bitmask_linear(x, values, mask, offsets, 1100))
    )
    openmp.GOMP_parallel(body, None, 2, 0)
    assert set(found) == {0, 1} and all(torch.equal(y, want) for y in found.values())


def test_sums_words(isa: str, threads: int) -> None:
    for lines in (1, 3, 20000):
        buffer = torch.randint(0, 256, (64 * lines,), dtype=torch.uint8)
        assert native.sum_words(buffer) == int(buffer.view(torch.int64).sum()) % 2**64


def test_huge_pages_move_nothing() -> None:
    x = torch.arange(5 << 18, dtype=torch.int32)
    address = x.data_ptr()
    native.move_to_huge_pages(x)
    native.move_to_huge_pages(x[:0])
    assert x.data_ptr() == address and torch.equal(x, torch.arange(5 << 18, dtype=torch.int32))


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match="scalar"):
        native.set_isa("sse9")


@pytest.mark.parametrize("name", [*ISAS, "sse9"])
def test_environment_override(name: str) -> None:
    code = "from gossamer import _native; print(_native.isas()); print(_native.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "GOSSAMER_ISA": name}, capture_output=True, text=True
    )
    if name in ISAS:
        assert done.stdout.split()[-1] == name
    else:
        assert done.returncode != 0
        assert "GOSSAMER_ISA=sse9" in done.stderr and ", ".join(ISAS) in done.stderr


def test_missing_core_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_built", None)
    assert not native.available()
    with pytest.raises(ImportError, match="pip install"):
        native.pack_bitmask(torch.zeros(1, 1))


def test_stub_names_what_the_core_has() -> None:
    stub = (os.path.dirname(native.__file__), "_native.pyi")
    with open(os.path.join(*stub)) as file:
        declared = {line.split("(")[0].removeprefix("def ") for line in file if line.startswith("def ")}
    assert declared == {name for name in dir(native.require()) if not name.startswith("_")}
