"""Searches built on the index, and `gossamer index` on the command line."""

from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from typer.testing import CliRunner

from gossamer.cli.index import app
from gossamer.retrieval import SparseIndex, hybrid_search, semantic_search_gossamer, two_stage_search
from gossamer.retrieval.index import Hits
from gossamer.retrieval.search import fuse

DOCS = sp.random(400, 60, 0.15, format="csr", dtype=np.float32, random_state=np.random.default_rng(0))
QUERIES = sp.random(6, 60, 0.3, format="csr", dtype=np.float32, random_state=np.random.default_rng(1))


def best(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def test_semantic_search() -> None:
    docs = torch.from_numpy(DOCS.toarray()).to_sparse()
    queries = torch.from_numpy(QUERIES.toarray()).to_sparse()
    results, seconds, index = semantic_search_gossamer(queries, docs, top_k=5, output_index=True)
    want = (QUERIES @ DOCS.T).toarray()
    assert [[r["corpus_id"] for r in row] for row in results] == best(want, 5).tolist()
    assert results[0][0]["score"] == pytest.approx(want[0].max()) and seconds > 0
    again, _ = semantic_search_gossamer(queries, corpus_index=index, top_k=5, search_kwargs={"filter": [3, 9]})
    assert {r["corpus_id"] for r in again[0]} == {3, 9}
    with pytest.raises(ValueError, match="corpus_embeddings"):
        semantic_search_gossamer(queries)


def test_same_arguments_as_sentence_transformers() -> None:
    engines = pytest.importorskip("sentence_transformers.sparse_encoder.search_engines")

    theirs = [n.replace("_decoded", "") for n in signature(engines.semantic_search_seismic).parameters]
    assert list(signature(semantic_search_gossamer).parameters) == theirs


def test_two_stages() -> None:
    rng = np.random.default_rng(2)
    dense, asked = rng.standard_normal((400, 8)).astype(np.float32), rng.standard_normal((6, 8)).astype(np.float32)
    index = SparseIndex.build(DOCS)
    first = index.search(QUERIES, 30).ids
    got = two_stage_search(index, QUERIES, asked, dense, 5, candidates=30)
    for q in range(6):
        order = first[q][np.argsort(-(dense[first[q]] @ asked[q]), kind="stable")]
        assert got.ids[q].tolist() == order[:5].tolist()
    whole = two_stage_search(index, QUERIES, torch.from_numpy(asked), torch.from_numpy(dense), 5, candidates=400)
    assert (whole.ids == best(asked @ dense.T, 5)).all()
    few = two_stage_search(index, QUERIES, asked, dense, 5, filter=[8, 4])
    assert (few.ids[:, 2:] == -1).all() and set(few.ids[0, :2]) == {4, 8}
    with pytest.raises(ValueError, match="no dense embedding of id"):
        two_stage_search(index, QUERIES, asked, dense[:50])
    with pytest.raises(ValueError, match="2 dense queries for 6"):
        two_stage_search(index, QUERIES, asked[:2], dense)


def test_fusion() -> None:
    a = Hits(np.array([[9.0, 5.0, 1.0]], np.float32), np.array([[7, 8, 9]]))
    b = Hits(np.array([[2.0, 1.0, -np.inf]], np.float32), np.array([[9, 5, -1]]))
    by_rank = fuse([a, b], 5)
    assert by_rank.ids[0].tolist() == [9, 7, 5, 8, -1]
    assert by_rank.scores[0, :2] == pytest.approx([1 / 63 + 1 / 61, 1 / 61])
    by_score = fuse([a, b], 3, "score", (1.0, 3.0))
    assert by_score.ids[0].tolist() == [9, 7, 8]
    assert by_score.scores[0].tolist() == [3.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="rank, score"):
        fuse([a, b], 3, "best")


def test_hybrid() -> None:
    """With an index that answers as bm25s does."""
    lexical = np.random.default_rng(3).random((6, 400), np.float32)
    lexical[:, 200:] = 0

    def retrieve(tokens: list, k: int, corpus: np.ndarray, show_progress: bool) -> tuple[np.ndarray, np.ndarray]:
        ids = best(lexical[: len(tokens)], k)
        return corpus[ids], np.take_along_axis(lexical[: len(tokens)], ids, 1)

    bm25 = SimpleNamespace(scores={"num_docs": 400}, retrieve=retrieve)
    index = SparseIndex.build(DOCS)
    got = hybrid_search(index, QUERIES, bm25, [[]] * 6, 5, candidates=400)
    sparse = index.search(QUERIES, 400)
    for q in range(6):
        ranks = np.zeros(400)
        ranks[sparse.ids[q]] += 1 / (61 + np.arange(400))
        ranks[best(lexical, 200)[q]] += 1 / (61 + np.arange(200))
        assert got.scores[q] == pytest.approx(np.sort(ranks)[::-1][:5])
    with pytest.raises(ValueError, match="2 tokenised queries for 6"):
        hybrid_search(index, QUERIES, bm25, [[]] * 2)


def test_hybrid_with_bm25s() -> None:
    bm25s = pytest.importorskip("bm25s")
    bm25 = bm25s.BM25()
    bm25.index(bm25s.tokenize(["red apple", "green pear", "red pear"], show_progress=False), show_progress=False)
    index = SparseIndex.build(np.eye(3, dtype=np.float32))
    tokens = bm25s.tokenize(["pear"], show_progress=False)
    got = hybrid_search(index, np.array([[0, 1, 0.5]]), bm25, tokens, 3)
    assert got.ids[0].tolist() == [1, 2, 0]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    sp.save_npz(tmp_path / "docs.npz", DOCS)
    sp.save_npz(tmp_path / "queries.npz", QUERIES)
    return tmp_path


def cli(*args: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_command_line(files: Path) -> None:
    index, queries, out = files / "docs.gsx", files / "queries.npz", files / "hits.npz"
    assert "400 documents" in cli("build", files / "docs.npz", index)
    with pytest.raises(FileExistsError, match="--overwrite"):
        cli("build", files / "docs.npz", index)
    cli("build", files / "docs.npz", index, "--overwrite")
    want = best((QUERIES @ DOCS.T).toarray(), 3)
    lines = cli("search", index, queries, "-k", 3).splitlines()
    assert [[int(pair.split(":")[0]) for pair in line.split("\t")[1].split("  ")] for line in lines] == want.tolist()
    cli("search", index, queries, "-k", 3, "--out", out)
    assert (np.load(out)["ids"] == want).all()
    assert "400" in cli("stats", index) and "evenness" in cli("stats", index)
    assert "0.99" in cli("bench", index, queries)


def test_command_line_takes_ids(files: Path) -> None:
    np.save(files / "ids.npy", np.arange(400) * 2)
    cli("build", files / "docs.npz", files / "a.gsx", "--ids", files / "ids.npy", "--no-exact")
    hits = cli("search", files / "a.gsx", files / "queries.npz", "-k", 1, "--recall", 0.9)
    assert int(hits.split("\t")[1].split(":")[0]) == 2 * best((QUERIES @ DOCS.T).toarray(), 1)[0, 0]


def test_foreign_files_are_refused(files: Path) -> None:
    sp.save_npz(files / "coo.npz", DOCS.tocsc())
    np.savez(files / "other.npz", x=np.zeros(3))
    for name in ("coo.npz", "other.npz"):
        with pytest.raises(ValueError, match=r"tocsr\(\)"):
            cli("build", files / name, files / "a.gsx")
