"""SparseMatrix: what it takes and refuses, products, gradients, files; on the GPU the same through our kernels."""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.io
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import reorder
from gossamer.formats import FormatError
from gossamer.matrix import SparseMatrix, spmm
from gossamer.spmm import Csr, KernelError, Way, memory, model, registry
from gossamer.spmm.choice import Chooser

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random(m: int = 60, k: int = 90, density: float = 0.1) -> Tensor:
    return torch.randn(m, k) * (torch.rand(m, k) < density)


def assert_is(found: SparseMatrix, expected: Tensor) -> None:
    assert found.shape == tuple(expected.shape)
    assert torch.equal(found.torch().to_dense().cpu(), expected)


def test_every_kind_of_input_is_the_same_matrix() -> None:
    a = random()
    kinds = [a, a.to_sparse(), a.to_sparse_csr(), a.to_sparse_csc(), a.to_sparse_bsr((6, 9)), SparseMatrix(a)]
    kinds += [make(a.numpy()) for make in (scipy.sparse.coo_array, scipy.sparse.csr_matrix, scipy.sparse.csc_array)]
    kinds += [scipy.sparse.dia_array(a.numpy()), scipy.sparse.lil_array(a.numpy()), scipy.sparse.bsr_array(a.numpy())]
    for kind in kinds:
        assert_is(SparseMatrix(kind), a)


