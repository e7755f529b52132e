"""One command from a dense encoder to int8 blocks."""

import json

import pytest
import torch
from typer.testing import CliRunner

import gossamer
from gossamer import targets
from gossamer.cli import app
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.nn import sparse_layers
from gossamer.plan import Rule

TEXT = "\n".join(["The cat sat on a mat.", "Heat flows from hot to cold! Does it?", "Wings lift in air."] * 60)


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160"})


def share_of_blocks(model) -> list[float]:
    return [float(layer.format.used().float().mean()) for layer in sparse_layers(model).values()]


def test_the_plan_has_the_sparsity_of_every_shape(bert, bert_folder) -> None:
    plan = targets.cpu(bert, 0.75, [Rule("*.1.output.dense", "dense")], score="magnitude")
    assert (
        plan.to_json()["layers"]
        == targets.cpu(bert_folder, 0.75, [Rule("*.1.output.dense", "dense")], score="magnitude").to_json()["layers"]
    )
    model = gossamer.compress(bert, torch.randint(5, 60, (8, 32)), plan)
    layers = sparse_layers(model)
    assert len(layers) == 11 and all(isinstance(l.format, BsrInt8) for l in layers.values())
    assert share_of_blocks(model) == [pytest.approx(0.25, abs=0.01)] * 11
    with pytest.raises(ValueError, match=r"below 1, not 1\.5"):
        targets.cpu(bert_folder, 1.5)


def test_the_plan_is_printed_before_any_work(bert_folder) -> None:
    result = run("plan", bert_folder, "--target", "cpu", "--sparsity", 0.5)
    assert result.exit_code == 0 and result.output.count("block") >= 6


def test_one_command_one_shot(bert_folder, tmp_path) -> None:
    (tmp_path / "text").write_text(TEXT)
    more = ["--calibration", tmp_path / "text", "--samples", 8, "--length", 32]
    result = run("compress", bert_folder, "-o", tmp_path / "out", "--target", "cpu", "--sparsity", 0.5, *more)
    assert result.exit_code == 0, result.output
    model = gossamer.load(tmp_path / "out")
    assert type(model).__name__ == "BertModel"
    assert share_of_blocks(model) == [pytest.approx(0.5, abs=0.01)] * 12


def test_what_it_wrote_is_served_as_an_encoder(bert, bert_folder, tmp_path, monkeypatch) -> None:
    from transformers import AutoTokenizer, BertModel

    from gossamer.encoder import pack, serving

    if pack._core is None:
        pytest.skip("the compiled encoder is not built")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(type(bert.config)(**bert.config.to_dict() | sizes)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "dense")
    asked = []

    def tune(folder, tokens, limit, progress):
        asked.append((gossamer.load(folder).parts.sparsity, tokens, limit))
        points = (
            serving.Point("sparse", 1, 2, 4, 90.0, 4.0, 5.0),
            serving.Point("dense int8", 1, 2, 1, 45.0, 6.0, 7.0),
        )
        return serving.Report(points, tokens, limit, 99)

    monkeypatch.setattr(serving, "tune", tune)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").write_text(TEXT)
    out, more = tmp_path / "out", ["--calibration", tmp_path / "text", "--samples", 8, "--length", 32]
    assert run("compress", tmp_path / "dense", "-o", out, "--target", "cpu", "--sparsity", 0.5, *more).exit_code == 0
    for folder in (out, tmp_path / "dense"):
        result = run("bench", folder, "--target", "cpu", "--tokens", 12, "--limit", 7)
        assert result.exit_code == 0, result.output
        assert "sparse / dense int8: 2.00" in result.output and result.output.count("none in time") == 2
    assert asked == [(pytest.approx(0.5, abs=0.01), 12, 7.0), (pytest.approx(0, abs=0.02), 12, 7.0)]
    assert "no target 'tpu'; fix: --target cpu" in run("bench", out, "--target", "tpu").output


def test_one_command_distilled(bert_folder, tmp_path) -> None:
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out"
    more = ["--distill", tmp_path / "text", "--steps", 4, "--work", tmp_path / "work"]
    result = run("compress", bert_folder, "-o", out, "--target", "cpu", "--sparsity", 0.5, *more)
    assert result.exit_code == 0, result.output
    assert "step 4 of 4: loss" in result.output and (tmp_path / "work/distill_0.5_4.pt").is_file()
    assert share_of_blocks(gossamer.load(out)) == [pytest.approx(0.5, abs=0.01)] * 12


def test_distilling_beats_pruning_at_once(bert, bert_folder) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(bert_folder), torch.randint(5, 60, (16, 24))
    dense = bert(ids).last_hidden_state
    learnt = targets.distill(bert, tokenizer, TEXT.splitlines(), 0.75, 120, 2e-3, tokens=512)
    plan = targets.cpu(bert_folder, 0.75)
    pruned = gossamer.compress(AutoModel.from_pretrained(bert_folder), torch.randint(5, 60, (64, 32)), plan)

    def lost(model) -> float:
        return float((model(ids).last_hidden_state - dense).square().mean())

    assert lost(learnt) < lost(pruned)
    assert not any(p.requires_grad for p in learnt.parameters())


def test_a_sentence_transformers_folder_stays_one(tmp_path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "1_Pooling").mkdir(parents=True)
    out.mkdir()
    listing = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(listing))
    (source / "1_Pooling/config.json").write_text("{}")
    targets.copy_pipeline(source, out)
    assert (out / "1_Pooling/config.json").is_file() and json.loads((out / "modules.json").read_text()) == listing
    targets.copy_pipeline(tmp_path, out)  # none of its kind: nothing to do
    (tmp_path / "other").mkdir()
    (source / "modules.json").write_text(json.dumps([{"path": "../other"}]))
    targets.copy_pipeline(source, out)
    assert not (out / "other").exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--target", "gpu"], "there is no target 'gpu'; fix: --target cpu"),
        (["--target", "cpu", "--ratio", "0.5"], "--ratio beside --target"),
        (["--target", "cpu", "--sparsity", "1"], "below 1, not 1.0"),
        (["--sparsity", "0.5"], "--sparsity belongs to --target"),
        (["--distill", "x"], "--distill belongs to --target"),
        (["--target", "cpu", "--distill", "x", "--rule", "*=dense"], "--rule is of pruning at once; fix"),
    ],
)
def test_mistakes_are_named(bert_folder, tmp_path, args: list[str], text: str) -> None:
    result = run("compress", bert_folder, "-o", tmp_path / "out", *args)
    assert result.exit_code == 2 and text in " ".join(result.stderr.split())
