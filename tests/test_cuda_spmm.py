"""The kernels of general sparse products: their layouts, an emulation of the tensor-core kernel, and the GPU itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.spmm import Csr, registry
from gossamer.spmm._windows import COUNT_BIT, DEPTH, MIXED_BIT, SLOT_BIT, Layout, Schedule, entries, lay_out, schedule
from gossamer.spmm.kernels.cuda_rows import cut_rows
from gossamer.spmm.kernels.cuda_windows import rounded_to_tf32

WAYS = [("cuda_windows", {"rows": r, "masked": m}) for r in (8, 16, 32, 64) for m in (True, False)] + [("cuda_rows", {})]


@st.composite
def matrices(draw: st.DrawFn, rows: int = 90, cols: int = 120) -> Tensor:
    m, k = draw(st.integers(0, rows)), draw(st.integers(0, cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    a = torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < keep)
    if m and draw(st.booleans()):
        a[draw(st.integers(0, m - 1))] = torch.randn(k, generator=generator)  # a long row
    return a


def multiply16(d: Tensor, a: Tensor, b: Tensor) -> None:
    """mma.m16n8k16 as the PTX manual lays its operands out: d [32, 4] += of a [32, 4, 2] and b [32, 2, 2]."""
    full_a, full_b = torch.zeros(16, 16, dtype=d.dtype), torch.zeros(16, 8, dtype=d.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register, (row, col) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            full_a[row, col : col + 2] = a[lane, register]
        for register in range(2):
            full_b[2 * t + 8 * register : 2 * t + 8 * register + 2, g] = b[lane, register]
    product = full_a @ full_b
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register, (row, col) in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
            d[lane, register] += product[row, col]


def tile_values(layout: Layout, item: int, lane: int) -> Tensor:
    """A lane's four values of a tile, as load_values in spmm_windows.cuh finds them."""
    out = torch.zeros(4, dtype=layout.values.dtype)
    if not layout.masks.numel():
        return layout.values[item * 128 + lane * 4 : item * 128 + lane * 4 + 4]
    words = [int(w) & 0xFFFFFFFF for w in layout.masks[4 * item : 4 * item + 4]]
    word, bit = lane // 8, lane % 8 * 4
    before = int(layout.starts[item]) + sum(w.bit_count() for w in words[:word])
    before += (words[word] & ((1 << bit) - 1)).bit_count()
    own = words[word] >> bit & 15
    for i in range(4):
        if own >> i & 1:
            out[i] = layout.values[before + (own & ((1 << i) - 1)).bit_count()]
    return out


def emulated(layout: Layout, plan: Schedule, warps: int, b: Tensor) -> Tensor:
    """spmm_windows.cuh with COLS = 2 and 16-bit operands, lane by lane; b [K, 16]."""
    m, tiles = layout.shape[0], layout.rows // 8
    c, partial = torch.full((m, 16), torch.nan, dtype=b.dtype), {}
    sums = [torch.zeros(tiles, 32, 4, dtype=b.dtype) for _ in plan.works]
    for own, (_, begin, end, _) in zip(sums, plan.works.tolist(), strict=True):
        for group in range(begin, end):
            rows = torch.zeros(32, 4, 2, dtype=b.dtype)
            for lane in range(32):
                g, t = divmod(lane, 4)
                for i in range(4):
                    col = int(layout.cols[group * DEPTH + 4 * t + i])
                    rows[lane, i] = b[col, 2 * g : 2 * g + 2] if col >= 0 else 0
            # __byte_perm: registers (column, depth pair) from rows (depth, column pair).
            a = torch.stack([rows[:, 0:2, 0], rows[:, 0:2, 1], rows[:, 2:4, 0], rows[:, 2:4, 1]], 1)
            for tile in range(tiles):
                item = group * tiles + tile
                values = torch.stack([tile_values(layout, item, lane) for lane in range(32)]).view(32, 2, 2)
                multiply16(own[tile], a, values)
    for index, (window, _, _, team) in enumerate(plan.works.tolist()):
        first, count = team & 15, team >> COUNT_BIT & 31
        if window < 0 or index % warps != first:
            continue
        base = index - index % warps
        total = torch.stack(sums[base + first : base + first + count]).sum(0)
        if count > 1:
            assert team >> MIXED_BIT & 1
        slot = (team >> SLOT_BIT) - 1
        block = torch.zeros(layout.rows, 16, dtype=b.dtype)
        for tile in range(tiles):
            for lane in range(32):
                g, t = divmod(lane, 4)
                for r in range(2):
                    block[tile * 8 + 2 * t + r, 2 * g : 2 * g + 2] = total[tile, lane, [r, 2 + r]]
        if slot >= 0:
            partial[slot] = block
        else:
            write(c, layout, window, block)
    for window, begin, end in plan.longs.tolist():
        write(c, layout, window, sum(partial.pop(s) for s in range(begin, end)))
    assert not partial
    return c


