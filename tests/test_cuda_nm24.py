"""The 2:4 decode layout packed, and multiplied as mma.sp does, on the CPU; sources compiled; products on a GPU."""

import math

import pytest
import torch
from torch import Tensor

from gossamer import lock, nvrtc, patterns
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.kernels import Case, KernelError, _nm24_cut, cuda_nm24
from gossamer.kernels._cuda_operands import rows_of
from gossamer.kernels._nm24_cut import Cut, Gpu, Work
from gossamer.kernels._nm24_pack import DEPTH, STAGE, STEPS, pack_matrix, unpack_matrix
from gossamer.kernels.cuda_nm24 import CudaNm24
from gossamer.kernels.cuda_nm24_vendor import CudaNm24Vendor
from gossamer.nn import SparseLinear
from gossamer.packs import Packs
from gossamer.prepare import _shapes

H100 = Gpu(132, 232448, True)
SMALL = Gpu(84, 101376, False)
SHAPES = [(1, 4), (7, 24), (16, 256), (33, 257), (64, 1000), (100, 514)]
DTYPES = cuda_nm24.DTYPES


def sparse(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    a = torch.randn(m, k)
    return torch.where(patterns.nm(torch.rand(m, k)), a, 0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_packed_comes_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = NM.encode(sparse(*shape, dtype))
    packed = pack_matrix(a, dtype)
    found = unpack_matrix(packed, a.shape, dtype)
    assert torch.equal(found.weight, a.weight) and torch.equal(found.index, a.index)
    blocks, deep = -(-shape[0] // 32), -(-shape[1] // DEPTH)
    assert packed.numel() == blocks * deep * 2 * STAGE


def test_nine_sixteenths_of_dense() -> None:
    a = sparse(64, 1024)
    assert pack_matrix(NM.encode(a), a.dtype).numel() == a.numel() * 2 * 9 // 16


def test_special_values_and_empty_groups() -> None:
    a = sparse(32, 256)
    a[0, :4] = torch.tensor([math.nan, 0, math.inf, 0])
    a[1, :8] = 0
    a[2, :4] = torch.tensor([0, 0, 0, -3.0])
    packed = CudaNm24.pack(NM.encode(a), a.dtype)
    back = CudaNm24.unpack(packed.tensors, packed.meta)
    assert torch.equal(back.view(torch.int16), a.view(torch.int16))


def multiplied(packed: Tensor, rows: int, cols: int, x: Tensor) -> Tensor:
    """x [N, K] times the packed matrix as the kernel does: the fragments of mma.sp.m16n8k32, lane by lane."""
    deep = cols // DEPTH
    y = torch.zeros(x.shape[0], rows, dtype=torch.float64)
    stages = packed.view(-1, deep, 2, STAGE)
    for block in range(stages.shape[0]):
        for stage in range(deep):
            for half in range(2):
                part = stages[block, stage, half]
                meta = part[:512].view(torch.int32).view(32, 4)
                values = part[512:].view(torch.bfloat16).view(STEPS, 32, 4, 2)  # step, lane, register, low and high
                for step in range(STEPS):
                    for lane in range(32):
                        g, t = divmod(lane, 4)
                        for register in range(4):
                            row, group = g + 8 * (register % 2), t + 4 * (register // 2)
                            # Lanes 2 s and 2 s + 1 of a quad hold the metadata of selector s: columns 0 and 16 on.
                            holder = 4 * g + 2 * (step % 2) + group // 4
                            word = int(meta[holder, step // 2]) & 0xFFFFFFFF
                            code = word >> 16 * (register % 2) + 4 * (group % 4) & 15
                            for i, where in enumerate((code & 3, code >> 2)):
                                col = stage * DEPTH + step * 32 + 4 * group + where
                                y[:, block * 32 + half * 16 + row] += (
                                    values[step, lane, register, i].double() * x[:, col].double()
                                )
    return y


def test_the_fragments_are_those_of_the_sparse_tensor_cores() -> None:
    a, x = sparse(32, 256), torch.randn(3, 256)
    y = multiplied(pack_matrix(NM.encode(a), a.dtype), 32, 256, x)
    assert torch.allclose(y, x.double() @ a.double().mT)


def test_rows_cut_from_a_packed_matrix() -> None:
    a = sparse(80, 300)
    packed = CudaNm24.pack(NM.encode(a), a.dtype)
    for begin, end in ((0, 32), (32, 80), (0, 80)):
        part = CudaNm24.rows(packed, begin, end)
        assert part is not None
        assert torch.equal(CudaNm24.unpack(part.tensors, part.meta), a[begin:end])
    assert CudaNm24.rows(packed, 16, 48) is None and CudaNm24.rows(packed, 0, 40) is None


def test_packed_tensors_replace_the_stored_ones() -> None:
    stored = NM.encode(sparse(40, 260))
    assert Packs(stored, torch.bfloat16).source(CudaNm24) is CudaNm24


@pytest.mark.parametrize("device", [H100, SMALL], ids=["H100", "small"])
@pytest.mark.parametrize("shape", [(1, 8), (4096, 4096), (300, 70000), (128256, 4096)], ids=str)
def test_every_cut_fits(shape: tuple[int, int], device: Gpu) -> None:
    for tiles in _nm24_cut.TILES:
        work = Work(shape[0], -(-shape[1] // DEPTH), tiles)
        best = _nm24_cut.best_cut(work, device)
        assert device.clusters or best.cluster == 1
        assert work.shared(best) <= device.shared
        assert best.split <= best.x_ring <= _nm24_cut.MAX_X_RING and best.cluster <= work.deep
        assert best.warps <= _nm24_cut.WARPS[best.pair][tiles]
        assert work.panels(best) * best.pair * best.high * 16 >= shape[0]
        assert 16 * best.x_ring <= _nm24_cut.BARRIERS


def test_the_variants_have_every_macro_and_both_of_each() -> None:
    found = [dict(f.macros) for f in cuda_nm24.VARIANTS]
    assert {(m["PAIR"], m["TILES"]) for m in found} == {(p, t) for p in "12" for t in "1248"}
    assert {m["BF16"] for m in found} == {"0", "1"} and {m["CLUSTER"] for m in found} == {"1", "2", "4"}


def test_every_arch_compiles() -> None:
    pytest.importorskip("cuda.core")
    try:
        assert nvrtc.compile_all(cuda_nm24.VARIANTS[::3], ("sm_80", "sm_90a")) == 6
    except ImportError as error:
        pytest.skip(str(error))


def test_refusals() -> None:
    a = NM.encode(sparse(16, 32))
    assert "NVIDIA GPU" in (CudaNm24.refuses(Case(a.spec(), torch.device("cpu"), torch.bfloat16, 1)) or "")
    packed = CudaNm24.pack(a, torch.bfloat16)
    with pytest.raises(KernelError, match="x lies on meta, the weight on cpu; fix"):
        CudaNm24.run(torch.zeros(2, 32, dtype=torch.bfloat16, device="meta"), packed.tensors, packed.meta, None)
    with pytest.raises(KernelError, match="x has 31 features, the weight takes 32"):
        CudaNm24.run(torch.zeros(2, 31, dtype=torch.bfloat16), packed.tensors, packed.meta, None)
    with pytest.raises(KernelError, match=r"packed for torch.bfloat16, not torch.float16; fix"):
        CudaNm24.run(torch.zeros(2, 32, dtype=torch.float16), packed.tensors, packed.meta, None)
    with pytest.raises(KernelError, match="not torch.float32; fix"):
        CudaNm24.pack(a, torch.float32)
    with pytest.raises(KernelError, match="2 of 4"):
        CudaNm24.pack(NM.encode(torch.eye(16, 32).bfloat16(), 2, 8), torch.bfloat16)
    with pytest.raises(KernelError, match="2 of 4"):
        CudaNm24.pack(Bitmask.encode(sparse(16, 32)), torch.bfloat16)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (4, 8)])
def test_other_patterns_are_refused(n: int, m: int) -> None:
    spec = NM.encode(torch.where(patterns.nm(torch.rand(16, 32), n, m), 1.0, 0.0), n, m).spec()
    reason = cuda_nm24.unfit(Case(spec, torch.device("cuda"), torch.bfloat16, 1))
    assert reason == f"a weight that is 2:4, not {n}:{m}"


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_bound_product_launches_as_run_does(monkeypatch: pytest.MonkeyPatch, at, with_bias: bool) -> None:
    """Shapes that come back take the short way: the same launches, tensors of the same values and shapes."""
    seen: list[tuple] = []

    def start(self: nvrtc.Function, index: int, grid: tuple, block: tuple, shared: int, values: tuple) -> None:
        stages, x, added, y, rows, cols, tokens, *sizes = values
        given, held = at(x, tokens, cols), at(added, 1, rows).tolist() if with_bias else []
        at(y, tokens, rows).copy_(given[:, :rows])
        seen.append((repr(self), index, grid, block, stages, given.tolist(), held, sizes, shared))

    monkeypatch.setattr(nvrtc.Function, "start", start)
    monkeypatch.setattr(cuda_nm24, "gpu", lambda index: H100)
    packed = CudaNm24.pack(NM.encode(sparse(100, 264)), torch.bfloat16)
    bias = torch.randn(100) if with_bias else None
    call = CudaNm24.bind(packed.tensors, packed.meta, bias)
    ones = torch.ones(8 * 264 + 1).bfloat16()
    for x in (
        *(torch.randn(*shape, 264).bfloat16() for shape in ((1,), (1, 1), (3,), (2, 4), (64,), (65,), (200,), (0,))),
        torch.randn(264, 8).bfloat16().mT,
        ones[1:].view(8, 264),
    ):
        for _ in range(3):
            begin = len(seen)
            expected = CudaNm24.run(x, packed.tensors, packed.meta, bias)
            wanted = seen[begin:]
            y = call(x)
            assert y.shape == (*x.shape[:-1], 100) and torch.equal(y, expected)
            assert seen[begin + len(wanted) :] == wanted
    with pytest.raises(KernelError, match="x has 256 features"):
        call(torch.zeros(3, 256).bfloat16())


def test_two_patterns_of_one_shape_are_raced_apart() -> None:
    """What is measured for 2:4 says nothing of 4:8, which takes as many bytes."""
    found = [NM.encode(torch.where(patterns.nm(torch.rand(16, 32), n, m), 1.0, 0.0), n, m) for n, m in ((2, 4), (4, 8))]
    keys = [lock.key(a.spec(), torch.device("cpu"), torch.float32) for a in found]
    assert "2:4" in keys[0] and "4:8" in keys[1] and keys[0].replace("2:4", "4:8") == keys[1]
    layers = [SparseLinear.from_format(a) for a in found]
    assert [len(group) for group in _shapes([*layers, layers[0]], torch.float32)] == [2, 1]


def check(a: Tensor, x: Tensor, bias: Tensor | None = None, cut: Cut | None = None) -> None:
    a, x = a.cuda(), x.cuda()
    bias = None if bias is None else bias.cuda()
    packed = CudaNm24.pack(NM.encode(a), a.dtype)
    if cut is None:
        y = CudaNm24.run(x, packed.tensors, packed.meta, bias)
        bound = CudaNm24.bind(packed.tensors, packed.meta, bias)
        assert torch.equal(bound(x), y) and torch.equal(bound(x), y)
    else:
        y = torch.full((len(x), len(a)), math.nan, dtype=x.dtype, device="cuda")
        cuda_nm24.launch(rows_of("test", x, packed.meta, x.device), packed.tensors[0], packed.meta, bias, y, cut)
    expected = x.double() @ a.double().mT + (0 if bias is None else bias.double())
    assert float((y.double() - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (100, 514), (300, 4100), (1024, 2048)], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 13, 32, 64, 200])
def test_products(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    check(sparse(*shape, dtype), torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 16, 32, 64])
def test_every_kind_of_cut(tokens: int) -> None:
    a, x = sparse(500, 1300), torch.randn(tokens, 1300).bfloat16()
    work = Work(500, 6, next(t for t in cuda_nm24.gpu(0).tiles if tokens <= 8 * t))
    for cut in list(_nm24_cut.cuts(work, cuda_nm24.gpu(0)))[::5]:
        check(a, x, cut=cut)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 64])
def test_nan_in_x_comes_out_where_a_stored_weight_meets_it(tokens: int) -> None:
    """Of both kernels; what lies under a zero is not read by sparse tensor cores."""
    a, x = sparse(64, 128).cuda(), torch.randn(tokens, 128, device="cuda").bfloat16()
    x[2, 5] = math.nan
    met = a[:, 5] != 0
    for kernel, exactly in ((CudaNm24, True), (CudaNm24Vendor, False)):
        packed = kernel.pack(NM.encode(a), a.dtype)
        y, finite = (kernel.run(part, packed.tensors, packed.meta, None) for part in (x, x.nan_to_num(0.0)))
        assert bool(y[2][met].isnan().all()) and not y[[0, 1, 3]].isnan().any()
        if exactly:
            assert torch.equal(y[2][~met], finite[2][~met])
