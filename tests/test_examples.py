"""The examples run, on a tiny model, as a reader would run them."""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from safetensors.torch import load_file

import gossamer
from gossamer import checkpoint, formats, patterns
from gossamer.stats import Stats

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]


@pytest.fixture(scope="module")
def compressed(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("examples") / "small"
    load("compress_llama")(str(tiny_folder), str(out), ratio=0.3, samples=4, length=32)
    return out


def test_compress_llama_saves_the_plan_it_printed(compressed):
    layers = checkpoint.read(compressed)
    assert {entry["spec"]["format"] for entry in layers.values()} == {"bitmask"}
    assert len(layers) == 14


def test_load_and_generate_goes_through_plain_transformers(compressed, capsys):
    text = load("load_and_generate")(str(compressed), "Once", window=64)
    assert text.startswith("Once")
    assert "perplexity over 4 windows: 2" in capsys.readouterr().out


def test_add_a_method_stores_what_it_promised():
    assert 0 < load("add_a_method")() < 0.2


def test_sparse_digits_cost_what_was_asked_and_find_their_class():
    pytest.importorskip("sklearn")
    cost, found, pixels = load("sparse_digits")(target=1.0, steps=100)
    assert 1 / 1.3 < cost < 1.3
    assert found > pixels - 0.02


def test_pretrain_24_ends_with_2_of_4_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for part in ("train", "valid"):
        (tmp_path / f"x.{part}.txt").write_text("to be or not to be, that is the question; " * 40)
    small = ["--model", "tiny", "--steps", "20", "--batch", "8", "--warmup", "5", "--lr", "0.01"]
    assert load("pretrain_24")([str(tmp_path), str(tmp_path / "out"), *small]) < 4.5
    weight = load_file(tmp_path / "out" / "model.safetensors")["blocks.1.mlp.down.weight"]
    assert patterns.is_24(weight) and weight.count_nonzero() > 0.4 * weight.numel()


def test_gcn_learns_two_communities(tmp_path):
    n, generator = 60, torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    near = torch.rand(n, n, generator=generator) < torch.where(y[:, None] == y, 0.3, 0.02)
    edges = (near | near.t()).fill_diagonal_(False)
    x = torch.randn(n, 8, generator=generator).to_sparse_csr()
    train, test = torch.arange(6), torch.arange(6, n)
    parts = {"adj_indptr": torch.cat([torch.zeros(1), edges.sum(1).cumsum(0)]).long(), "y": y}
    parts |= {"adj_indices": edges.nonzero()[:, 1], "train_idx": train, "test_idx": test}
    parts |= {"x_indptr": x.crow_indices(), "x_indices": x.col_indices(), "x_data": x.values()}
    numpy.savez(tmp_path / "a.npz", x_shape=list(x.shape), **{k: v.numpy() for k, v in parts.items()})
    torch.manual_seed(0)
    assert load("gcn")(str(tmp_path / "a.npz"), epochs=100) > 0.8


def test_every_example_is_short_and_tested():
    here = Path(__file__).read_text()
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file.name
        assert f'load("{file.stem}")' in here, file.name


def test_the_public_names_of_the_examples_exist():
    assert all(hasattr(gossamer, name) for name in ("plan", "compress", "save", "load", "export", "densify", "Rule"))


def added_by(page, monkeypatch):
    """The module that the diff of a docs page adds, and its length as the diff's header gives it."""
    text = (ROOT / "docs" / page).read_text()
    path = re.search(r"^\+\+\+ b/src/(.*)\.py$", text, re.M).group(1).replace("/", ".")
    lines = [line[1:] for line in text.splitlines() if re.match(r"\+(?!\+\+ b/)", line)]
    assert int(re.search(r"^@@ -0,0 \+1,(\d+) @@$", text, re.M).group(1)) == len(lines)
    module = ModuleType(path)
    module.__package__ = path.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, path, module)
    exec(compile("\n".join(lines), path, "exec"), vars(module))
    return module


def test_the_method_of_the_docs_works(monkeypatch):
    method = added_by("add_a_method.md", monkeypatch).Relative(power=0.5)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    (found,) = method.fit([weight], Stats(torch.eye(64).double(), 64), 0.4)
    assert [found.nbytes] == method.size([(16, 64)], 0.4)


def test_the_format_of_the_docs_keeps_the_law(monkeypatch):
    coo = added_by("add_a_format.md", monkeypatch).Coo
    a = torch.randn(9, 31, generator=torch.Generator().manual_seed(0)) * (torch.arange(279).view(9, 31) % 7 == 0)
    stored = coo.encode(a)
    assert torch.equal(stored.decode(), a)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.tensors().items()} == coo.layout(stored.spec())
    assert torch.equal(coo.build(stored.spec(), stored.tensors()).decode(), a)
    with pytest.raises(formats.FormatError, match="outside"):
        coo((9, 3), stored.weight, stored.index).validate()