def write(c: Tensor, layout: Layout, window: int, block: Tensor) -> None:
    place = torch.arange(window * layout.rows, min((window + 1) * layout.rows, len(c)))
    rows = place if layout.order is None else layout.order.long()[place]
    assert c[rows].isnan().all(), "written twice"
    c[rows] = block[: len(place)]


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("limit", "warps"), [(1, 4), (2, 16), (8, 4)])
def test_emulated_lanes_multiply(masked: bool, limit: int, warps: int) -> None:
    a = torch.randn(43, 150, dtype=torch.float64) * (torch.rand(43, 150) < 0.2)
    a[16:24] = 0
    b, order = torch.randn(150, 16, dtype=torch.float64), torch.randperm(43)
    for rows, by in ((8, None), (16, order)):
        layout = lay_out(Csr.of(a), rows, masked, by)
        torch.testing.assert_close(emulated(layout, schedule(layout, limit, warps), warps, b), a @ b)


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
    bound = 2e-3 if b.dtype == torch.float16 else 8e-3 if b.dtype == torch.bfloat16 else 1e-3
    bound = 3e-6 if name == "cuda_rows" and b.dtype == torch.float32 else bound
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= bound or not expected.norm(), f"{name} {knobs} {tuple(a.shape)} n={b.shape[1]}: {error:.1e}"
    assert torch.equal(found, product(name, Csr.of(a), b, **knobs)), "two runs differ"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "knobs"), WAYS)
def test_against_float64(name: str, knobs: dict, dtype: torch.dtype) -> None:
    for m, k, density in ((1, 1, 1.0), (8, 16, 1.0), (77, 130, 0.1), (500, 700, 0.02), (40, 9000, 0.5), (300, 64, 0.9)):
        a = (torch.randn(m, k, device="cuda") * (torch.rand(m, k, device="cuda") < density)).to(dtype)
        for n in (1, 7, 8, 12, 32, 33, 96, 200, 520):
            checked(name, a, torch.randn(k, n, device="cuda").to(dtype), **knobs)


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
@pytest.mark.parametrize(("name", "knobs"), WAYS)
def test_inf_and_nan_stay_where_they_belong(name: str, knobs: dict) -> None:
    a = (torch.randn(100, 300, device="cuda") * (torch.rand(100, 300, device="cuda") < 0.1)).half()
    b = torch.randn(300, 40, device="cuda").half()
    b[5, 3], b[17, 0], b[60, 9] = torch.inf, torch.nan, -torch.inf
    a[4, 40], a[50, 41] = torch.nan, torch.inf
    found = product(name, Csr.of(a), b, **knobs).cpu()
    rows, cols = a.cpu().double().to_sparse().indices(), b.cpu().double()
    expected = torch.zeros(100, 40, dtype=torch.float64)
    expected.index_add_(0, rows[0], a.cpu().double()[rows[0], rows[1]][:, None] * cols[rows[1]])
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-3, equal_nan=True)


@pytest.mark.gpu
def test_strides_of_b() -> None:
    a = (torch.randn(100, 300, device="cuda") * (torch.rand(100, 300, device="cuda") < 0.1)).half()
    wide = torch.randn(300, 200, device="cuda").half()
    for b in (wide[:, 8:72], wide[:, 3:35], wide.t().contiguous().t()[:, :64], wide[:, ::2], wide[::1, :1]):
        for name, knobs in (("cuda_windows", {"rows": 8, "masked": True}), ("cuda_rows", {})):
            checked(name, a, b, **knobs)
