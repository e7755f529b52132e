"""Serving an encoder: what is tuned, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from gossamer.encoder import EncoderError, convert, pack  # noqa: E402
from gossamer.encoder.serving import Point, Report, filled, tune  # noqa: E402

pytestmark = pytest.mark.skipif(pack._core is None, reason="the compiled encoder is not built")


class Tokenizer:
    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.arange(40 * len(texts)).view(len(texts), 40) % 50
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    for p in model.encoder.parameters():
        if p.dim() == 2:
            p.data *= (torch.rand(p.shape[0] // 4, 1, p.shape[1]) > 0.7).expand(-1, 4, -1).reshape(p.shape)
    return convert(model, Tokenizer(), ["text"] * 32)


@pytest.fixture
def folder(encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    encoder.save(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_dense_is_the_same_function(encoder: Any) -> None:
    ids = torch.arange(30).view(1, 30)
    dense = filled(encoder)
    assert dense.parts.sparsity == 0 < encoder.parts.sparsity
    assert torch.equal(dense(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_tunes_real_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.encoder import serving

    monkeypatch.setattr(serving, "_cpus", lambda: {min(serving.os.sched_getaffinity(0))})
    said: list[str] = []
    found = tune(folder, 20, 1e6, batches=(1, 2), ways=("sparse",), seconds=0.05, progress=said.append)
    assert said == ["sparse: 1 x 1 cores"]
    assert [(p.instances, p.cores, p.batch) for p in found.points] == [(1, 1, 1), (1, 1, 2)]
    assert all(p.sentences_per_second > 0 and p.p99 >= p.p50 > 0 for p in found.points)
    assert found.best("sparse") in found.points and found.best("torch fp32") is None


def test_the_best_is_within_the_limit() -> None:
    points = (
        Point("sparse", 1, 2, 1, 100.0, 9.0, 11.0), Point("sparse", 1, 2, 8, 300.0, 26.0, 30.0),
        Point("sparse", 2, 1, 2, 200.0, 19.0, 21.0), Point("torch fp32", 1, 2, 1, 50.0, 19.0, 19.5),
    )  # fmt: skip
    assert Report(points, 128, 20, 99).best("sparse") == points[0]
    assert Report(points, 128, 20, 50).best("sparse") == points[2]
    assert Report(points, 128, None, 99).best("sparse") == points[1]
    assert Report(points, 128, 20, 50).ratio("torch fp32") == 4
    assert Report(points, 128, 5, 50).ratio("torch fp32") is None


def test_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="holds no encoder"):
        tune(tmp_path)
    for wrong, what in (
        ({"tokens": 65}, "1 to 64 tokens"), ({"ways": ["fast"]}, "no way 'fast'"), ({"percentile": 95}, "50 or 99"),
        ({"batches": [0]}, "batches are 1 and more"),
    ):  # fmt: skip
        with pytest.raises(EncoderError, match=what):
            tune(folder, **{"tokens": 16, **wrong})
