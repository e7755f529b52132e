"""The kernels of general sparse products: their layouts, the device sources run on the CPU, and on a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import nvrtc
from gossamer.cusparse import CusparseError
from gossamer.spmm import Csr, registry, sampled
from gossamer.spmm._windows import DEPTH, TILE, Layout, lay_out, schedule
from gossamer.spmm.kernels import cusparse
from gossamer.spmm.kernels.cuda_rows import KNOBS, LANES, THREADS, Cut, by_lanes, cut_rows, launched, named
from gossamer.spmm.kernels.cuda_windows import rounded_to_tf32

HERE = Path(__file__).parent
WAYS = [("cuda_windows", {"rows": r, "masked": m}) for r in (8, 16, 32) for m in (True, False)] + [
    ("cuda_rows", {"unroll": 4, "team": 32}),
    ("cuda_rows", {"unroll": 8, "team": 4}),
    ("cuda_rows", {"unroll": 8, "team": 32, "double": True}),
    ("cuda_rows", {"unroll": 16, "team": 8}),
]
LIBRARY = [("cusparse", {"alg": 2}), ("cusparse", {"alg": 3})]


@st.composite
def matrices(draw: st.DrawFn, rows: int = 90, cols: int = 120) -> Tensor:
    m, k = draw(st.integers(0, rows)), draw(st.integers(0, cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    a = torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < keep)
    if m and draw(st.booleans()):
        a[draw(st.integers(0, m - 1))] = torch.randn(k, generator=generator)  # a long row
    return a


@cache
def compiled(file: str, entry: str, macros: tuple[tuple[str, str], ...], args: str) -> Callable[..., None]:
    """A device source as a function of the CPU: tests/cuda_on_cpu.h in the place of CUDA, C++ in that of PTX."""
    text = nvrtc.read(file)
    ptx = re.search(r'#line 1 "spmm_ptx.cuh"\n.*?(?=#line \d+ "spmm_mma.cuh")', text, re.DOTALL)
    assert ptx
    types = "".join(re.findall(r'#line 1 "types.cuh"\n.*?(?=#line \d+ ")', ptx[0], re.DOTALL))
    text = text.replace(ptx[0], types + (HERE / "spmm_ptx_on_cpu.h").read_text())
    parameters = re.search(rf"\b{entry}\(([^)]*)\) {{", text)
    assert parameters
    names = ", ".join(p.split()[-1].lstrip("*") for p in parameters[1].split(","))
    text = f'#include "{HERE / "cuda_on_cpu.h"}"\n{text}\nextern "C" void launch(const int* grid, int threads, '
    text += f"{parameters[1]}) {{ run_grid(grid, threads, [=] {{ {entry}({names}); }}); }}\n"
    folder = Path(tempfile.mkdtemp())
    (folder / "a.cpp").write_text(text)
    defines = [f"-D{name}={value}" for name, value in macros]
    # Without the first flag, __shared__ arrays of one name would be one for all libraries.
    flags = ["-fno-gnu-unique", "-std=c++20", "-O0", "-fPIC", "-shared", "-w", "-ffp-contract=off"]
    subprocess.run(["g++", *flags, *defines, "-o", folder / "a.so", folder / "a.cpp"], check=True)
    found = ctypes.CDLL(folder / "a.so").launch
    kinds = {"P": ctypes.c_void_p, "i": ctypes.c_int32, "q": ctypes.c_int64}
    found.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int, *(kinds[a] for a in args)]
    return found


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run the device sources on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def launch(self: nvrtc.Function, grid: tuple, block: tuple, *args: Tensor | float, shared: int = 0) -> None:
        run = compiled(self.file, self.entry, self.macros, self.args)
        plain = [(x.data_ptr() or None) if isinstance(x, Tensor) else x for x in args]
        run((ctypes.c_int * 3)(*grid), block[0], *plain)

    monkeypatch.setattr(nvrtc.Function, "launch", launch)


def entries(layout: Layout) -> Csr:
    """The inverse of `lay_out`."""
    tiles = layout.rows // TILE
    if layout.masks.numel():
        bits = layout.masks.unsqueeze(1) >> torch.arange(32, device=layout.masks.device) & 1
        at, values = bits.flatten().nonzero().flatten(), layout.values
    else:
        at = layout.values.nonzero().flatten()
        values = layout.values[at]
    tile, row, depth = at // (TILE * DEPTH), at // DEPTH % TILE, at % DEPTH
    window = torch.searchsorted(layout.first, tile // tiles, right=True) - 1
    place = window * layout.rows + tile % tiles * TILE + row
    rows = place if layout.order is None else layout.order.long()[place]
    cols = layout.cols[tile // tiles * DEPTH + depth].long()
    return Csr.of(torch.sparse_coo_tensor(torch.stack([rows, cols]), values, layout.shape, check_invariants=True))


@pytest.mark.parametrize("rows", [8, 16, 32])
@pytest.mark.parametrize("masked", [True, False])
@settings(max_examples=15, deadline=None)
@given(a=matrices(), shuffle=st.booleans())
def test_windows_hold_the_matrix(rows: int, masked: bool, a: Tensor, shuffle: bool) -> None:
    order = torch.randperm(len(a)) if shuffle else None
    found = entries(lay_out(Csr.of(a), rows, masked, order))
    expected = Csr.of(a)
    assert found.shape == expected.shape and torch.equal(found.pointers, expected.pointers)
    assert torch.equal(found.cols, expected.cols) and torch.equal(found.values, expected.values)


@settings(max_examples=25, deadline=None)
@given(a=matrices(), limit=st.integers(1, 4), warps=st.sampled_from([4, 16]), rows=st.sampled_from([8, 16]))
def test_a_schedule_does_every_group_once(a: Tensor, limit: int, warps: int, rows: int) -> None:
    layout = lay_out(Csr.of(a), rows, True)
    plan = schedule(layout, limit, warps)
    works = plan.works[plan.works[:, 0] >= 0].tolist()
    assert len(plan.works) % warps == 0 and {w for w, *_ in works} == set(range(-(-len(a) // rows)))
    assert sorted(g for _, b, e, _ in works for g in range(b, e)) == list(range(int(layout.first[-1])))
    for window, begin, end, _ in works:
        assert layout.first[window] <= begin <= end <= layout.first[window + 1] and end - begin <= limit


@settings(max_examples=40, deadline=None)
@given(a=matrices(), limit=st.integers(1, 50))
def test_cut_rows_cover_every_entry(a: Tensor, limit: int) -> None:
    found = Csr.of(a)
    segments, longs, slots = cut_rows(found.pointers, limit)
    rows = torch.full((found.nnz,), -1)
    for row, begin, end, _ in segments.tolist():
        assert end - begin <= limit and (rows[begin:end] == -1).all()
        rows[begin:end] = row
    assert torch.equal(rows, found.rows)
    owners = {slot: row for row, _, _, slot in segments.tolist() if slot >= 0}
    assert owners == {s: row for row, b, e in longs.tolist() for s in range(b, e)} and len(owners) == slots
    whole = sorted(row for row, _, _, slot in segments.tolist() if slot < 0)
    assert sorted([*whole, *longs[:, 0].tolist()]) == list(range(len(a)))


@settings(max_examples=30, deadline=None)
@given(
    a=matrices(cols=400),
    n=st.sampled_from([8, 32, 128, 512]),
    knobs=st.sampled_from(KNOBS),
    nnz=st.sampled_from([1, 10**7]),
)
def test_segments_lie_by_their_lanes(a: Tensor, n: int, knobs: tuple[int, int, bool, int], nnz: int) -> None:
    cut = Cut.of(n, 4, nnz, dict(named(*knobs[:3])), None)
    found = Csr.of(a)
    before, _, _ = cut_rows(found.pointers, cut.limit)
    after, counts = by_lanes(before, cut)
    lanes = [cut.lanes(end - begin) for _, begin, end, _ in after.tolist()]
    assert lanes == sorted(lanes, reverse=True) and counts == [lanes.count(x) for x in LANES]
    assert sorted(after.tolist()) == sorted(before.tolist()) and all(x >= cut.team for x in lanes)
    for team in LANES[1:]:
        merged, blocks = launched(tuple(counts), team)
        wanted = [max(team, x) for x in lanes]
        assert list(merged) == [wanted.count(x) for x in LANES]
        assert blocks == sum(-(-wanted.count(x) * x // THREADS) for x in LANES)


def test_rounding_to_tf32() -> None:
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-10, -3.3, 0.0, torch.inf, -torch.inf, torch.nan, 3.4028e38])
    found = rounded_to_tf32(x)
    assert ((found[:5] - x[:5]).abs() <= x[:5].abs() * 2**-11).all()
    assert torch.equal(found[5:].nan_to_num(7), x[5:].nan_to_num(7))
    assert not (found[:5].view(torch.int32) & 0x1FFF).any()


def product(name: str, a: Csr, b: Tensor, **knobs: object) -> Tensor:
    packed = registry[name].pack(a, b.shape[1], **knobs)
    return registry[name].run(b, packed.tensors, packed.meta)


def checked(name: str, a: Tensor, b: Tensor, **knobs: object) -> None:
    expected = a.double() @ b.double()
    found = product(name, Csr.of(a), b, **knobs)
    assert found.dtype == b.dtype and found.shape == expected.shape
    bound = 1e-3 if b.dtype == torch.float32 else 2e-3
    bound = 4e-3 if b.dtype == torch.bfloat16 and expected.numel() < 1024 else bound  # rounding one: 3.9e-3 at most
    bound = 3e-6 if name == "cuda_rows" and b.dtype == torch.float32 else bound
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= bound or not expected.norm(), f"{name} {knobs} {tuple(a.shape)} n={b.shape[1]}: {error:.1e}"
    if knobs.get("alg") is None or cusparse.repeats(Csr.of(a), int(str(knobs["alg"]))):
        assert torch.equal(found, product(name, Csr.of(a), b, **knobs)), "two runs differ"


def hubs(m: int, k: int, density: float) -> Tensor:
    """Some rows empty, one full."""
    a = torch.randn(m, k) * (torch.rand(m, k) < density)
    a[m // 4 : m // 2], a[m // 2] = 0, torch.randn(k)
    return a


CPU_CASES = [
    (torch.float16, 8, {"rows": 8, "masked": True, "warps": 4, "limit": 1}),
    (torch.float16, 24, {"rows": 16, "masked": False, "warps": 16, "limit": 1}),
    (torch.bfloat16, 64, {"rows": 8, "masked": False, "warps": 4, "limit": 2}),
    (torch.float32, 40, {"rows": 32, "masked": False, "warps": 4, "limit": 1}),
    (torch.float16, 130, {"rows": 16, "masked": True, "warps": 4, "limit": 3}),
]


@pytest.mark.parametrize(("dtype", "n", "knobs"), CPU_CASES)
def test_windows_source_on_the_cpu(on_cpu: None, dtype: torch.dtype, n: int, knobs: dict) -> None:
    a = hubs(43, 150, 0.05).to(dtype)
    checked("cuda_windows", a, torch.randn(150, n).to(dtype), **knobs)
    checked("cuda_windows", a, torch.randn(150, n).to(dtype), **knobs, order=torch.randperm(43))


@pytest.mark.parametrize(
    ("dtype", "n", "knobs"),
    [
        (torch.float16, 8, {}),
        (torch.float32, 8, {"unroll": 8, "team": 32}),
        (torch.bfloat16, 70, {"unroll": 8, "team": 8}),
        (torch.float32, 36, {"unroll": 16, "team": 8}),
        (torch.float32, 40, {"unroll": 8, "team": 4}),
        (torch.float32, 264, {}),
        (torch.float32, 136, {"unroll": 8, "double": True}),
        (torch.float32, 300, {"unroll": 8, "double": True}),
        (torch.float16, 32, {"unroll": 8, "double": True}),
    ],
)
def test_rows_source_on_the_cpu(on_cpu: None, dtype: torch.dtype, n: int, knobs: dict) -> None:
    k = 2500 if n <= 8 else 400
    a = hubs(30, k, 0.01).to(dtype)
    packed = registry["cuda_rows"].pack(Csr.of(a), n, **knobs)
    assert packed.meta["slots"] or packed.meta["counts"][0]
    checked("cuda_rows", a, torch.randn(k, n).to(dtype), **knobs)


def test_rows_packed_for_another_width(on_cpu: None) -> None:
    a, b = Csr.of(hubs(30, 400, 0.01)), torch.randn(400, 68)
    packed = registry["cuda_rows"].pack(a, 4)
    assert sum(packed.meta["counts"][3:]), "nothing for narrow teams"
    found = registry["cuda_rows"].run(b, packed.tensors, packed.meta)
    torch.testing.assert_close(found, a.torch().to_dense() @ b, rtol=1e-4, atol=1e-4)


def test_narrow_teams_are_for_long_rows() -> None:
    for mean, ways in ((23, 3), (24, 4), (63, 4), (64, 5)):
        found = registry["cuda_rows"].ways(Csr.of(torch.ones(3, mean)), False)
        assert [w.knobs for w in found] == [named(*knobs) for *knobs, _ in KNOBS[:ways]]


@pytest.mark.parametrize(("name", "knobs"), WAYS[:1] + WAYS[-1:])
def test_inf_and_nan_on_the_cpu(on_cpu: None, name: str, knobs: dict) -> None:
    inf_and_nan("cpu", name, knobs)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float16, 8), (torch.float32, 100)])
def test_sddmm_source_on_the_cpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n: int) -> None:
    a, x, y = Csr.of(hubs(30, 50, 0.1)), torch.randn(30, n).to(dtype), torch.randn(50, n).to(dtype)
    plain = sampled.sddmm(a, x, y)
    torch.testing.assert_close(plain, (x.float() @ y.float().t())[a.rows, a.cols.long()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampled._cuda(a, x, y), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "knobs"), WAYS + LIBRARY)
def test_against_float64(name: str, knobs: dict, dtype: torch.dtype) -> None:
    if knobs.get("alg") == 2 and dtype != torch.float32:
        pytest.skip("adds up what is rounded already, and is no candidate")
    for m, k, density in ((1, 1, 1.0), (8, 16, 1.0), (77, 130, 0.1), (500, 700, 0.02), (40, 9000, 0.5), (300, 64, 0.9)):
        a = (torch.randn(m, k, device="cuda") * (torch.rand(m, k, device="cuda") < density)).to(dtype)
        for n in (1, 7, 8, 12, 32, 33, 96, 200, 520):
            checked(name, a, torch.randn(k, n, device="cuda").to(dtype), **knobs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "knobs"), WAYS[:1] + WAYS[-2:])
def test_the_widest(name: str, knobs: dict, dtype: torch.dtype) -> None:
    a = hubs(200, 300, 0.1).to("cuda", dtype)
    for n in (1000, 4096, 5003):
        checked(name, a, torch.randn(300, n, device="cuda").to(dtype), **knobs)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "knobs"), WAYS)
def test_rows_in_another_order_and_a_hub(name: str, knobs: dict) -> None:
    a = (torch.randn(3000, 20000, device="cuda") * (torch.rand(3000, 20000, device="cuda") < 0.002)).half()
    a[100:900] = 0
    a[77] = torch.randn(20000, device="cuda")
    order = {"order": torch.randperm(3000, device="cuda")} if name == "cuda_windows" else {}
    for n in (8, 128, 136):
        checked(name, a, torch.randn(20000, n, device="cuda").half(), **knobs, **order)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "knobs"), WAYS + LIBRARY)
def test_inf_and_nan_on_the_gpu(name: str, knobs: dict) -> None:
    inf_and_nan("cuda", name, knobs)


def inf_and_nan(device: str, name: str, knobs: dict) -> None:
    """They reach the rows that have an entry there, and no others."""
    a = torch.randn(60, 100) * (torch.rand(60, 100) < 0.1)
    b = torch.randn(100, 16)
    b[5, 3], b[17, 0], b[60, 9] = torch.inf, torch.nan, -torch.inf
    a[4, 40], a[50, 41] = torch.nan, torch.inf
    a, b = a.half(), b.half()
    found = product(name, Csr.of(a.to(device)), b.to(device), **knobs).cpu()
    rows, cols = a.nonzero(as_tuple=True)
    expected = torch.zeros(60, 16, dtype=torch.float64)
    expected.index_add_(0, rows, a.double()[rows, cols][:, None] * b.double()[cols])
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-3, equal_nan=True)


@pytest.mark.gpu
def test_strides_of_b() -> None:
    a = (torch.randn(100, 300, device="cuda") * (torch.rand(100, 300, device="cuda") < 0.1)).half()
    wide = torch.randn(300, 200, device="cuda").half()
    for b in (wide[:, 8:72], wide[:, 3:35], wide.t().contiguous().t()[:, :64], wide[:, ::2], wide[::1, :1]):
        for name, knobs in (("cuda_windows", {"rows": 8, "masked": True}), ("cuda_rows", {}), ("cusparse", {"alg": 3})):
            checked(name, a, b, **knobs)


@pytest.mark.parametrize("shape", [(64, 96), (70, 64), (1, 32)])
def test_blocked_ell_holds_the_matrix(shape: tuple[int, int]) -> None:
    a = hubs(*shape, 0.1) if shape[0] > 1 else torch.randn(shape)
    table, values = cusparse.blocks_of(Csr.of(a), 32)
    found = torch.zeros(len(table) * 32, shape[1])
    for i, j in (table >= 0).nonzero().tolist():
        at = int(table[i, j]) * 32
        found[i * 32 : i * 32 + 32, at : at + 32] += values[i, :, j]
    assert torch.equal(found[: shape[0]], a) and not found[shape[0] :].any()
    assert table.shape[1] == cusparse.blocks_across(Csr.of(a)) and not values[:, :, 0][table[:, 0] < 0].any()


@pytest.mark.gpu
def test_blocked_ell_on_the_gpu() -> None:
    for m in (96, 80):
        a = torch.randn(m, 256, device="cuda").half() * (torch.rand(m, 256, device="cuda") < 0.7)
        assert cusparse.suits_blocks(Csr.of(a))
        for n in (1, 8, 40, 128):
            checked("cusparse", a, torch.randn(256, n, device="cuda").half(), ell=32)


@pytest.mark.gpu
def test_cusparse_in_a_cuda_graph() -> None:
    a, b = hubs(200, 300, 0.1).cuda(), torch.randn(300, 24, device="cuda")
    packed, own = registry["cusparse"].pack(Csr.of(a), 24, alg=3), registry["cusparse"]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CusparseError, match="fix: make one such product before"), torch.cuda.graph(graph):
        own.run(b, packed.tensors, packed.meta)
    expected, graph = own.run(b, packed.tensors, packed.meta), torch.cuda.CUDAGraph()
    torch.testing.assert_close(expected, a @ b, rtol=1e-4, atol=1e-4)
    with torch.cuda.graph(graph):
        found = own.run(b, packed.tensors, packed.meta)
    b.normal_()
    graph.replay()
    torch.testing.assert_close(found, a @ b, rtol=1e-4, atol=1e-4)
