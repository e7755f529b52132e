"""The LSCD layout packed and walked on the CPU, sources compiled for every arch, and products where there is a GPU."""

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from gossamer import driver, nvrtc
from gossamer.formats.bitmask import Bitmask
from gossamer.kernels import Case, KernelError, _lscd_cut, cuda_lscd
from gossamer.kernels._cuda_operands import DTYPES, rows_of
from gossamer.kernels._lscd_cut import Cut, Gpu, Work
from gossamer.kernels._lscd_map import COLUMNS, tensor_map
from gossamer.kernels._lscd_pack import DEPTH, LINE, head_bytes, pack_matrix, share_of_items, unpack_matrix
from gossamer.kernels.cuda_lscd import CudaLscd

H100 = Gpu(132, 232448, True, True)
SMALL = Gpu(84, 101376, False, False)
BLACKWELL = Gpu(148, 232448, True, False)
SHAPES = [(1, 1), (7, 24), (16, 256), (33, 257), (64, 1000), (100, 513)]


def sparse(m: int, k: int, density: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(m, k) * (torch.rand(m, k) < density)).to(dtype)


def row_skewed(m: int, k: int) -> Tensor:
    return (torch.randn(m, k) * (torch.rand(m, k) < torch.linspace(0, 1, m).unsqueeze(1))).bfloat16()


def round_trip(a: Tensor, words: bool) -> Tensor:
    stages, offsets, _ = pack_matrix(a, words)
    return unpack_matrix(stages, offsets, (a.shape[0], a.shape[1]), a.dtype, words)


ITEMS = pytest.mark.parametrize("words", [False, True], ids=["halves", "words"])


@ITEMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.05, 0.3, 0.5, 0.9, 1])
def test_the_streams_of_every_lane_lead_to_the_values(shape: tuple[int, int], density: float, dtype, words) -> None:
    a = sparse(*shape, density, dtype)
    assert torch.equal(round_trip(a, words), a)


@ITEMS
def test_rows_of_unequal_density(words: bool) -> None:
    a = row_skewed(70, 700)
    assert torch.equal(round_trip(a, words), a)


@ITEMS
def test_special_values(words: bool) -> None:
    a = sparse(20, 300, 0.5)
    a[0, 0], a[17, 299], a[3, 40], a[4, 41] = math.nan, math.inf, -math.inf, -0.0
    found = round_trip(a, words)
    assert torch.equal(found.nan_to_num(7.0), a.nan_to_num(7.0))
    assert found[0, 0].isnan() and not found[4, 41].signbit()


@ITEMS
def test_several_chunks_are_as_one(monkeypatch: pytest.MonkeyPatch, words: bool) -> None:
    a = sparse(200, 600, 0.4)
    whole = pack_matrix(a, words)
    monkeypatch.setattr("gossamer.kernels._lscd_pack.CHUNK", 32 * DEPTH)
    parts = pack_matrix(a, words)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1]) and whole[2] == parts[2]


@ITEMS
def test_room_is_that_of_the_largest(words: bool) -> None:
    a = row_skewed(64, 512)
    stages, offsets, (one, two) = pack_matrix(a, words)
    sizes = offsets.diff() * LINE
    assert one == int(sizes.max()) and two == int(sizes.view(-1, 2).sum(1).max())
    assert stages.numel() == int(offsets[-1]) * LINE
    assert int(sizes.min()) >= head_bytes(words)


def test_little_is_padding() -> None:
    for density, most in ((0.5, 1.11), (0.2, 1.25), (0.1, 1.40)):
        a = sparse(512, 2048, density)
        ideal = a.numel() / 8 + 2 * int(a.count_nonzero())
        assert pack_matrix(a, False)[0].numel() < most * ideal
    _, registers = share_of_items(a)
    assert pack_matrix(a, True)[0].numel() < 1.25 * a.numel() * (1 / 16 + 2 * registers)


