"""cuSPARSELt: what can be said without a GPU; with one every layout of operands, graphs and wrong algorithms."""

import contextlib
import ctypes
import gc
import pickle
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import cslt, cslt_library, cslt_search, dispatch, driver, patterns
from gossamer.cslt import CsltError, Problem
from gossamer.formats.nm24 import NM
from gossamer.kernels import Case, KernelError, cuda_nm24_vendor
from gossamer.kernels.cuda_nm24_vendor import CudaNm24Vendor
from gossamer.nn import SparseLinear
from gossamer.train import ffn24

B, H, F8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def test_what_the_library_takes() -> None:
    assert Problem(64, 128, 8, B, B).refuses() is None
    assert Problem(64, 128, 16, F8, B).refuses() is None
    assert "multiples of 16, not 64 x 24" in (Problem(64, 24, 8, B, B).refuses() or "")
    assert "multiples of 32, not 48 x 64" in (Problem(48, 64, 16, F8, B).refuses() or "")
    assert "a multiple of 8 columns" in (Problem(64, 128, 12, H, H).refuses() or "")
    assert "operands in bfloat16" in (Problem(64, 128, 8, torch.float32, torch.float32).refuses() or "")


def test_a_machine_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cslt.refusal(torch.device("cpu")) == "an NVIDIA GPU"
    monkeypatch.setattr(cslt_library, "NAME", "libnothing.so")
    with pytest.raises(CsltError, match=r"does not load; fix: pip install nvidia-cusparselt-cu13"):
        cslt_library._load()


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cslt_library, "_version", lambda found: (0, 7))
    monkeypatch.setattr(cslt_library, "_load", lambda: _Anything())
    cslt_library.library.cache_clear()
    with pytest.raises(CsltError, match=r"cuSPARSELt is 0.7, at least 0.8 is needed"):
        cslt_library.library()