def test_disorder_is_put_in_order() -> None:
    index = torch.tensor([[2, 0, 0, 1, 0], [1, 3, 3, 0, 1]])
    a = torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0]), (3, 4))
    expected = torch.tensor([[0, 4.0, 0, 5], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert_is(SparseMatrix(a), expected)
    unsorted = scipy.sparse.csr_array((np.float32([2, 3, 4, 1]), [3, 3, 1, 1], [0, 3, 3, 4]), shape=(3, 4))
    assert_is(SparseMatrix(unsorted), expected)
    assert SparseMatrix(unsorted).nnz == 3 and SparseMatrix(a).nnz == 3


@pytest.mark.parametrize(("m", "k"), [(0, 0), (0, 5), (5, 0), (4, 6)])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_empty_matrices_and_no_columns(m: int, k: int, n: int, device: str) -> None:
    for precision in (None, "fp16") if device == "cuda" else (None,):
        found = SparseMatrix(torch.zeros(m, k), precision, device=device) @ torch.randn(k, n, device=device)
        assert torch.equal(found.cpu(), torch.zeros(m, n))
        found = SparseMatrix(torch.zeros(m, k), precision, device=device).T @ torch.randn(m, n, device=device)
        assert torch.equal(found.cpu(), torch.zeros(k, n))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_stay_in_their_rows(device: str) -> None:
    a, b = random(), torch.randn(90, 12)
    a[4, 40], a[50, 41] = math.nan, math.inf
    found = (SparseMatrix(a, device=device) @ b.to(device)).cpu()
    assert found[4].isnan().all() and found[50].isinf().all() and torch.equal(found[50].sign(), b[41].sign())
    rest = torch.ones(len(a), dtype=torch.bool)
    rest[[4, 50]] = False
    torch.testing.assert_close(found[rest], a[rest] @ b, rtol=1e-4, atol=1e-4)


def test_integers_and_bools_become_float32() -> None:
    a = torch.randint(0, 3, (20, 30))
    for kind in (a, a.bool(), scipy.sparse.csr_array(a.numpy())):
        found = SparseMatrix(kind)
        assert found.dtype == torch.float32 and found.torch().to_dense().count_nonzero() == a.count_nonzero()


def test_wrong_indices_are_refused() -> None:
    values = torch.ones(2)
    pointers, cols = torch.tensor([0, 1, 2]), torch.tensor([0, 7])
    outside = torch.sparse_csr_tensor(pointers, cols, values, (2, 3), check_invariants=False)
    with pytest.raises(FormatError, match="0 to 7 in a dimension of 3; fix"):
        SparseMatrix(outside)
    crooked = torch.sparse_csr_tensor(torch.tensor([0, 2, 1]), cols % 3, values, (2, 3), check_invariants=False)
    with pytest.raises(FormatError, match="ascend from 0 to 2"):
        SparseMatrix(crooked)
    negative = torch.sparse_coo_tensor(torch.tensor([[0, 1], [-1, 0]]), values, (2, 3), check_invariants=False)
    with pytest.raises(FormatError, match="-1 to 0 in a dimension of 3"):
        SparseMatrix(negative)
    bad = scipy.sparse.csr_array((np.ones(2), [0, 1], [0, 1, 2]), shape=(2, 3))
    bad.indices = np.array([0, 9], dtype=np.int32)
    with pytest.raises(FormatError, match="fix: check how it was built"):
        SparseMatrix(bad)


def test_what_is_no_matrix_is_refused() -> None:
    for wrong in ([1, 2], object(), torch.zeros(3), torch.zeros(2, 2, 2)):
        with pytest.raises(FormatError, match="fix: "):
            SparseMatrix(wrong)
    for wrong in (torch.eye(3) * 1j, scipy.sparse.csr_array(np.eye(3) * 1j)):
        with pytest.raises(FormatError, match="complex values are not multiplied; fix"):
            SparseMatrix(wrong)
    with pytest.raises(ValueError, match="fp32, tf32, fp16, bf16; fix"):
        SparseMatrix(random(), "int8")


def test_more_than_int32_counts() -> None:
    index = torch.tensor([[0, 1], [5, 2**31 + 5]])
    with pytest.raises(FormatError, match=r"columns: at most 2\^31 - 1 .* fix: cut"):
        SparseMatrix(torch.sparse_coo_tensor(index, torch.ones(2), (2, 2**31 + 9)))
    wide = torch.sparse_coo_tensor(index, torch.ones(2), (2, 2**31 + 9)).coalesce()
    assert SparseMatrix(wide.index_select(1, torch.tensor([5, 6]))).nnz == 1


def test_wrong_operands_are_refused() -> None:
    a = SparseMatrix(random())
    for wrong in (torch.randn(60, 2), torch.randn(2, 90, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="fix: reshape"):
            a @ wrong
    with pytest.raises(TypeError, match=r"B is ndarray, not a tensor; fix: torch.as_tensor"):
        a @ np.ones((90, 2))
    with pytest.raises(ValueError, match="fix: B.to"):
        a @ torch.randn(90, 2, device="meta")
    for wrong in (torch.ones(90, 2, dtype=torch.int64), torch.ones(90, 2) * 1j, torch.ones(90, dtype=torch.bool)):
        with pytest.raises(ValueError, match="fix: B.float"):
            a @ wrong


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' cannot be used: .*; fix: leave"):
        SparseMatrix(random(), device="cuda")


def test_a_matrix_larger_than_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.matrix.free_memory", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(torch.OutOfMemoryError, match="fix: multiply it in parts"):
        SparseMatrix(random(), device="cuda")


def test_fp16_overflow_warns() -> None:
    a = random()
    a[3, 4], a[5, 6] = 1e6, math.inf
    with pytest.warns(UserWarning, match="1e\\+06 become infinite in float16; fix"):
        SparseMatrix(a, "fp16")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 8, 17, 64])
def test_products_and_gradients(device: str, n: int) -> None:
    a = random(200, 150, 0.1)
    for make in (lambda: SparseMatrix(a, device=device), lambda: SparseMatrix(a, device=device, requires_grad=True)):
        sparse, dense = make(), a.clone().to(device).requires_grad_()
        b = torch.randn(150, n, device=device, requires_grad=True)
        b2 = b.detach().clone().requires_grad_()
        (sparse.T @ (sparse @ b).relu()).square().sum().backward()
        (dense.t() @ (dense @ b2).relu()).square().sum().backward()
        torch.testing.assert_close(b.grad, b2.grad, rtol=1e-3, atol=1e-2)
        if sparse.values.requires_grad:
            rows, cols = a.nonzero(as_tuple=True)
            torch.testing.assert_close(sparse.values.grad, dense.grad[rows, cols], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_values_that_change_are_seen(device: str) -> None:
    a = random(100, 80)
    sparse, b = SparseMatrix(a, device=device, requires_grad=True), torch.randn(80, 8, device=device)
    first = sparse @ b
    with torch.no_grad():
        sparse.values *= 2
    torch.testing.assert_close(sparse @ b, 2 * first)
    torch.testing.assert_close(sparse.T @ (first / 2), 2 * a.t().to(device) @ (first / 2), rtol=1e-4, atol=1e-4)


def test_double_precision_and_gradcheck() -> None:
    a = random(9, 7, 0.4).double()
    assert torch.autograd.gradcheck(lambda x: SparseMatrix(a) @ x, torch.randn(7, 2).double().requires_grad_())
    torch.testing.assert_close(
        SparseMatrix(a) @ torch.randn(7).double().clone(), torch.zeros(9).double(), rtol=0, atol=99
    )


@pytest.mark.parametrize("device", DEVICES)
def test_under_compile(device: str) -> None:
    sparse, b = SparseMatrix(random(), device=device), torch.randn(90, 8, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: sparse.T.mm(sparse.mm(x).relu()) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(b), sparse.T @ (sparse @ b).relu() + 1)
    compiled(b).sum().backward()
    assert b.grad is not None


def test_save_and_load(tmp_path: Path) -> None:
    a = random()
    a[0, 0], a[1, 1] = math.nan, math.inf
    SparseMatrix(a, "bf16").save(tmp_path / "a.safetensors")
    found = SparseMatrix(tmp_path / "a.safetensors")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.torch().to_dense().nan_to_num(7), a.bfloat16().nan_to_num(7))
    SparseMatrix(a, "tf32").save(tmp_path / "a.safetensors")
    assert SparseMatrix(tmp_path / "a.safetensors").precision == "tf32"
    assert SparseMatrix(tmp_path / "a.safetensors", "fp32").precision == "fp32"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_hold_no_matrix(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"a.safetensors is no safetensors file: .*; fix: write it with"):
        SparseMatrix(tmp_path / "a.safetensors")
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"holds no SparseMatrix; fix: write it with"):
        SparseMatrix(tmp_path / "b.safetensors")
    for foreign in ("{}", "no json", "[]", '{"format": "csr"}'):
        safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors", {"gossamer": foreign})
        with pytest.raises(FormatError, match=r"fix: write it with"):
            SparseMatrix(tmp_path / "b.safetensors")
    for missing in (tmp_path / "c.safetensors", str(tmp_path / "c.mtx"), tmp_path):
        with pytest.raises(FileNotFoundError, match="is no file; fix: give the path"):
            SparseMatrix(missing)
    for suffix, packed in ((".gz", gzip.compress(b"%" * 99)[:-9]), (".xz", b"no"), (".bz2", b"no")):
        (tmp_path / f"d.mtx{suffix}").write_bytes(packed)
        with pytest.raises(FormatError, match="it does not unpack: .*; fix: write it again"):
            SparseMatrix(tmp_path / f"d.mtx{suffix}")