def test_shares_of_values_and_registers() -> None:
    a = torch.tensor([[1.0, 2, 0, 0, 0, 3, 0, 4], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert share_of_items(a) == (4 / 16, 3 / 8)
    assert share_of_items(torch.ones(1, 3)) == (1, 1)


def test_blocks_and_few_values_are_packed_by_register() -> None:
    blocks = (torch.rand(16, 32) < 0.5).repeat_interleave(16, 0).repeat_interleave(16, 1).bfloat16()
    for a, words in ((blocks, True), (sparse(256, 512, 0.5), False), (sparse(256, 512, 0.05), True)):
        assert CudaLscd.pack(Bitmask.encode(a), torch.bfloat16).meta["words"] == words


@pytest.mark.parametrize("device", [H100, SMALL, BLACKWELL], ids=["H100", "small", "Blackwell"])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 8), (4096, 4096), (300, 70000), (128256, 4096)], ids=str)
def test_every_cut_fits(shape: tuple[int, int], density: float, device: Gpu) -> None:
    room = head_bytes(False) + int(64 * density) * LINE
    for tiles in _lscd_cut.TILES[: 5 if device.wgmma else 4]:
        work = Work(shape[0], -(-shape[1] // DEPTH), (room, 2 * room), room, tiles, False)
        best = _lscd_cut.best_cut(work, device)
        assert device.clusters or best.cluster == 1
        assert device.wgmma or best.team == 1
        assert work.shared(best) <= device.shared
        assert 32 * (best.warps + 1) <= _lscd_cut.THREADS[best.team, best.pair][tiles]
        assert best.x_ring >= best.split * _lscd_cut.X_PER_STAGE[best.team]
        assert best.warps * best.ring <= 191 and best.x_ring <= 32
        assert work.panels(best) * best.pair * best.high * 16 >= shape[0]


def test_the_variants_have_every_macro_and_both_of_each() -> None:
    found = [dict(f.macros) for f in cuda_lscd.VARIANTS]
    kinds = {(m["TEAM"], m["PAIR"], m["TILES"]) for m in found}
    assert kinds == {(str(team), str(pair), str(t)) for (team, pair), most in _lscd_cut.THREADS.items() for t in most}
    for macro in ("BF16", "WORDS"):
        assert {(m[macro], m["TEAM"], m["PAIR"]) for m in found} == {
            (value, str(team), str(pair)) for value in "01" for team, pair in _lscd_cut.THREADS
        }
    assert {m["CLUSTER"] for m in found} == {"1", "2", "4"}


def test_refusals() -> None:
    spec = Bitmask.encode(sparse(16, 32, 0.5)).spec()
    assert "NVIDIA GPU" in (CudaLscd.refuses(Case(spec, torch.device("cpu"), torch.bfloat16, 1)) or "")
    packed = CudaLscd.pack(Bitmask.encode(sparse(16, 32, 0.5)), torch.bfloat16)
    with pytest.raises(KernelError, match="x lies on meta, the weight on cpu; fix"):
        CudaLscd.run(torch.zeros(2, 32, dtype=torch.bfloat16, device="meta"), packed.tensors, packed.meta, None)
    with pytest.raises(KernelError, match="x has 31 features, the weight takes 32"):
        CudaLscd.run(torch.zeros(2, 31, dtype=torch.bfloat16), packed.tensors, packed.meta, None)
    with pytest.raises(KernelError, match=r"packed for torch.bfloat16, not torch.float16; fix"):
        CudaLscd.run(torch.zeros(2, 32, dtype=torch.float16), packed.tensors, packed.meta, None)
    with pytest.raises(KernelError, match="not torch.float32; fix"):
        CudaLscd.pack(Bitmask.encode(sparse(16, 32, 0.5)), torch.float32)


class Encoder:
    """A driver that notes what it should encode."""

    def __init__(self, error: int) -> None:
        self.error = error

    def cuTensorMapEncodeTiled(self, place, kind, rank, address, *rest) -> int:
        self.seen = kind, rank, address.value, [tuple(r) if isinstance(r, ctypes.Array) else r for r in rest]
        assert place.value % 64 == 0
        ctypes.memset(place, 0xAB, 128)
        return self.error

    def cuGetErrorString(self, error, text) -> int:
        return 0


def test_the_map_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Encoder(0)
    monkeypatch.setattr(driver, "library", lambda: stand_in)
    encode = tensor_map.__wrapped__
    assert encode(0, 1 << 40, 70, 2368, 128, 256, True) == b"\xab" * 128
    # Columns of a block, tokens and blocks; the bytes from token to token and from block to block.
    assert stand_in.seen == (9, 3, 1 << 40, [(64, 70, 37), (4736, 128), (64, 128, 4), (1, 1, 1), 0, 3, 3, 0])
    encode(0, 256, 1, 64, 8, 128, False)
    assert stand_in.seen == (6, 3, 256, [(64, 1, 1), (128, 128), (64, 8, 2), (1, 1, 1), 0, 3, 3, 0])
    with pytest.raises(ValueError, match="72 columns, not in blocks of 64; fix: pad x"):
        encode(0, 256, 1, 72, 8, 128, False)
    stand_in.error = 1
    with pytest.raises(driver.LaunchError, match=r"a tensor map of x \[1, 64\] at 0x100: CUDA error 1"):
        encode(0, 256, 1, 64, 8, 128, False)


def test_a_thread_that_has_not_touched_the_gpu_gets_a_map_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, entered = Encoder(driver.NO_CONTEXT), []

    def enter(device: int) -> None:
        entered.append(device)
        stand_in.error = 0

    monkeypatch.setattr(driver, "library", lambda: stand_in)
    monkeypatch.setattr(driver, "enter", enter)
    assert tensor_map.__wrapped__(3, 256, 1, 64, 8, 128, False) == b"\xab" * 128
    assert entered == [3]


@pytest.mark.parametrize("device", [H100, SMALL], ids=["maps", "no maps"])
@pytest.mark.parametrize("bias", [None, torch.randn(100).bfloat16(), torch.randn(100)], ids=["", "bias", "float32"])
def test_a_bound_product_launches_as_run_does(monkeypatch: pytest.MonkeyPatch, at, bias, device: Gpu) -> None:
    """Shapes that come back take the short way: the same launches, tensors of the same values and shapes."""
    seen: list[tuple] = []

    def start(self: nvrtc.Function, index: int, grid: tuple, block: tuple, shared: int, values: tuple) -> None:
        stages, offsets, x, added, y, rows, cols, tokens, *sizes, x_map = values
        given, held = at(x, tokens, cols), [] if bias is None else at(added, 1, rows).tolist()
        at(y, tokens, rows).copy_(given[:, :rows])
        seen.append((repr(self), index, grid, block, stages, offsets, given.tolist(), held, sizes, x_map, shared))

    monkeypatch.setattr(nvrtc.Function, "start", start)
    monkeypatch.setattr(cuda_lscd, "gpu", lambda index: device)
    monkeypatch.setattr(cuda_lscd, "tensor_map", lambda index, address, *asked: asked)
    packed = cuda_lscd.pack_dense(sparse(100, 320, 0.5), False)
    call = CudaLscd.bind(packed.tensors, packed.meta, bias)
    ones = torch.ones(8 * 320 + 1).bfloat16()
    for x in (
        *(torch.randn(*shape, 320).bfloat16() for shape in ((1,), (1, 1), (3,), (2, 4), (128,), (129,), (300,), (0,))),
        torch.randn(320, 8).bfloat16().mT,
        ones[1:].view(8, 320),
    ):
        for _ in range(3):
            begin = len(seen)
            expected = CudaLscd.run(x, packed.tensors, packed.meta, bias)
            wanted = seen[begin:]
            y = call(x)
            assert y.shape == (*x.shape[:-1], 100) and torch.equal(y, expected)
            assert seen[begin + len(wanted) :] == wanted
    with pytest.raises(KernelError, match="x has 256 features"):
        call(torch.zeros(3, 256).bfloat16())


def test_a_bound_product_sees_its_bias_change(monkeypatch: pytest.MonkeyPatch, at) -> None:
    def start(self: nvrtc.Function, index: int, grid: tuple, block: tuple, shared: int, values: tuple) -> None:
        at(values[4], 2, 16).copy_(at(values[3], 1, 16))

    monkeypatch.setattr(nvrtc.Function, "start", start)
    monkeypatch.setattr(cuda_lscd, "gpu", lambda index: SMALL)
    packed, x = cuda_lscd.pack_dense(sparse(16, 64, 0.5), False), torch.randn(2, 64).bfloat16()
    for bias in (torch.zeros(16), torch.zeros(16).bfloat16()):
        call = CudaLscd.bind(packed.tensors, packed.meta, bias)
        for value in (1.0, 2.0):
            bias.fill_(value)
            assert (call(x) == value).all()


def check(a: Tensor, x: Tensor, bias: Tensor | None, words: bool, cut: Cut | None = None) -> None:
    a, x = a.cuda(), x.cuda()
    bias = None if bias is None else bias.cuda()
    packed = cuda_lscd.pack_dense(a, words)
    if cut is None:
        y = CudaLscd.run(x, packed.tensors, packed.meta, bias)
        bound = CudaLscd.bind(packed.tensors, packed.meta, bias)
        assert torch.equal(bound(x), y) and torch.equal(bound(x), y)
    else:
        y = torch.full((len(x), len(a)), math.nan, dtype=x.dtype, device="cuda")
        cuda_lscd.launch(rows_of("test", x, packed.meta, x.device, COLUMNS), packed.tensors, packed.meta, bias, y, cut)
    expected = x.double() @ a.double().mT + (0 if bias is None else bias.double())
    error = float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    # Rounding to bfloat16 alone is 1.7e-3 of many results, but up to 2^-8 of a single one; to float16, an eighth of it.
    most = 2e-3 if y.numel() >= 1024 else 4e-3
    assert error < (most if x.dtype == torch.bfloat16 else 5e-4), f"{error:.1e} with {cut}"


@pytest.mark.gpu
@ITEMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1001), (1024, 4096)], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 13, 32, 64, 70, 256])
def test_products(shape: tuple[int, int], tokens: int, dtype: torch.dtype, words: bool) -> None:
    for density in (0, 0.1, 0.5, 1):
        a, x = sparse(*shape, density, dtype), torch.randn(tokens, shape[1]).to(dtype)
        check(a, x, torch.randn(shape[0]).to(dtype) if tokens % 2 else None, words)