@pytest.mark.parametrize("built", [True, False])
def test_a_product_hands_the_library_what_it_was_given(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    """Through the native module, and without it through ctypes; the library is a function of ours."""
    ct, seen = ctypes, []

    @ct.CFUNCTYPE(ct.c_int, *[ct.c_void_p] * 10, ct.c_int32)
    def entry(*args: int) -> int:
        seen.append((*args[:9], ct.c_void_p.from_address(args[9]).value, args[10]))
        return 7

    class Library:
        cusparseLtMatmul = entry

    monkeypatch.setattr(cslt, "library", Library)
    monkeypatch.setattr(cslt.native, "available", lambda: built)
    high = 0x7FFF_1234_5678_9A00  # an address that no 32-bit argument holds
    handle, plan, numbers, a, b, d, space, stream = (high + 16 * i for i in range(8))
    assert cslt._runner(handle, plan)(numbers, a, b, d, space, stream) == 7
    assert seen == [(handle, plan, numbers, a, b, numbers + 4, d, d, space, stream, 1)]


def test_one_scale_for_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha reaches the library as a float on the host, beta is 0, and a plan forgets it."""
    seen = []

    def entry(numbers: int, *addresses: int) -> int:
        seen.append(tuple((ctypes.c_float * 2).from_address(numbers)))
        return 0

    monkeypatch.setattr(cslt, "_current_device", lambda: 0)
    monkeypatch.setattr(cslt, "_stream", lambda index: 0)
    plan: Any = SimpleNamespace(_index=0, workspace=0, _run=entry, problem=None)
    a, b, d = torch.zeros(3, 4).unbind()
    for alpha in (1.0, 0.375, 1.0):
        assert cslt.Plan.run(plan, a, b, d, alpha) is d
    assert cslt.Plan.run(plan, a, b, d) is d
    assert seen == [(1.0, 0.0), (0.375, 0.0), (1.0, 0.0), (1.0, 0.0)]
    plan.run = partial(cslt.Plan.run, plan)
    monkeypatch.setattr(cslt, "plan", lambda *key: plan)
    monkeypatch.setattr(cslt, "_unlike", lambda a, problem, b: None)
    cslt.matmul(a, Problem(16, 16, 16, B, B), b, cslt.Algorithm(0), 0.75)
    assert seen[4:] == [(0.75, 0.0)]


def test_operands_of_another_problem_are_refused() -> None:
    p, a = Problem(64, 128, 16, B, B), torch.zeros(64 * 128 * 9 // 8, dtype=torch.uint8)
    for b, message in (
        (torch.zeros(16, 120, dtype=B), r"bfloat16 \(16, 128\) on the right, not torch.bfloat16 \(16, 120\); fix"),
        (torch.zeros(128, 16, dtype=B), r"not torch.bfloat16 \(128, 16\); fix"),
        (torch.zeros(16, 128, dtype=H), r"not torch.float16 \(16, 128\); fix"),
        (torch.zeros(128, 16, dtype=B).mT, "a contiguous right operand at an aligned address; fix: pass cslt.aligned"),
        (torch.zeros(16 * 128 + 1, dtype=B)[1:].view(16, 128), "at an aligned address; fix"),
        (torch.zeros(16, 128, dtype=B), "both operands on one GPU, not on cpu and cpu; fix"),
    ):
        with pytest.raises(ValueError, match=message):
            cslt.matmul(a, p, b, cslt.Algorithm(0))
    with pytest.raises(ValueError, match=r"\(128, 24\) on the right, not"):
        cslt.matmul(a, p._replace(columns=24, b_rows=False), torch.zeros(24, 128, dtype=B), cslt.Algorithm(0))


class _Anything:
    def __getattr__(self, name: str) -> "_Anything":
        return self


def test_compressing_needs_a_gpu() -> None:
    with pytest.raises(CsltError, match="cuSPARSELt needs an NVIDIA GPU; fix: run it dense"):
        cslt.compress(torch.zeros(64, 64, dtype=B))


@pytest.mark.parametrize("dtype", [B, H, F8, torch.int8], ids=str)
def test_only_2_of_4_is_compressed(dtype: torch.dtype) -> None:
    a = torch.tensor([[-0.0, 1.0, 0.0, -2.0, 3.0, -0.0, -0.0, 4.0]]).to(dtype)
    clean = cslt.checked(a)
    assert (
        clean.dtype == dtype
        and torch.equal(clean.float(), a.float())
        and not torch.signbit(clean.float()[a.float() == 0]).any()
    )
    a[0, 0] = 1
    with pytest.raises(ValueError, match="takes a 2:4 matrix; fix: prune it"):
        cslt.checked(a)
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match="takes a 2:4 matrix; fix: prune it"):
            cslt.checked(torch.tensor([[float("nan"), 1.0, 0.0, 1.0]]).to(dtype))


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "said"), [((7, 5), "8.0 .Ampere. or later"), ((9, 0), "a working cuSPARSELt: no")]
)
def test_without_sparse_tensor_cores_or_the_library_all_is_dense(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str
) -> None:
    def handle(index: int) -> int:
        raise CsltError("no library; fix: get one")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(driver, "present", lambda: True)
    monkeypatch.setattr(cslt_library, "handle", handle)
    monkeypatch.setattr(cslt_library, "_refusal", cslt_library._refusal.__wrapped__)
    a = NM.encode(torch.where(patterns.nm(torch.rand(64, 64)), 1.0, 0.0).bfloat16())
    case = Case(a.spec(), GPU, B, 512)
    assert re.search(said, CudaNm24Vendor.refuses(case) or "")
    assert CudaNm24Vendor not in dispatch.eligible(case) and not CudaNm24Vendor.fits({}, GPU)
    ffn24.worth.cache_clear()  # type: ignore[attr-defined]
    assert ffn24.worth(Problem(4096, 4096, 4096, B, B), 0) is None


def test_running_out_of_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial without room for its operands raises; the next one finds what there is."""
    p, found, full = Problem(64, 1024, 48, B, B), cslt.Algorithm(7), [True, True]

    def trials(problem: Problem, index: int):
        if full and full.pop():
            raise torch.OutOfMemoryError("full")
        yield found, 3.0, None

    monkeypatch.setattr(cslt_search, "trials", trials)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cslt, "refusal", lambda device: None)
    monkeypatch.setattr(cslt_search, "dense_time", lambda problem, index: 100.0)
    cslt_search.best.cache_clear()
    ffn24.worth.cache_clear()  # type: ignore[attr-defined]
    with pytest.raises(torch.OutOfMemoryError):
        cslt_search.best(p, 0)
    assert ffn24.worth(p, 0) is None  # dense, this time
    assert ffn24.worth(p, 0) == found and cslt_search.best(p, 0) == (found, 3.0)
    cslt_search.best.cache_clear()
    ffn24.worth.cache_clear()  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", [0, 600, 20_000])