def test_copies_stand_on_their_own() -> None:
    a = random()
    first = SparseMatrix(a, requires_grad=True)
    second, third = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    del first
    for found in (second, third):
        assert found.values.requires_grad
        torch.testing.assert_close(found @ torch.eye(90), a)


def test_a_trainable_copy_leaves_its_source_alone() -> None:
    a, given = random(), random().to_sparse_csr()
    first = SparseMatrix(a)
    second = SparseMatrix(first, requires_grad=True)
    (second @ torch.eye(90)).sum().backward()
    assert not first.values.requires_grad and second.values.grad is not None
    assert not SparseMatrix(second).values.requires_grad
    SparseMatrix(given, requires_grad=True)
    assert not given.values().requires_grad


@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 9), k=st.integers(1, 9), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_matrix_market_round_trip(tmp_path_factory, m: int, k: int, symmetric: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator) * (torch.rand(m, k, generator=generator) < 0.4)
    if symmetric:
        a = torch.zeros(k, k) if m != k else a + a.t()
    path = tmp_path_factory.mktemp("market") / "a.mtx"
    scipy.io.mmwrite(path, scipy.sparse.coo_array(a.numpy()), symmetry="symmetric" if symmetric else "general")
    torch.testing.assert_close(SparseMatrix(path).torch().to_dense(), a)


