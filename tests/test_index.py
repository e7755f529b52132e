"""The inverted index against brute force, to the bit, on every instruction set of this CPU."""

import copy
import errno
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.retrieval import storage, tuning
from gossamer.retrieval.grouping import Groups
from gossamer.retrieval.index import Hits, SparseIndex
from gossamer.retrieval.native import require
from gossamer.retrieval.part import Part
from gossamer.retrieval.rows import as_rows
from gossamer.retrieval.storage import IndexFileError
from gossamer.retrieval.tuning import Setting, recall

ISAS = require().isas()
RANGE = 16384


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = require().isa()
    require().set_isa(request.param)
    yield request.param
    require().set_isa(before)


def brute(docs: sp.csr_matrix, queries: sp.csr_matrix, k: int, ids: np.ndarray | None = None) -> Hits:
    """float32 products added in ascending order of dimension; ties to the lower id."""
    ids = np.arange(docs.shape[0]) if ids is None else ids
    used, renamed = np.unique(np.concatenate([docs.indices, queries.indices]), return_inverse=True)
    docs = sp.csr_matrix((docs.data, renamed[: docs.nnz], docs.indptr), (docs.shape[0], len(used)))
    queries = sp.csr_matrix((queries.data, renamed[docs.nnz :], queries.indptr), (queries.shape[0], len(used)))
    columns = docs.tocsc()
    columns.sort_indices()
    scores = np.zeros((queries.shape[0], docs.shape[0]), np.float32)
    for q in range(queries.shape[0]):
        row = queries[q].tocsr()
        row.sort_indices()
        for j, w in zip(row.indices, row.data, strict=True):
            at = slice(columns.indptr[j], columns.indptr[j + 1])
            scores[q, columns.indices[at]] += np.float32(w) * columns.data[at].astype(np.float32)
    best = np.stack([np.lexsort((ids, -s))[:k] for s in scores]) if len(scores) else np.empty((0, k), np.int64)
    return Hits(np.take_along_axis(scores, best, 1), ids[best])


def same(got: Hits, want: Hits) -> None:
    k = want.ids.shape[1]
    np.testing.assert_array_equal(got.ids[:, :k], want.ids)
    np.testing.assert_array_equal(got.scores[:, :k], want.scores)
    assert (got.ids[:, k:] == -1).all() and (got.scores[:, k:] == -np.inf).all()


def random_rows(
    n: int, dim: int, nnz: float, seed: int = 0, signed: bool = False, common: bool = False
) -> sp.csr_matrix:
    """Some empty rows; common: a few columns that most rows have."""
    rng = np.random.default_rng(seed)
    x = sp.random(n, dim, min(1.0, nnz / dim), format="csr", dtype=np.float32, random_state=rng)
    x.data[:] = rng.standard_normal(x.nnz) if signed else rng.gamma(2.0, 1.0, x.nnz) + 0.01
    if common:
        extra = sp.random(n, 3, 0.7, format="csc", dtype=np.float32, random_state=rng)
        x = sp.hstack([extra, x[:, 3:]], format="csr")
    return sp.csr_matrix(x)


CASES = {
    "small": dict(n=300, dim=50, nnz=8),
    "signed": dict(n=3000, dim=200, nnz=20, signed=True),
    "several ranges": dict(n=2 * RANGE + 77, dim=300, nnz=12),
    "dense columns": dict(n=RANGE + 500, dim=100, nnz=6, common=True),
    "signed dense columns": dict(n=RANGE + 5, dim=60, nnz=6, common=True, signed=True),
    "few columns in use": dict(n=500, dim=3_000_000_000, nnz=10),
    "more than 65,536 columns": dict(n=30_000, dim=200_000, nnz=6),
    "one document": dict(n=1, dim=9, nnz=9),
    "one column": dict(n=100, dim=1, nnz=1),
}


def wide(n: int, dim: int, nnz: int, seed: int) -> sp.csr_matrix:
    """scipy.sparse.random keeps too many columns in mind: a few, anywhere."""
    rng = np.random.default_rng(seed)
    columns = np.sort(rng.choice(np.linspace(0, dim - 1, 4 * nnz).astype(np.int64), (n, nnz)), 1)
    x = sp.csr_matrix((rng.random(n * nnz).astype(np.float32), columns.ravel(), np.arange(n + 1) * nnz), shape=(n, dim))
    x.sum_duplicates()
    return x


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_exact_is_brute_force(isa: str, case: str, threads: int) -> None:
    make = wide if CASES[case]["dim"] > 10**6 else random_rows
    docs = make(**CASES[case], seed=1)
    spec = CASES[case] | {"n": 12}
    queries = make(**spec, seed=2)
    index = SparseIndex.build(docs, threads=threads)
    for k in (1, 10, 400):
        same(index.search(queries, k, threads=threads), brute(docs, queries, min(k, docs.shape[0])))
    if threads == 3:
        same(index.search(queries[:1], 7, threads=3), brute(docs, queries[:1], min(7, docs.shape[0])))