def test_sizes_that_there_is_no_memory_to_try_out(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """They go with the largest that was tried out; once there is memory they are tried out."""

    def best(p: Problem, index: int) -> tuple[cslt.Algorithm, float]:
        if p.columns > limit[0]:
            raise torch.OutOfMemoryError("full")
        return cslt.Algorithm(p.columns % 7), 1.0

    limit = [room]
    monkeypatch.setattr(cslt_search, "best", best)
    p = Problem(64, 64, 128, B, B)
    if not room:
        with pytest.raises(torch.OutOfMemoryError):
            cuda_nm24_vendor._algorithms(p, 0)
    else:
        found = cuda_nm24_vendor._algorithms(p, 0)
        assert found == [[n, n % 7] for n in cuda_nm24_vendor.SIZES if n <= room]
        assert cuda_nm24_vendor._choice(found, 9_999) == cslt.Algorithm((512 if room == 600 else 16384) % 7)
    limit[0] = 20_000
    assert len(cuda_nm24_vendor._algorithms(p, 0)) == len(cuda_nm24_vendor.SIZES)


def test_what_the_library_made_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plan, and of a plan that failed half-way; once, and nothing that was not made."""
    made, freed = list[tuple[str, int]](), list[tuple[str, int]]()
    failing: set[str] = set()

    class Library:
        cusparseLtMatmul = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)

        def __getattr__(self, name: str):
            def entry(first: int, *args: Any) -> int:
                if name.endswith("Destroy"):
                    freed.append((name.removesuffix("Destroy"), first))
                elif name.endswith("Init") and name not in failing:
                    made.append((name.removesuffix("Init"), args[0]))
                return int(name in failing)

            return entry

        def cusparseLtGetErrorString(self, status: int) -> bytes:
            return b"failed"

    fake = Library()
    for module in (cslt, cslt_library):
        monkeypatch.setattr(module, "library", lambda: fake)
    monkeypatch.setattr(cslt, "handle", lambda index: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    plan = cslt.Plan(Problem(64, 64, 64, B, B), cslt.Algorithm(0), 0)
    assert len(made) == 6 and not freed
    del plan
    gc.collect()
    wanted = {(n.replace("Dense", "Mat").replace("Structured", "Mat"), at) for n, at in made}
    wanted = {(n, at) for n, at in wanted if n != "cusparseLtMatmulDescriptor"}  # has nothing of its own
    assert len(freed) == 5 and set(freed) == wanted
    made.clear(), freed.clear()
    failing.add("cusparseLtMatmulAlgSelectionInit")
    with pytest.raises(CsltError, match="cusparseLtMatmulAlgSelectionInit: error 1, failed; fix"):
        cslt.Plan(Problem(64, 64, 64, B, B), cslt.Algorithm(0), 0)
    gc.collect()
    assert sorted(at for _, at in freed) == sorted(at for n, at in made if "Matmul" not in n) and len(freed) == 3


def test_what_another_machine_packed_is_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickled where the GPU or the library is another, a layer forgets cuSPARSELt's bytes and algorithms."""
    a = torch.where(patterns.nm(torch.rand(16, 32)), 1.0, 0.0).bfloat16()
    layer = SparseLinear.from_format(NM.encode(a))
    stored, here = layer.parts(), [[9, 0], [0, 8]]
    monkeypatch.setattr(CudaNm24Vendor, "device", "cpu")
    monkeypatch.setattr(cslt, "refusal", lambda device: None)
    monkeypatch.setattr(cuda_nm24_vendor, "_maker", lambda device: here)
    meta = {"rows": 16, "cols": 32, "bf16": True, "algorithms": []}  # dense, so that it runs here
    for made_by in (here, [[10, 0], [0, 8]], [[9, 0], [0, 9]], None):
        forged = meta if made_by is None else meta | {"made_by": made_by}
        layer.use(B, [(512, (dispatch.Step(CudaNm24Vendor.name, (len(stored),), forged),))], [a])
        loaded = pickle.loads(pickle.dumps(layer))
        assert loaded.prepared is (made_by == here)
        assert torch.equal(loaded.decode(), a)


class _Plan:
    """What a plan computes, in torch; remembers how many tokens it was given."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def run(self, a: Tensor, x: Tensor, d: Tensor) -> Tensor:
        self.seen.append(len(x))
        return d.copy_(x @ a.mT)

    def bind(self, a: Tensor, shape: torch.Size):
        return lambda x: self.run(a, x.view(-1, a.shape[1]), x.new_empty(shape[:-1].numel(), a.shape[0])).view(shape)


@pytest.mark.parametrize("bound", [False, True])
def test_few_tokens_are_padded_to_what_was_tried_out(monkeypatch: pytest.MonkeyPatch, bound: bool) -> None:
    seen: list[int] = []
    plans: list[int] = []

    def plan(meta: dict, tokens: int, bias: Tensor | None, index: int) -> _Plan:
        plans.append(tokens)
        return _Plan(seen)

    monkeypatch.setattr(cuda_nm24_vendor, "_plan", plan)
    monkeypatch.setattr(cuda_nm24_vendor, "_ready", {})
    a = torch.randn(16, 32).bfloat16()
    meta = {"rows": 16, "cols": 32, "bf16": True, "algorithms": [[128, 0, 0, 0]]}
    call = CudaNm24Vendor.bind([a], meta, None) if bound else lambda x: CudaNm24Vendor.run(x, [a], meta, None)
    for _ in range(2):
        for shape in ((0, 32), (2, 0, 32), (1, 32), (127, 32), (128, 32), (2, 64, 32), (131, 32)):
            x = torch.randn(*shape).bfloat16()
            y = call(x)
            assert y.shape == (*shape[:-1], 16) and torch.allclose(y, x @ a.mT, rtol=1e-2, atol=1e-2)
    assert seen == [128, 128, 128, 128, 136] * 2 and set(plans) == {128, 136}
    with pytest.raises(KernelError, match="x has 24 features"):
        call(torch.zeros(128, 24, dtype=B))


def test_algorithms_that_kill_the_process_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many:
        def __init__(self, *args: object) -> None: ...

        def configs(self) -> int:
            return 52

    monkeypatch.setattr(cslt, "Plan", Many)
    for version, count in (((0, 8), 28), ((0, 9), 52)):
        monkeypatch.setattr(cslt_library, "version", lambda version=version: version)
        assert len(list(cslt_search._candidates(Problem(64, 64, 64, H, H), 0))) == count
        assert len(list(cslt_search._candidates(Problem(64, 64, 64, B, B), 0))) == 52


def test_without_an_algorithm_that_is_right_a_layer_runs_dense() -> None:
    a, x = torch.randn(16, 32).bfloat16(), torch.randn(3, 32).bfloat16()
    meta = {"rows": 16, "cols": 32, "bf16": True, "algorithms": []}
    assert torch.equal(CudaNm24Vendor.run(x, [a], meta, None), x @ a.mT)
    call = CudaNm24Vendor.bind([a], meta, None)
    assert all(torch.equal(call(y), y @ a.mT) for y in (x, x, x[:2]))


def test_the_prefill_kernel_refuses() -> None:
    a = NM.encode(torch.where(patterns.nm(torch.rand(64, 64)), 1.0, 0.0).bfloat16())
    assert CudaNm24Vendor.refuses(Case(a.spec(), torch.device("cpu"), B, 512)) == "an NVIDIA GPU"
    with pytest.raises(KernelError, match="needs an NVIDIA GPU; fix"):
        CudaNm24Vendor.pack(a, B)


@pytest.mark.parametrize(
    ("shape", "tokens", "dtype", "pattern", "said"),
    [
        ((64, 24), 512, B, (2, 4), "multiples of 16, not 64 x 24"),
        ((24, 64), 512, H, (2, 4), "multiples of 16, not 24 x 64"),
        ((64, 64), 127, B, (2, 4), "at least 128 tokens"),
        ((64, 64), 512, torch.float32, (2, 4), "x in bfloat16 or float16"),
        ((64, 64), 512, B, (4, 8), "a weight that is 2:4, not 4:8"),
        ((64, 64), 512, B, (2, 4), None),
    ],
)
def test_what_the_prefill_kernel_leaves_to_others(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    pattern: tuple[int, int],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cslt, "refusal", lambda device: None)
    a = NM.encode(torch.where(patterns.nm(torch.rand(shape), *pattern), 1.0, 0.0).bfloat16(), *pattern)
    found = CudaNm24Vendor.refuses(Case(a.spec(), GPU, dtype, tokens))
    assert found is None if said is None else said in (found or "")


def operands(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    a, b = cslt_search.operands(p, 0)
    wide = (a.double(), b.double().mT if p.b_rows else b.double())
    d = wide[0] @ wide[1]
    return a, b, d.mT if p.d_rows else d


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("b_rows", [True, False])
@pytest.mark.parametrize("d_rows", [True, False])
@pytest.mark.parametrize(("dtype", "out"), [(B, B), (H, H), (F8, B), (torch.int8, torch.int8)], ids=str)
def test_products(dtype: torch.dtype, out: torch.dtype, b_rows: bool, d_rows: bool) -> None:
    p = Problem(256, 512, 96, dtype, out, b_rows, d_rows)
    found = cslt_search.best(p, 0)
    if found is None:
        pytest.skip("the library has no such product")
    a, b, expected = operands(p)
    if out == torch.int8:
        expected = expected.clamp(-128, 127)
    assert error(cslt.matmul(cslt.compress(a), p, b, found[0]), expected) < 1e-2


@pytest.mark.gpu
def test_in_a_graph_and_with_a_bias() -> None:
    p = Problem(256, 512, 64, B, B)
    bias = torch.randn(256, device="cuda", dtype=B)
    best = cslt_search.best(p, 0)
    assert best
    a, b, expected = operands(p)
    packed, with_bias = cslt.compress(a), p._replace(bias=bias.data_ptr())
    assert error(cslt.matmul(packed, with_bias, b, best[0]), expected + bias.double()) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cslt.matmul(packed, p, b, best[0])
    b.mul_(2)
    graph.replay()
    assert error(y, 2 * expected) < 1e-2


@pytest.mark.gpu
def test_a_wrong_algorithm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = cslt.Plan.run

    def lies(self: cslt.Plan, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        y = run(self, a, b, d)
        return y.mul_(1.5) if self.algorithm.config == 0 else y

    monkeypatch.setattr(cslt.Plan, "run", lies)
    trials = list(cslt_search.trials(Problem(128, 256, 64, B, B), 0))
    assert "relative error" in (trials[0][2] or "") and any(wrong is None for _, _, wrong in trials)


@pytest.mark.gpu
def test_compress_checks_its_input() -> None:
    with pytest.raises(CsltError, match="multiples of 16"):
        cslt.compress(torch.zeros(16, 24, dtype=B, device="cuda"))
    with pytest.raises(CsltError, match="contiguous"):
        cslt.compress(torch.zeros(32, 32, dtype=B, device="cuda").mT[:16])
    a = cslt_search.operands(Problem(32, 32, 16, B, B), 0)[0]
    assert torch.equal(cslt.compress(torch.where(a == 0, -0.0, a)), cslt.compress(a, trusted=True))
    with pytest.raises(ValueError, match="takes a 2:4 matrix; fix: prune it"):
        cslt.compress(torch.ones_like(a))


@pytest.mark.gpu
def test_operands_that_do_not_fit_and_a_scale() -> None:
    p = Problem(256, 512, 64, B, B)
    best = cslt_search.best(p, 0)
    assert best
    a, b, expected = operands(p)
    packed = cslt.compress(a)
    assert error(cslt.matmul(packed, p, b, best[0], 0.3125), 0.3125 * expected) < 1e-2
    assert error(cslt.matmul(packed, p, b, best[0]), expected) < 1e-2
    for wrong in (packed[:-16], packed.view(torch.int16), torch.cat([packed, packed])):
        with pytest.raises(ValueError, match=r"bytes of cslt.compress on the left, not .*; fix"):
            cslt.matmul(wrong, p, b, best[0])
    with pytest.raises(ValueError, match="on one GPU, not on cpu and cuda:0; fix"):
        cslt.matmul(packed.cpu(), p, b, best[0])


@pytest.mark.gpu
def test_the_prefill_kernel_on_what_does_not_belong_together() -> None:
    a = torch.where(patterns.nm(torch.rand(256, 320)), torch.randn(256, 320), 0).bfloat16().cuda()
    packed, x = CudaNm24Vendor.pack(NM.encode(a), B), torch.randn(512, 320, device="cuda", dtype=B)
    assert packed.meta["made_by"] == [list(torch.cuda.get_device_capability()), list(cslt_library.version())]
    assert packed.meta["algorithms"][0][0] == 128 and CudaNm24Vendor.fits(packed.meta, torch.device("cuda", 0))
    for _ in range(2):
        assert error(CudaNm24Vendor.run(x, packed.tensors, packed.meta, None), x.double() @ a.double().mT) < 1e-2
        with pytest.raises(KernelError, match="x lies on cuda:0, the weight on cpu"):
            CudaNm24Vendor.run(x, [packed.tensors[0].cpu()], packed.meta, None)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 131, 600])
def test_the_prefill_kernel(tokens: int) -> None:
    a = torch.where(patterns.nm(torch.rand(256, 320)), torch.randn(256, 320), 0).bfloat16().cuda()
    x, bias = torch.randn(2, tokens, 320, device="cuda", dtype=B)[0], torch.randn(256, device="cuda", dtype=B)
    packed = CudaNm24Vendor.pack(NM.encode(a), B)
    expected = x.double() @ a.double().mT
    for own in (None, bias):
        y = CudaNm24Vendor.run(x, packed.tensors, packed.meta, own)
        assert y.shape == expected.shape and (not tokens or error(y, expected + (0 if own is None else own)) < 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_prefill_kernel_bound(with_bias: bool) -> None:
    """Shapes that come back, x that the library cannot take as it lies, another stream, a graph."""
    a = torch.where(patterns.nm(torch.rand(256, 320)), torch.randn(256, 320), 0).bfloat16().cuda()
    packed, bias = CudaNm24Vendor.pack(NM.encode(a), B), torch.randn(256, device="cuda", dtype=B) * with_bias
    call = CudaNm24Vendor.bind(packed.tensors, packed.meta, bias if with_bias else None)

    def check(x: Tensor) -> None:
        y = call(x)
        assert y.shape == (*x.shape[:-1], 256) and error(y, x.double() @ a.double().mT + bias.double()) < 1e-2

    x = torch.randn(2, 512, 320, device="cuda", dtype=B)
    for _ in range(2):
        for part in (x, x[0], x[0, :131], x[0, :7], x[:, :128], x[0].mT.contiguous().mT):
            check(part)
        assert call(x[:, :0]).shape == (2, 0, 256)
        odd = torch.randn(128 * 320 + 1, device="cuda", dtype=B)[1:].view(128, 320)
        check(odd)
        with torch.cuda.stream(torch.cuda.Stream()):
            check(torch.randn(512, 320, device="cuda", dtype=B))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    x.normal_()
    graph.replay()
    assert error(y, x.double() @ a.double().mT + bias.double()) < 1e-2


@pytest.mark.gpu
def test_a_prepared_layer_compiles_and_stands_autocast() -> None:
    a = torch.where(patterns.nm(torch.rand(256, 320)), torch.randn(256, 320), 0).bfloat16()
    model = nn.Sequential(SparseLinear.from_format(NM.encode(a))).cuda()
    gossamer.prepare(model, tokens=[1, 64, 512], dtype=B)
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (1, 64, 512):
        x = torch.randn(tokens, 320, device="cuda", dtype=B)
        expected = x.double() @ a.cuda().double().mT
        assert error(compiled(x), expected) < 1e-2
        with torch.autocast("cuda", B):
            assert error(model(x.float()), expected) < 1e-2