MARKET = "%%MatrixMarket matrix coordinate real general\n% said\n2 3 2\n1 1 5\n2 3 -1.5\n"


def test_matrix_market_files_read(tmp_path: Path) -> None:
    (tmp_path / "a.mtx").write_text(MARKET)
    assert_is(SparseMatrix(tmp_path / "a.mtx"), torch.tensor([[5.0, 0, 0], [0, 0, -1.5]]))
    (tmp_path / "a.mtx").write_text(MARKET.replace("real", "pattern").replace(" 5\n", "\n").replace(" -1.5", ""))
    assert_is(SparseMatrix(str(tmp_path / "a.mtx")), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    (tmp_path / "a.mtx").write_text("%%MatrixMarket matrix coordinate integer skew-symmetric\n2 2 1\n2 1 3\n")
    assert_is(SparseMatrix(tmp_path / "a.mtx"), torch.tensor([[0.0, -3], [3, 0]]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "first line"),
        ("1 2 3\n", "first line"),
        (MARKET.replace("real", "complex"), "'coordinate complex general' is not read"),
        (MARKET.replace("coordinate", "array"), "is not read"),
        ("%%MatrixMarket matrix coordinate real general\n% only this", "ends before"),
        (MARKET.replace("2 3 2", "2 3"), "ROWS COLUMNS ENTRIES"),
        (MARKET.replace("2 3 2", "2 -3 2"), "negative"),
        (MARKET.replace("2 3 2", "2 3 9"), "promises 9 entries"),
        (MARKET.replace("2 3 -1.5", "2 4 -1.5"), "entry 2 has column 4, outside 1 to 3"),
        (MARKET.replace("1 1 5", "0 1 5"), "entry 1 has row 0"),
        (MARKET.replace("1 1 5", "1.5 1 5"), "entry 1 has row 1.5"),
        (MARKET.replace("1 1 5", "1 1 x"), "not 3 numbers"),
        (MARKET.replace("1 1 5", "1 1"), "not 3 numbers"),
    ],
)
def test_malformed_matrix_market(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.mtx").write_text(text)
    with pytest.raises(FormatError, match=f"a.mtx: .*{said}(.|\n)*fix: write it again"):
        SparseMatrix(tmp_path / "a.mtx")


def test_explain_says_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    text = SparseMatrix(random(), reorder=False).explain(8, 128)
    assert "60 x 90" in text and "N = 8: " in text and "N = 128: " in text and "predicted" in text
    sparse = SparseMatrix(random())
    assert "measured" in sparse.prepare(8, measure=True).explain(8)
    assert sparse.way(8).kernel in registry


def test_message_passing_keeps_what_it_made() -> None:
    a, x = random(50, 50).to_sparse_csr(), torch.randn(50, 4)
    torch.testing.assert_close(spmm(a, x), a.to_dense() @ x)
    assert a._gossamer is (spmm(a, x), a._gossamer)[1]
    torch.testing.assert_close(spmm(SparseMatrix(a), x), a.to_dense() @ x)


def test_nothing_runs_half_precision_on_the_cpu() -> None:
    chooser = Chooser(Csr.of(torch.zeros(20000, 20000).to_sparse().to(torch.float16)), False, False, False)
    with pytest.raises(KernelError, match="fix: use precision='fp32'"):
        chooser.way(8)


def test_orders_are_permutations_and_find_shuffled_blocks() -> None:
    rows = torch.arange(2048).repeat_interleave(64)
    cols = rows // 64 * 64 + torch.arange(64).repeat(2048)
    keep = torch.rand(len(rows)) < 0.6
    shuffled = torch.randperm(2048)
    index = torch.stack([shuffled[rows[keep]], cols[keep]])
    a = Csr.of(torch.sparse_coo_tensor(index, torch.ones(index.shape[1]), (2048, 2048)))
    for order in (reorder.by_signature(a), reorder.by_length(a), reorder.by_bandwidth(a)):
        assert torch.equal(order.sort().values, torch.arange(2048))
    assert reorder.gathered(a, reorder.by_signature(a))[32][0] < 0.1 * reorder.gathered(a)[32][0]
    assert reorder.worthwhile(a) is not None
    assert reorder.worthwhile(Csr.of(random(300, 300))) is None


def test_gathered_counts_what_windows_fetch() -> None:
    a = random(100, 70)
    order = torch.randperm(100)
    for by, matrix in ((None, a), (order, a[order])):
        found = reorder.gathered(Csr.of(a), by)
        for height, (vectors, groups) in found.items():
            used = [(w != 0).any(0).sum().item() for w in matrix.split(height)]
            assert vectors == sum(used) and groups == sum(-(-u // 16) for u in used)


def test_shared_is_what_windows_of_8_save() -> None:
    a = random(100, 70)
    fetched = sum((w != 0).any(0).sum().item() for w in a.split(8))
    assert reorder.shared(Csr.of(a)) == pytest.approx(1 - fetched / a.count_nonzero().item())
    assert reorder.shared(Csr.of(torch.ones(16, 5))) == 1 - 1 / 8 and reorder.shared(Csr.of(torch.eye(20))) == 0
    assert reorder.shared(Csr.of(torch.zeros(0, 5))) == 0


def test_reverse_cuthill_mckee_needs_a_square() -> None:
    with pytest.raises(ValueError, match="fix: use by_signature"):
        reorder.by_bandwidth(Csr.of(random()))


def test_predictions_grow_with_the_work() -> None:
    few, many = (
        model.Stats((10**4, 10**4), z, 20, 10**4, {h: (z, z // 8) for h in (8, 16, 32)}) for z in (10**5, 10**7)
    )
    for kernel in ("cuda_windows", "cuda_rows", "dense"):
        ways = registry[kernel].ways(Csr.of(torch.ones(4, 4).half()), False)
        for way in ways:
            assert model.microseconds(way, few, 512, 2) >= model.microseconds(way, few, 8, 2)
            assert model.microseconds(way, many, 128, 2) >= model.microseconds(way, few, 128, 2)


@pytest.mark.gpu
def test_everything_in_a_cuda_graph() -> None:
    a, b = SparseMatrix(random(500, 400), "fp16", device="cuda"), torch.randn(400, 64, device="cuda").half()
    a @ b
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = a @ b
    b.normal_()
    graph.replay()
    assert torch.equal(out, a @ b)


@pytest.mark.gpu
@pytest.mark.parametrize("measure", [True, False, None])
def test_a_width_that_is_not_packed_cannot_be_captured(measure: bool | None) -> None:
    a, b = SparseMatrix(random(500, 400), device="cuda", measure=measure), torch.randn(400, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(KernelError, match=r"fix: make one such product, or call prepare\(64\)"),
        torch.cuda.graph(graph),
    ):
        a @ b
    torch.testing.assert_close(a @ b, a.torch() @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_default_is_checked_against_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    a, b = random(2000, 3000, 0.2).cuda(), torch.randn(3000, 40, device="cuda")
    before = torch.cuda.get_rng_state()
    for precision in ("fp16", "fp32"):
        sparse = SparseMatrix(a, precision)
        expected = a.double() @ b.double()
        assert float((sparse @ b - expected).norm() / expected.norm()) < 2e-3
        times = sparse._side(False).chooser._times[64]
        assert len(times) > 1 and 0 < min(times.values()) < 1e5 and sparse.way(40) == min(times, key=lambda w: times[w])
    assert torch.equal(before, torch.cuda.get_rng_state()), "it drew from the user's random numbers"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_precisions(precision: str) -> None:
    a, b = random(700, 900, 0.05).cuda(), torch.randn(900, 40, device="cuda")
    sparse = SparseMatrix(a, precision)
    found, expected = sparse.prepare(40, measure=True) @ b, a.double() @ b.double()
    bound = {"fp16": 2e-3, "bf16": 8e-3, "tf32": 1e-3, "fp32": 1e-5}[precision]
    assert found.dtype == torch.float32 and float((found - expected).norm() / expected.norm()) < bound
    for way in sparse._side(False).chooser.ways:
        packed = sparse._side(False).chooser.packed(40, way)
        out = way.own.run(b.to(sparse.dtype), packed.tensors, packed.meta)
        assert float((out - expected).norm() / expected.norm()) < bound, way


def test_what_does_not_repeat_itself_is_left_out() -> None:
    cusparse, short, long = registry["cusparse"], Csr.of(torch.ones(3, 481)), Csr.of(torch.ones(3, 482))
    assert [str(w) for w in cusparse.ways(short, False)] == ["cusparse[alg=3]"]
    assert cusparse.ways(long, True) == []
    assert [str(w) for w in cusparse.ways(long, False, False)] == ["cusparse[alg=2]", "cusparse[alg=3]"]
    for loose in (True, False):
        assert [str(w) for w in cusparse.ways(long.to(dtype=torch.float16), False, not loose)] == ["cusparse[alg=3]"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_two_runs_agree(precision: str) -> None:
    a, b = torch.randn(300, 4000) * (torch.rand(300, 4000) < 0.3), torch.randn(4000, 64, device="cuda")
    sparse = SparseMatrix(a, precision, device="cuda")
    chooser = sparse._side(False).chooser
    for way in chooser.ways:
        packed = chooser.packed(64, way)
        first, second = (way.own.run(b.to(sparse.dtype), packed.tensors, packed.meta) for _ in range(2))
        assert torch.equal(first, second), way


@pytest.mark.gpu
def test_save_from_the_gpu_and_moving() -> None:
    a, buffer = SparseMatrix(random(), device="cuda"), io.BytesIO()
    torch.save(a.to("cpu").torch(), buffer)
    assert torch.equal(a.to("cpu").torch().to_dense(), a.torch().to_dense().cpu())


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    a, b = random(), torch.randn(90, 8)
    torch.testing.assert_close(SparseMatrix(a, measure=True) @ b, a @ b)
    (kept,) = (tmp_path / "spmm").iterdir()
    times = json.loads(kept.read_text())["8"]
    assert times.keys() == {"dense", "vendor"} and min(times.values()) > 0
    for slow in times:
        kept.write_text(json.dumps({"8": {way: 9.0 if way == slow else 1.0 for way in times}}))
        monkeypatch.setattr("gossamer.timing.race", lambda *_: pytest.fail("measured again"))
        for again in (SparseMatrix(a).prepare(8, measure=True), SparseMatrix(a), SparseMatrix(a, measure=True)):
            assert str(again.way(8)) != slow and "measured us" in again.explain(8)
    kept.write_text("broken")
    monkeypatch.undo()
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "spmm" / kept.name / "no folder"))
    SparseMatrix(a, measure=True) @ b


def rivals_on_the_cpu(monkeypatch: pytest.MonkeyPatch, winner: str) -> list[dict]:
    """Races between what is predicted alike are won by `winner`; the result lists them."""
    races = []

    def duel(runners: dict, device: torch.device) -> dict[str, float]:
        races.append(runners)
        return {name: 1.0 if name == winner else 2.0 for name in runners}

    monkeypatch.setattr("gossamer.spmm.duel.duel", duel)
    monkeypatch.setattr(Chooser, "_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("gossamer.spmm.model.microseconds", lambda way, *_: 3.0 if way.kernel == "dense" else 2.0)
    return races


@pytest.mark.parametrize("winner", ["dense", "vendor"])
def test_the_default_is_a_race_with_the_library(monkeypatch, tmp_path: Path, winner: str) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    a, b, state = random(), torch.randn(90, 7), torch.get_rng_state()
    races, sparse = rivals_on_the_cpu(monkeypatch, winner), SparseMatrix(a)
    torch.testing.assert_close(sparse @ b, a @ b)
    assert str(sparse.way(8)) == winner and [set(r) for r in races] == [{"dense", "vendor"}]
    assert [str(w) for _, w in sparse._side(False).chooser._packed] == [winner], "the loser stays packed"
    assert str(SparseMatrix(a).way(8)) == winner and len(races) == 1, "raced again"
    assert str(SparseMatrix(a, measure=False).way(8)) == "vendor" and torch.equal(state, torch.get_rng_state())
    sparse.prepare(8, measure=True)  # by the long race, whoever wins it
    assert "measured" in sparse.explain(8) and len(races) == 1


def test_the_default_races_with_nobody_who_is_far_behind(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    races = rivals_on_the_cpu(monkeypatch, "dense")
    monkeypatch.setattr("gossamer.spmm.model.microseconds", lambda way, *_: 7.0 if way.kernel == "dense" else 2.0)
    assert str(SparseMatrix(random()).way(8)) == "vendor" and not races


def test_a_race_is_between_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of each of our kernels, one of each of the library's, as far as they come near the pick."""
    rows, windows = (
        [Way(k, ((knob, i),)) for i in range(3)] for k, knob in (("cuda_rows", "unroll"), ("cuda_windows", "rows"))
    )
    library = [Way("cusparse", ((knob, i),)) for knob, i in (("alg", 3), ("alg", 2), ("ell", 32))]
    times = [1.0, 1.1, 1.2, 1.2, 1.3, 1.4, 2.8, 2.9, 2.9, 3.1]
    predicted = dict(zip([*rows, *windows, *library, Way("dense")], times, strict=True))
    monkeypatch.setattr(Chooser, "predicted", lambda self, n: predicted)
    found = Chooser(Csr.of(random()), False, False, False)._rivals(8)
    assert found == [rows[0], rows[1], windows[0], library[0], library[2]]


def test_the_default_predicts_where_nothing_can_be_tried(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    races = rivals_on_the_cpu(monkeypatch, "dense")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "randn", full)
    assert str(SparseMatrix(torch.eye(5)).way(8)) == "vendor" and not races
    monkeypatch.undo()
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    races = rivals_on_the_cpu(monkeypatch, "dense")
    for kernel in ("dense", "vendor"):
        monkeypatch.setattr(registry[kernel], "pack", full)
    assert str(SparseMatrix(torch.eye(5)).way(8)) == "vendor" and not races


def test_nothing_is_packed_while_a_graph_is_captured(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    a, b = random(), torch.randn(90, 40)
    rivals_on_the_cpu(monkeypatch, "vendor")
    sparse = SparseMatrix(a).prepare(64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    torch.testing.assert_close(sparse @ b, a @ b)
    for call in (lambda: sparse @ b[:, :8], lambda: sparse.T @ torch.randn(60, 40), lambda: sparse.prepare(8)):
        with pytest.raises(KernelError, match="fix: make one such product, or call prepare"):
            call()


def test_patterns_have_digests_of_their_own() -> None:
    a = random(20, 30, 0.2)
    found = {tuple(memory.digest(Csr.of(x))) for x in (a, a.t(), a.roll(1, 0), a.roll(1, 1), a * (a != a[a != 0][0]))}
    assert len(found) == 5 and memory.digest(Csr.of(2 * a)) == memory.digest(Csr.of(a))


def test_values_that_are_edited_are_packed_again() -> None:
    a, b = SparseMatrix(torch.randn(20, 30).relu()), torch.randn(30, 3)
    before = a @ b, a.T @ torch.ones(20, 1)
    a.values.mul_(3)
    torch.testing.assert_close(a @ b, 3 * before[0])
    torch.testing.assert_close(a.T @ torch.ones(20, 1), 3 * before[1])


def test_derivatives_that_it_does_not_have_are_refused() -> None:
    a, b = SparseMatrix(torch.randn(20, 30).relu()), torch.randn(30, 3)
    for derive in (
        lambda: torch.func.jvp(lambda b: a @ b, (b,), (b,)),
        lambda: torch.func.grad(lambda b: (a @ b).sum())(b),
        lambda: torch.func.grad(lambda b: torch.vmap(lambda c: a @ c)(b).sum())(b.expand(2, -1, -1)),
    ):
        with pytest.raises(NotImplementedError, match="fix: use torch.autograd"):
            derive()
    found = torch.vmap(lambda c: a @ c)(b.expand(2, -1, -1))
    torch.testing.assert_close(found[1], a @ b)