@given(
    st.integers(1, 90), st.integers(1, 60), st.floats(0, 1), st.integers(1, 100), st.booleans(), st.integers(0, 2**31)
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape(n: int, dim: int, density: float, k: int, signed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Small integers: many ties, and sums that cancel to zero.
    dense = np.where(rng.random((n, dim)) < density, rng.integers(-2 * signed, 4, (n, dim)), 0).astype(np.float32)
    docs, queries = sp.csr_matrix(dense), sp.csr_matrix(dense[rng.integers(0, n, 4)])
    ids = rng.permutation(5 * n)[:n]
    index = SparseIndex.build(docs, ids=ids)
    same(index.search(queries, k), brute(docs, queries, min(k, n), ids))


@pytest.mark.parametrize("signed", [False, True])
def test_light_terms_are_left_out(isa: str, signed: bool) -> None:
    """Clusters give a high bar early: later ranges need the heavy terms only; filters and deletes still hold."""
    rng = np.random.default_rng(0)
    centres = random_rows(60, 90, 24, seed=1, signed=signed)
    docs = (
        centres[rng.integers(0, 60, 3 * RANGE)]
        .multiply(1 + 0.2 * rng.random((3 * RANGE, 1)))
        .tocsr()
        .astype(np.float32)
    )
    index, queries = SparseIndex.build(docs), centres[:8]
    for k in (1, 30):
        same(index.search(queries, k, threads=1), brute(docs, queries, k))
    chosen = rng.random(3 * RANGE) < 0.5
    index.delete(np.flatnonzero(~chosen)[::2])
    same(index.search(queries, 9, filter=chosen, threads=2), brute(docs[chosen], queries, 9, np.flatnonzero(chosen)))
    rows, out = as_rows(queries).tidy(), (np.empty((8, 9), np.float32), np.empty((8, 9), np.int64))
    whole = SparseIndex.build(docs)
    targets = [p.target(None) for p in whole._parts]
    native = [a.ctypes.data for a in out]
    scored, ranges, complete = require().search(targets, 8, *rows.pointers(), 9, True, 1.0, 0, 0.0, 0, 1, *native)
    assert scored > 8 * 9 and ranges == 8 * 3 and complete == 0


def search_natively(docs: sp.csr_matrix, queries: sp.csr_matrix, k: int) -> tuple[int, int, int]:
    """Documents scored, ranges read, queries scored completely, by a thread that has searched nothing before."""
    index = SparseIndex.build(docs)
    targets = [p.target(None) for p in index._parts]
    n, rows = queries.shape[0], as_rows(queries).tidy()
    out = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    native = [a.ctypes.data for a in out]
    with ThreadPoolExecutor(1) as pool:
        search = require().search
        work = pool.submit(search, targets, n, *rows.pointers(), k, True, 1.0, 0, 0.0, 0, 1, *native).result()
    same(Hits(*out), brute(docs, queries, k))
    return work


def long_tailed(n: int, seed: int, signed: bool) -> sp.csr_matrix:
    """Frequent columns and rare ones, a few large values among many small ones."""
    rng = np.random.default_rng(seed)
    columns = (150 * rng.random((n, 25)) ** 2).astype(np.int32)
    values = rng.lognormal(0, 1.2, columns.shape).astype(np.float32)
    values *= np.where(rng.random(columns.shape) < 0.3, -1, 1) if signed else 1
    x = sp.csr_matrix((values.ravel(), columns.ravel(), np.arange(n + 1) * 25), shape=(n, 150))
    x.sum_duplicates()
    return x


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("order", ["any", "best first", "best last"])
def test_small_impacts_are_left_unread(isa: str, signed: bool, order: str) -> None:
    """Documents are scored that what was left unread could lift; the best may lie anywhere."""
    docs, queries = long_tailed(3 * RANGE + 900, 1, signed), long_tailed(1, 2, signed)
    if order != "any":
        by = np.argsort((docs @ queries.T).toarray()[:, 0])
        docs = docs[by if order == "best last" else by[::-1]]
    assert search_natively(docs, queries, 10)[2] == 0
    scored, _, complete = search_natively(docs, long_tailed(6, 3, signed), 10)
    assert complete == 0 and (scored > 6 * 10 or order != "any")


def test_hopes_that_fail_are_made_good(isa: str) -> None:
    """The best documents lie in the first range, but the tenth is far below the first few."""
    docs = long_tailed(4 * RANGE, 1, False)
    query = docs[7]
    scores = (docs @ query.T).toarray()[:, 0]
    best = np.argsort(-scores)[:40]
    order = np.concatenate([best[:9], np.setdiff1d(np.arange(docs.shape[0]), best[:9])])
    _, ranges, complete = search_natively(docs[order], query, 10)
    assert ranges > 4 and complete == 0


def test_values_of_any_size() -> None:
    docs = random_rows(4000, 80, 10, signed=True)
    for scale in (1e-42, 1e-30, 1e-12, 1e12):
        scaled = sp.csr_matrix((docs.data * np.float32(scale), docs.indices, docs.indptr), docs.shape)
        scaled.eliminate_zeros()
        same(SparseIndex.build(scaled).search(docs[:9], 10), brute(scaled, docs[:9], 10))


def test_one_huge_document() -> None:
    """It must not hide the others behind the rounding of its own size."""
    docs = random_rows(2 * RANGE, 100, 10).tolil()
    docs[17, 3] = 1e9
    docs, queries = docs.tocsr(), random_rows(10, 100, 20, seed=5)
    same(SparseIndex.build(docs).search(queries, 10), brute(docs, queries, 10))


def test_rows_longer_than_the_accumulators_bear() -> None:
    docs = sp.csr_matrix(np.random.default_rng(0).random((20, 20_000), np.float32))
    queries = sp.csr_matrix(np.random.default_rng(1).random((3, 20_000), np.float32))
    same(SparseIndex.build(docs).search(queries, 5), brute(docs, queries, 5))


def test_a_query_with_every_column() -> None:
    docs = random_rows(20_000, 700, 15)
    queries = sp.csr_matrix(np.random.default_rng(0).random((4, 700), np.float32))
    same(SparseIndex.build(docs).search(queries, 10), brute(docs, queries, 10))


def test_empty() -> None:
    docs = random_rows(50, 30, 4)
    nothing = sp.csr_matrix((3, 30), dtype=np.float32)
    same(SparseIndex.build(docs).search(nothing, 5), brute(docs, nothing, 5))
    same(
        SparseIndex.build(sp.csr_matrix((40, 30), dtype=np.float32)).search(docs[:4], 5),
        brute(docs[:40] * 0, docs[:4], 5),
    )
    empty = SparseIndex(30)
    assert len(empty) == 0 and (empty.search(docs[:2], 4).ids == -1).all()
    assert empty.search(docs[:0], 4).ids.shape == (0, 4)
    assert (empty.search(docs[:2], 4, recall=0.9).ids == -1).all()
    assert empty.stats()["documents"] == 0
    assert len(SparseIndex.build(iter([]), dim=5)) == 0


def test_accepts_what_people_have() -> None:
    docs = random_rows(60, 40, 5)
    want = brute(docs, docs[:5], 4)
    dense = torch.from_numpy(docs.toarray())
    shuffled = docs.copy()
    for i in range(60):
        row = slice(docs.indptr[i], docs.indptr[i + 1])
        shuffled.indices[row], shuffled.data[row] = docs.indices[row][::-1], docs.data[row][::-1]
    triple = (docs.indptr.tolist(), docs.indices.tolist(), docs.data.tolist())
    sources = [docs.tocoo(), docs.tocsc(), dense, dense.to_sparse(), dense.to_sparse_csr(), docs.toarray(), shuffled]
    sources += [docs.astype(np.float64), sp.csr_array(docs), as_rows(docs), as_rows(triple, 40)]
    for source in sources:
        same(SparseIndex.build(source).search(source if hasattr(source, "shape") else docs, 4), brute(docs, docs, 4))
    same(
        SparseIndex.build(docs).search(
            (docs.indptr[:6], docs.indices[: docs.indptr[5]], docs.data[: docs.indptr[5]]), 4
        ),
        want,
    )
    same(SparseIndex.build(docs).search(dense[3], 4), brute(docs, docs[3:4], 4))
    same(SparseIndex.build(iter([docs[:10], docs[10:11], docs[11:]])).search(docs[:5], 4), want)


def test_zeros_are_dropped() -> None:
    index = SparseIndex.build(([0, 2, 3], [1, 4, 0], [0.0, 2.0, -0.0]), dim=6)
    assert index.stats()["nnz_per_document"] == 0.5


@pytest.mark.parametrize(
    ("triple", "message"),
    [
        (([0, 1], [0], [np.nan]), "row 0.*NaN"),
        (([0, 1], [0], [-np.inf]), "row 0.*infinite"),
        (([0, 1], [0], [1e300]), "row 0.*infinite"),
        (([0, 1], [0], [1e17]), "row 0.*scale the embeddings"),
        (([0, 0, 1], [-1], [1.0]), "row 1.*negative"),
        (([0, 0, 1], [6], [1.0]), "row 1.*not below the dimension"),
        (([0, 2], [3, 3], [1.0, 1.0]), "row 0.*sum_duplicates"),
        (([0, 3], [3, 1, 3], [1.0, 1.0, 1.0]), "row 0.*twice"),
        (([0, 2, 1], [1, 2], [1.0, 1.0]), "from 0 to 2"),
        (([0, 2, 1, 2], [1, 2], [1.0, 1.0]), "row 1.*ascend"),
        (([0, 9], [1], [1.0]), "from 0 to 1"),
        (([1, 1], [1], [1.0]), "from 0 to 1"),
        (([0, 1], [1.5], [1.0]), "integers"),
        (([0, 1], [1], ["a"]), "real numbers"),
        (([], [], []), "vectors"),
        (([0, 1], [1]), "2 parts"),
    ],
)
def test_bad_rows_are_refused(triple: tuple, message: str) -> None:
    index = SparseIndex.build(random_rows(20, 6, 3))
    with pytest.raises(ValueError, match=message):
        SparseIndex.build(triple, dim=6)
    with pytest.raises(ValueError, match=message):
        index.search(triple)
    with pytest.raises(ValueError, match=message):
        index.add(triple)
    assert len(index) == 20


def test_wrong_arguments_are_refused() -> None:
    docs = random_rows(20, 6, 3)
    index = SparseIndex.build(docs)
    for call, message in [
        (lambda: index.search(random_rows(1, 7, 3)), "7 dimensions.*has 6"),
        (lambda: index.search(docs, 0), "at least one"),
        (lambda: index.search(docs, recall=1.5), "recall"),
        (lambda: index.search(docs, threads=-1), "threads"),
        (lambda: index.add(docs, [0] * 20), "twice"),
        (lambda: index.add(docs, [0, 1]), "2 ids for 20"),
        (lambda: index.add(docs[:1], [-4]), "negative"),
        (lambda: index.add(docs[:1], [5]), "replace=True"),
        (lambda: index.add(docs[:1], [0.5]), "integers"),
        (lambda: index.save(), "pass a path"),
        (lambda: SparseIndex.build(docs, ids=[1, 2, 3]), "give one for each"),
        (lambda: SparseIndex.build(([0], [], [])), "pass dim="),
        (lambda: SparseIndex(0), "dim"),
        (lambda: SparseIndex.build(docs, values=False).search(docs), "no exact values: ask for a recall"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("many", [True, False], ids=["most", "few"])
def test_filters(isa: str, many: bool) -> None:
    docs, queries = random_rows(RANGE + 3000, 60, 8), random_rows(6, 60, 12, seed=3)
    ids = np.random.default_rng(0).permutation(50_000)[: docs.shape[0]]
    for given_ids in (None, ids):
        index = SparseIndex.build(docs, ids=given_ids)
        own = np.arange(docs.shape[0]) if given_ids is None else ids
        chosen = np.random.default_rng(1).random(len(own)) < (0.9 if many else 0.002)
        want = brute(docs[chosen], queries, 10, own[chosen])
        mask = np.zeros(50_000, bool)
        mask[own[chosen]] = True
        same(index.search(queries, 10, filter=own[chosen]), want)
        same(index.search(queries, 10, filter=mask), want)
        same(index.search(queries, 10, filter=np.append(own[chosen], [10**9, own[chosen][0]])), want)
        same(index.search(queries, 10, filter=mask[: own[chosen].max() + 1]), want)
        assert (index.search(queries, 10, filter=[]).ids == -1).all()
        assert (index.search(queries, 10, filter=np.zeros(0, bool)).ids == -1).all()
        same(index.search(queries, 10, filter=np.ones(60_000, bool)), index.search(queries, 10))
        assert set(index.search(queries, 3, filter=[own[5]]).ids.ravel()) == {own[5], -1}


def test_add_delete_merge_reopen(tmp_path: Path) -> None:
    """A random life of an index; after each step it equals brute force over what should be in it."""
    rng = np.random.default_rng(0)
    pool, queries = random_rows(6000, 90, 9, signed=True), random_rows(5, 90, 14, seed=8, signed=True)
    index, content, path = SparseIndex(90), {}, tmp_path / "life.gsx"
    for step in range(40):
        what = rng.integers(0, 8)
        some = rng.integers(0, 6000, rng.integers(0, 300))
        if what < 4:
            ids = None if what < 2 else rng.permutation(20_000)[: len(some)]
            ids = index.add(pool[some], ids, replace=ids is not None)
            content |= dict(zip(ids.tolist(), some.tolist(), strict=True))
        elif what < 6 and content:
            gone = rng.choice(list(content), min(len(content), len(some)))
            assert index.delete(gone) == len(set(gone.tolist()))
            content = {i: row for i, row in content.items() if i not in set(gone.tolist())}
        elif what == 6:
            index.merge()
            assert index.stats()["deleted"] == 0
        else:
            index.save(path)
            index = SparseIndex.open(path, load=bool(step % 2))
        assert len(index) == len(content)
        if content and step % 3 == 0:
            ids, rows = np.array(list(content)), np.array(list(content.values()))
            same(index.search(queries, 12), brute(pool[rows], queries, min(12, len(ids)), ids))
    order = np.argsort(ids := np.array(list(content)))
    rows, stored = index.rows()
    by_id = np.argsort(stored)
    assert (stored[by_id] == ids[order]).all()
    back = sp.csr_matrix((rows.values, rows.columns, rows.starts), (len(rows), 90))[by_id]
    assert (back != pool[np.array(list(content.values()))[order]]).nnz == 0


def test_many_appends_stay_few_parts() -> None:
    docs = random_rows(3000, 50, 6)
    index = SparseIndex(50)
    for i in range(0, 3000, 20):
        index.add(docs[i : i + 20])
    assert index.stats()["parts"] < 20
    same(index.search(docs[:5], 10), brute(docs, docs[:5], 10))


def test_searches_while_others_append() -> None:
    docs, queries = random_rows(5000, 60, 8), random_rows(3, 60, 12, seed=4)
    index = SparseIndex.build(docs[:1000])
    known = {n: brute(docs[:n], queries, 10) for n in range(1000, 5001, 500)}
    wrong, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            low = len(index)
            got = index.search(queries, 10, threads=2)
            if not any(np.array_equal(got.ids, known[n].ids) for n in known if low <= n <= len(index)):
                wrong.append(got)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(1000, 5000, 500):
        index.add(docs[n : n + 500])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_rows_by_id() -> None:
    docs = random_rows(40, 30, 5)
    rows, ids = SparseIndex.build(docs, ids=np.arange(40)[::-1].copy()).rows([3, 39])
    assert sorted(ids) == [3, 39]
    same(SparseIndex.build(docs).search(rows, 1), brute(docs, docs[[39 - i for i in ids]], 1))


def test_approximate_search_is_as_good_as_it_says() -> None:
    docs, queries = random_rows(RANGE + 4000, 400, 24), random_rows(150, 400, 24, seed=6)
    index = SparseIndex.build(docs)
    truth = index.search(queries, 10)
    settings = index.calibrate(queries)
    assert [s.recall for s in settings] == sorted(s.recall for s in settings)
    for target in (0.7, 0.9, 0.99):
        got = index.search(queries, 10, recall=target)
        assert recall(got.ids, truth.ids) >= target
        at = {(q, i): s for q, row in enumerate(truth.ids) for i, s in zip(row, truth.scores[q], strict=True)}
        for q, row in enumerate(got.ids):
            for i, s in zip(row, got.scores[q], strict=True):
                assert at.get((q, i), s) == s
    same(index.search(queries, 10, recall=1.0), truth)


def test_recall_grows_with_the_budget() -> None:
    docs, queries = random_rows(20_000, 300, 20), random_rows(60, 300, 20, seed=6)
    index = SparseIndex.build(docs)
    truth = index.search(queries, 10).ids
    by_survivors = [recall(index.search(queries, 10, setting=Setting(0, 0.2, n, 0)).ids, truth) for n in (10, 40, 160)]
    by_cut = [recall(index.search(queries, 10, setting=Setting(0, cut, 40, 0)).ids, truth) for cut in (0.5, 0.2, 0.0)]
    by_trust = [recall(index.search(queries, 10, setting=Setting(0, 0, 0, 0, t)).ids, truth) for t in (0.01, 0.3, 1.0)]
    assert by_trust == sorted(by_trust) and by_trust[0] < by_trust[-1] == 1
    assert by_survivors == sorted(by_survivors) and by_cut == sorted(by_cut)
    assert by_survivors[0] < by_survivors[-1] and by_cut[-1] > 0.999


def test_calibrates_itself_once(tmp_path: Path) -> None:
    docs = random_rows(3000, 200, 20)
    index = SparseIndex.build(docs)
    got = index.search(docs[:50], 10, recall=0.9)
    assert recall(got.ids, index.search(docs[:50], 10).ids) > 0.85
    assert index.stats()["calibrated_for_k"] == [10]
    index.save(tmp_path / "x.gsx")
    assert SparseIndex.open(tmp_path / "x.gsx")._settings == index._settings


def test_without_values_is_smaller_and_close(tmp_path: Path) -> None:
    docs, queries = random_rows(20_000, 300, 30), random_rows(60, 300, 20, seed=6)
    exact, index = SparseIndex.build(docs), SparseIndex.build(docs, values=False)
    assert index.stats()["bytes_per_nonzero"] < 5 < exact.stats()["bytes_per_nonzero"] < 10.5
    truth, got = exact.search(queries, 10), index.search(queries, 10, recall=0.99)
    assert recall(got.ids, truth.ids) > 0.98
    assert np.abs(got.scores[:, 0] - truth.scores[:, 0]).max() < 1e-3 * truth.scores.max()
    index.add(docs[:5])
    index.delete([0])
    index.merge()
    assert recall(index.search(queries, 10, recall=0.99).ids, truth.ids) > 0.95
    index.save(tmp_path / "small.gsx")
    assert len(SparseIndex.open(tmp_path / "small.gsx")) == 20_004


def test_postings_and_evenness() -> None:
    docs, queries = random_rows(5000, 64, 8), random_rows(20, 64, 8, seed=3)
    index = SparseIndex.build(docs)
    matches = ((docs != 0).astype(np.int64) @ (queries != 0).astype(np.int64).T).sum(0)
    assert (index.postings(queries) == np.asarray(matches).ravel()).all()
    stats = index.stats()
    df = np.bincount(docs.indices, minlength=64) / 5000
    assert stats["flops"] == pytest.approx((df**2).sum())
    assert stats["evenness"] == pytest.approx((df**2).sum() * 64 / (docs.nnz / 5000) ** 2)


def saved(path: Path, n: int = 500) -> SparseIndex:
    index = SparseIndex.build(random_rows(n, 70, 9), ids=np.arange(n)[::-1].copy())
    index.delete([7])
    index.save(path)
    return index


def clustered(n: int, dim: int, nnz: int, signed: bool = False, seed: int = 0) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Documents in clusters of 40, and queries like them."""
    rng = np.random.default_rng(seed)
    centres = sp.random(n // 40, dim, nnz / dim, format="csr", random_state=rng)
    centres.data[:] = rng.standard_normal(centres.nnz) if signed else rng.random(centres.nnz) + 0.5

    def members(of: np.ndarray) -> sp.csr_matrix:
        noise = sp.random(len(of), dim, nnz / dim / 3, format="csr", random_state=rng)
        rows = centres[of]
        rows.data *= (rng.random(rows.nnz) < 0.8) * rng.random(rows.nnz)
        x = sp.csr_matrix(rows + noise, dtype=np.float32)
        x.eliminate_zeros()
        return x

    return members(rng.permutation(np.arange(n) % (n // 40))), members(rng.integers(0, n // 40, 40))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dim", [300, 70_000])
def test_groups_change_no_exact_result(isa: str, signed: bool, dim: int) -> None:
    docs, queries = clustered(9000, dim, 12 if dim == 300 else 60, signed)
    index = SparseIndex.build(docs)
    want = index.search(queries, 10)
    index.group()
    assert 100 < index.groups < 1000
    for groups in (0, 1, 7, 200):
        same(index.search(queries, 10, setting=Setting(1.0, 0.0, 0, 0.0, 1.0, groups)), want)
    near = index.search(queries, 10, setting=Setting(1.0, 0.0, 0, 0.0, 0.0, index.groups))
    assert recall(near.ids, want.ids) > 0.95  # a centre keeps its heaviest columns only
    few = index.search(queries, 10, setting=Setting(1.0, 0.0, 0, 0.0, 0.0, 4))
    assert recall(few.ids, want.ids) > (0.5 if signed else 0.8)
    found = {(int(i), float(s)) for i, s in zip(few.ids.ravel(), few.scores.ravel(), strict=True)}
    assert found & {(int(i), float(s)) for i, s in zip(want.ids.ravel(), want.scores.ravel(), strict=True)}
    half = index.search(queries, 10, setting=Setting(1.0, 0.0, 0, 0.0, 0.3, 4))
    assert recall(half.ids, want.ids) >= recall(few.ids, want.ids)
    cut = index.search(queries, 10, setting=Setting(1.0, 0.1, 40, 0.0, 1.0, 4))
    assert recall(cut.ids, want.ids) >= recall(few.ids, want.ids)


def test_groups_find_clusters() -> None:
    docs, queries = clustered(20_000, 1000, 20)
    index = SparseIndex.build(docs)
    truth = index.search(queries, 10).ids
    index.group()
    got = index.search(queries, 10, setting=Setting(1.0, 0.0, 0, 0.0, 0.0, 4)).ids
    assert recall(got, truth) > 0.95
    again = SparseIndex.build(docs)
    again.group(threads=1)
    np.testing.assert_array_equal(again.rows()[1], index.rows()[1])  # threads change nothing


def test_grouped_index_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, filters, deletes, appends, k beyond the groups, merge, reopen: all as without groups."""
    docs, queries = clustered(9000, 300, 12)
    ids = np.random.default_rng(1).permutation(10**12 + np.arange(9000) * 3)
    plain, index = SparseIndex.build(docs, ids=ids), SparseIndex.build(docs, ids=ids)
    index.group()
    more = random_rows(500, 300, 12)
    for one in (plain, index):
        one.delete(ids[::7])
        one.add(more)
    near = Setting(1.0, 0.0, 0, 0.0, 0.0, 600)
    for chosen in (None, ids[:40], ids[:5000]):
        want = plain.search(queries, 10, filter=chosen)
        same(index.search(queries, 10, filter=chosen), want)
        got = index.search(queries, 10, filter=chosen, setting=near)
        assert recall(got.ids, want.ids) > 0.85
    want = plain.search(queries[:3], 3000)
    same(index.search(queries[:3], 3000, setting=near._replace(groups=2)), want)
    same(index.search(queries, 10, setting=near._replace(trust=1.0)), plain.search(queries, 10))
    index.save(tmp_path / "a.gsx")
    opened = SparseIndex.open(tmp_path / "a.gsx")
    assert opened.groups == index.groups
    same(opened.search(queries, 10, setting=near), index.search(queries, 10, setting=near))
    index.merge()
    assert index.groups and len(index._parts) == 1
    same(index.search(queries, 10), plain.search(queries, 10))
    timed = tuning.timed
    # A clock by which groups are faster: on an index this small that depends on what else the machine does.
    monkeypatch.setattr(tuning, "timed", lambda *a: (timed(*a)[0], 1.0 if a[3].groups == 0 else 0.5))
    assert {s.groups for s in index.calibrate(queries)} != {0}
    same(index.search(queries, 10), plain.search(queries, 10))


def test_grouping_is_kept_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    docs, queries = clustered(5000, 300, 12)
    for seconds, pays in ((1e-9, True), (1.0, False)):
        index = SparseIndex.build(docs)
        want = index.search(queries, 10)

        def measured(index: SparseIndex, *_: object, seconds: float = seconds) -> list[Setting]:
            return [Setting(1.0, 0.0, 0, seconds if index.groups else 1e-3)]

        monkeypatch.setattr("gossamer.retrieval.index.calibrate", measured)
        assert index.group(recall=0.99) is pays
        assert (index.groups > 0) is pays
        same(index.search(queries, 10), want)


def test_few_documents_are_not_grouped() -> None:
    index = SparseIndex.build(random_rows(100, 50, 8))
    index.group()
    assert index.groups == 0
    empty = SparseIndex.build(sp.csr_matrix((5000, 50), dtype=np.float32))
    empty.group()
    assert (empty.search(random_rows(2, 50, 8), 3).scores == 0).all()


def test_damaged_groups_are_refused(tmp_path: Path) -> None:
    docs, _ = clustered(5000, 300, 12)
    index = SparseIndex.build(docs)
    index.group()
    (part,) = index._parts
    assert part.groups is not None
    for change in (lambda s: s[:-1], lambda s: s[:0], lambda s: s + 1, lambda s: s[::-1].copy()):
        with pytest.raises(ValueError, match="damaged"):
            Groups.view(part.groups.block, change(part.groups.starts), part.native)


def test_bit_flips_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.gsx"
    queries = random_rows(2, 70, 20)
    whole, rng = (saved(path), path.read_bytes())[1], np.random.default_rng(0)
    places = {b * 64 for b in range(2)} | set(rng.integers(0, len(whole), 300).tolist()) | set(range(0, 64, 3))
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(broken)
        try:
            index = SparseIndex.open(path)
        except IndexFileError as e:
            assert "damaged" in str(e) or place < 64
            continue
        # Padding between blocks belongs to no checksum.
        path.write_bytes(whole)
        same(index.search(queries, 5), SparseIndex.open(path).search(queries, 5))


def test_damage_that_nobody_checks_cannot_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.gsx"
    block = saved(path)._parts[0].block.copy()
    queries = as_rows(random_rows(2, 70, 40)).tidy()
    rng, refused = np.random.default_rng(0), 0
    scores, ids = np.empty((2, 9), np.float32), np.empty((2, 9), np.int64)
    for _ in range(400):
        broken = np.empty(len(block) + 64, np.uint8)
        broken = broken[-broken.ctypes.data % 64 :][: len(block)]
        broken[:] = block
        at = rng.integers(0, 3000 if rng.random() < 0.5 else len(block), rng.integers(1, 4))
        broken[at] = rng.integers(0, 256, len(at))
        try:
            part = Part.view(broken)
        except ValueError:
            refused += 1
            continue
        for exact in (True, False) if part.native.exact else (False,):
            out = (scores.ctypes.data, ids.ctypes.data)
            require().search([part.target(None)], 2, *queries.pointers(), 9, exact, 1.0, 20, 0.1, 0, 1, *out)
    assert refused > 20


def test_truncated_foreign_and_newer_files(tmp_path: Path) -> None:
    path = tmp_path / "a.gsx"
    saved(path)
    whole = path.read_bytes()
    for size in [0, 5, 63, 64, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(IndexFileError, match="truncated|not a Gossamer index"):
            SparseIndex.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(IndexFileError, match="truncated|bytes"):
        SparseIndex.open(path)
    path.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(IndexFileError, match="not a Gossamer index"):
        SparseIndex.open(path)
    path.write_bytes(whole[:8] + (9).to_bytes(4, "little") + whole[12:])
    with pytest.raises(IndexFileError, match="version 9.*upgrade"):
        SparseIndex.open(path)
    with pytest.raises(FileNotFoundError):
        SparseIndex.open(tmp_path / "none.gsx")


def test_readers_keep_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gsx"
    docs = random_rows(900, 40, 6)
    SparseIndex.build(docs[:500]).save(path)
    reader = SparseIndex.open(path)
    writer = SparseIndex.open(path)
    writer.add(docs[500:])
    writer.save()
    same(reader.search(docs[:5], 9), brute(docs[:500], docs[:5], 9))
    same(SparseIndex.open(path).search(docs[:5], 9), brute(docs, docs[:5], 9))
    assert os.listdir(tmp_path) == ["a.gsx"]


def test_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "a.gsx"
    docs = random_rows(90, 40, 6)
    SparseIndex.build(docs).save(path)
    first, second = SparseIndex.open(path), SparseIndex.open(path)
    first.add(docs[:3])
    first.save()
    second.add(docs[:4])
    with pytest.raises(FileExistsError, match="another process.*overwrite=True"):
        second.save()
    with pytest.raises(FileExistsError, match="exists already"):
        SparseIndex.build(docs).save(path)
    with storage.Writer(path) as _, pytest.raises(BlockingIOError, match="wait for it"):
        second.save(overwrite=True)
    assert len(SparseIndex.open(path)) == 93
    second.save(overwrite=True)
    assert len(SparseIndex.open(path)) == 94
    assert os.listdir(tmp_path) == ["a.gsx"]


def test_a_crashed_writer_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.gsx"
    saved(path)
    code = f"""
import os, numpy as np
from pathlib import Path
from gossamer.retrieval import storage
from gossamer.retrieval.grouping import Groups
writer = storage.Writer(Path({str(path)!r})).__enter__()
writer.add(np.zeros(1000, np.uint8))
os._exit(1)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 1
    assert len(os.listdir(tmp_path)) == 2
    index = SparseIndex.open(path)
    index.save()
    assert os.listdir(tmp_path) == ["a.gsx"] and len(SparseIndex.open(path)) == 499


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gsx"
    index = saved(path)
    index.add(random_rows(10, 70, 9))
    write = os.write

    def full(file: int, data: memoryview) -> int:
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="free some space"):
        index.save()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.gsx"] and len(SparseIndex.open(path)) == 499
    index.save()
    assert len(SparseIndex.open(path)) == 509


def test_a_real_limit_of_the_system(tmp_path: Path) -> None:
    """Python ignores SIGXFSZ, so the write itself fails."""
    path = tmp_path / "a.gsx"
    index = saved(path)
    index.add(random_rows(3000, 70, 9))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="untouched"):
            index.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["a.gsx"] and len(SparseIndex.open(path)) == 499


def test_reports_progress() -> None:
    docs, seen = random_rows(700, 30, 4), []
    SparseIndex.build(iter([docs[:300], docs[300:]]), progress=seen.append)
    assert seen == [300, 700]


def test_checksum_sees_every_bit() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 64, 65, 1000, (1 << 20) + 13):
        data = rng.integers(0, 256, size, np.uint8)
        whole = storage.checksum(data)
        assert storage.checksum(data, 3) == whole
        for place in rng.integers(0, size, 50) if size else ():
            data[place] ^= 16
            assert storage.checksum(data) != whole
            data[place] ^= 16


def test_parts_of_one_index_never_mix(tmp_path: Path) -> None:
    """A description that was rewritten with a right checksum still cannot join what does not fit."""
    path = tmp_path / "a.gsx"
    part = Part.build(as_rows(random_rows(10, 8, 3)).tidy(), 8, True, np.arange(10), 1)
    with storage.Writer(path) as writer:
        number = writer.add(part.block)
        parts = [{"segment": number, "alive": None}]
        writer.commit({"dim": 9, "values": True, "next_id": 10, "parts": parts, "settings": {}})
    with pytest.raises(IndexFileError, match="contradict"):
        SparseIndex.open(path)


def test_stub_names_what_the_core_has() -> None:
    stub = Path(storage.__file__).parents[1] / "_retrieval.pyi"
    lines = [line for line in stub.read_text().splitlines() if line.startswith(("def ", "class ", "MAX_DOCS"))]
    declared = {line.split("(")[0].split(":")[0].removeprefix("def ").removeprefix("class ") for line in lines}
    assert declared == {name for name in dir(require()) if not name.startswith("_")}


def test_an_index_is_not_pickled_or_copied() -> None:
    index = SparseIndex(8)
    for way in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"save\(path\) it, and SparseIndex\.open"):
            way(index)


def test_more_results_than_could_be_asked_for() -> None:
    index = SparseIndex.build(sp.eye(3, 8, format="csr", dtype=np.float32))
    queries = sp.eye(1, 8, format="csr", dtype=np.float32)
    for k in (0, 10**9):
        with pytest.raises(ValueError, match=f"k is {k} of 3 documents: .* at most 65536"):
            index.search(queries, k)
    padded = index.search(queries, 5)
    assert padded.ids.shape == (1, 5) and padded.ids[0, 3:].tolist() == [-1, -1]
