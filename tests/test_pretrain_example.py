"""examples/pretrain_24.py beyond what test_examples.py runs: resumed runs, two ranks, its chart and its bad inputs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gossamer import patterns

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--model", "tiny", "--steps", "12", "--batch", "8", "--warmup", "2", "--every", "3", "--lr", "0.01"]
FFN = ("gate.weight", "up.weight", "down.weight")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "does", "so", "once", "more"]
    picks = torch.randint(len(words), (4000,), generator=torch.Generator().manual_seed(0))
    text = " ".join(words[i] for i in picks)
    (folder / "fox.train.txt").write_text(text[:15000])
    (folder / "fox.valid.txt").write_text(text[15000:16500])
    return folder


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "pretrain_24.py"), run_name="example")["main"]


def run(main, texts, out, method, *more):
    loss = main([str(texts), str(out), "--method", method, *SMALL, *more])
    return loss, load_file(out / "model.safetensors"), (out / "log.jsonl").read_text()


@pytest.mark.parametrize("method", ["s_ste", "fst"])
def test_a_run_stopped_twice_ends_to_the_bit_like_one_that_was_not(main, texts, tmp_path, method):
    loss, weights, log = run(main, texts, tmp_path / "whole", method)
    for _ in range(2):  # the clock stops each after its first step; a checkpoint every 4 steps is older than that
        run(main, texts, tmp_path / "cut", method, "--seconds", "0", "--save-every", "4")
    again, resumed, relog = run(main, texts, tmp_path / "cut", method)
    assert again == loss
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    kept = [line for line in relog.splitlines() if "tokens" not in line or json.loads(line)["step"] == 12]
    assert kept == log.splitlines()
    sparse = [patterns.is_24(tensor) for name, tensor in weights.items() if name.endswith(FFN)]
    assert len(sparse) == 6 and all(sparse) == (method == "s_ste")
    assert not patterns.is_24(weights["blocks.0.attention.qkv.weight"])


def test_a_checkpoint_of_another_run_is_refused(main, texts, tmp_path):
    run(main, texts, tmp_path / "out", "s_ste", "--seconds", "0")
    with pytest.raises(RuntimeError, match="fix: the same arguments, or another --out"):
        run(main, texts, tmp_path / "out", "ste")
    with pytest.raises(SystemExit):
        run(main, texts, tmp_path / "out", "best")
    with pytest.raises(FileNotFoundError, match=r"holds 0 files named \*.train.\*; fix"):
        run(main, tmp_path, tmp_path / "new", "ste")


def test_the_chart_shows_every_run_beside_it(main, texts, tmp_path):
    for method in ("dense", "sr_ste"):
        run(main, texts, tmp_path / method, method)
    chart = (tmp_path / "sr_ste" / "chart.svg").read_text()
    assert chart.count("<polyline") == 4 and ">dense</text>" in chart and ">sr_ste</text>" in chart


def test_tensorboard_gets_what_the_log_has(main, texts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, log = run(main, texts, tmp_path / "board", "s_ste", "--tensorboard")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    lines = [json.loads(line) for line in log.splitlines()]
    for name in ("loss", "flip_rate", "three_zeros", "valid_loss"):
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in lines if name in line], name


@pytest.mark.parametrize(("wrap", "cut"), [("ddp", False), ("fsdp", True)])
def test_two_ranks_train_what_one_trains_and_resume(main, texts, tmp_path, wrap, cut):
    loss, weights, _ = run(main, texts, tmp_path / "one", "s_ste")
    if cut:
        _on_two_ranks(texts, tmp_path / "two", "--wrap", wrap, "--micro", "2", "--seconds", "0")
    _on_two_ranks(texts, tmp_path / "two", "--wrap", wrap, "--micro", "2")
    last = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12 and last["valid_loss"] == pytest.approx(loss, abs=2e-4)
    found = load_file(tmp_path / "two" / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert (tensor - weights[name]).norm() < 0.02 * weights[name].norm(), name
        assert patterns.is_24(tensor) == patterns.is_24(weights[name])


def _on_two_ranks(texts, out, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "pretrain_24.py"), str(texts), str(out), *SMALL, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if torch.cuda.device_count() < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # ranks do not share a GPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