@pytest.mark.gpu
@ITEMS
@pytest.mark.parametrize("wgmma", [True, False], ids=["", "without wgmma"])
@pytest.mark.parametrize("tokens", [3, 16, 32, 64, 99])
def test_every_kind_of_cut_computes_the_same(tokens: int, wgmma: bool, words: bool) -> None:
    device = cuda_lscd.gpu(0)
    device = device._replace(wgmma=wgmma and device.wgmma)
    a, x = row_skewed(500, 2312), torch.randn(min(tokens, device.tokens), 2312).bfloat16()
    meta = cuda_lscd.pack_dense(a, words).meta
    found: dict[tuple[int, ...], list[Cut]] = {}
    for cut in _lscd_cut.cuts(cuda_lscd.work_of(len(x), meta), device):
        found.setdefault((cut.team, cut.pair, cut.cluster), []).append(cut)
    for alike in found.values():
        for cut in alike[:: max(1, len(alike) // 7)]:
            check(a, x, None, words, cut)


def ptx(file: str, macros: dict, _arch: str) -> bytes:
    """A device source for a GPU of 2020, in a form that the driver of any later one translates."""
    from cuda.bindings import nvrtc as compiler  # type: ignore[attr-defined]

    _, program = compiler.nvrtcCreateProgram(nvrtc.read(file).encode(), file.encode(), 0, [], [])
    options = [b"--gpu-architecture=compute_80", *(f"-D{name}={value}".encode() for name, value in macros.items())]
    (error,) = compiler.nvrtcCompileProgram(program, len(options), options)
    assert not error
    _, size = compiler.nvrtcGetPTXSize(program)
    text = bytearray(size)
    compiler.nvrtcGetPTX(program, text)
    return bytes(text)


def test_the_source_for_older_gpus_copies_without_the_bulk_engine() -> None:
    found = [ptx(f.file, dict(f.macros), "") for f in cuda_lscd.VARIANTS if dict(f.macros)["TEAM"] == "1"]
    assert all(b"cp.async.cg" in text and b"cp.async.bulk" not in text and b"cluster" not in text for text in found)


@pytest.mark.gpu
@ITEMS
@pytest.mark.parametrize("tokens", [5, 16, 32, 64])
def test_the_path_of_older_gpus(tokens: int, words: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compile", ptx)
    monkeypatch.setattr(nvrtc, "_library", nvrtc._library.__wrapped__)
    monkeypatch.setattr(cuda_lscd, "function", cuda_lscd.function.__wrapped__)
    device = cuda_lscd.gpu(0)._replace(clusters=False, wgmma=False, shared=99 << 10)
    monkeypatch.setattr(cuda_lscd, "gpu", lambda index: device)
    check(row_skewed(500, 2312), torch.randn(tokens, 2312).bfloat16(), torch.randn(500).bfloat16(), words)


@pytest.mark.gpu
def test_packing_of_a_stack_is_a_stack() -> None:
    parts, x = [sparse(m, 520, 0.4) for m in (64, 40, 8)], torch.randn(9, 520).bfloat16()
    check(torch.cat(parts), x, None, False)


@pytest.mark.gpu
def test_strides_leading_dimensions_and_no_tokens() -> None:
    a = sparse(48, 64, 0.5).cuda()
    packed = CudaLscd.pack(Bitmask.encode(a), torch.bfloat16)
    x = torch.randn(2, 3, 64, 2, device="cuda").bfloat16()[..., 0]
    y = CudaLscd.run(x, packed.tensors, packed.meta, None)
    torch.testing.assert_close(y.double(), x.double() @ a.double().mT, rtol=1e-2, atol=5e-2)
    odd = torch.randn(5 * 64 + 1, device="cuda").bfloat16()[1:].view(5, 64)  # no multiple of 16 bytes
    torch.testing.assert_close(
        CudaLscd.run(odd, packed.tensors, packed.meta, None).double(),
        odd.double() @ a.double().mT,
        rtol=1e-2,
        atol=5e-2,
    )
    assert CudaLscd.run(x[:0], packed.tensors, packed.meta, None).shape == (0, 3, 48)


@pytest.mark.gpu
def test_same_bits_again_in_another_thread_on_another_stream_and_in_a_graph() -> None:
    a, x = sparse(1024, 4096, 0.5).cuda(), torch.randn(16, 4096, device="cuda").bfloat16()
    packed = CudaLscd.pack(Bitmask.encode(a), torch.bfloat16)
    first = CudaLscd.run(x, packed.tensors, packed.meta, None)
    tensor_map.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(first, pool.submit(CudaLscd.run, x, packed.tensors, packed.meta, None).result())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = CudaLscd.run(x, packed.tensors, packed.meta, None)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = CudaLscd.run(x, packed.tensors, packed.meta, None)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.gpu
def test_nan_in_x_comes_out() -> None:
    a, x = sparse(48, 64, 0.5).cuda(), torch.randn(4, 64, device="cuda").bfloat16()
    packed = CudaLscd.pack(Bitmask.encode(a), torch.bfloat16)
    x[2, 5] = math.nan
    y = CudaLscd.run(x, packed.tensors, packed.meta, None)
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


@pytest.mark.gpu
def test_packing_is_the_same_on_both_devices() -> None:
    a = row_skewed(100, 1000)
    for words in (False, True):
        for here, there in zip(pack_matrix(a, words)[:2], pack_matrix(a.cuda(), words)[:2], strict=True):
            assert torch.equal(here, there.cpu())
