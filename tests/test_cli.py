"""Every command on a tiny model, and every mistake a user can make: one line that names the fix, exit code 2."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from typer.testing import CliRunner

from gossamer import checkpoint
from gossamer.cli import app, shrink
from gossamer.hub import lm_eval
from gossamer.plan import Plan

SMALL = ["--samples", "4", "--length", "32"]


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160"})


def failed(*args):
    """The one line that a refused command prints."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: "), result.stderr
    return lines[-1]


@pytest.fixture(scope="module")
def compressed(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "small"
    result = run("compress", tiny_folder, "-o", out, "--method", "sparsegpt", "--ratio", "0.2", *SMALL)
    assert result.exit_code == 0, result.output
    return out


def test_help_is_there_without_torch():
    # Under a bare package, so that only what the command line itself imports is seen.
    code = (
        "import importlib.util, sys, types\n"
        "bare = types.ModuleType('gossamer')\n"
        "bare.__path__ = importlib.util.find_spec('gossamer').submodule_search_locations\n"
        "sys.modules['gossamer'] = bare\n"
        "from gossamer.cli import app\n"
        "try:\n    app(['--help'])\nfinally:\n    print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "compress" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("set()")


def test_doctor_prints_every_check_and_fix(monkeypatch):
    from gossamer import doctor

    checks = [doctor.Check("Python", True, "3.99"), doctor.Check("gguf", False, "for [b]GGUF", "pip install gguf")]
    monkeypatch.setattr(doctor, "report", lambda: checks)
    lines = [" ".join(line.split()) for line in run("doctor").stdout.splitlines()]
    assert lines == ["yes Python 3.99", "no gguf for [b]GGUF", "fix: pip install gguf"]


def test_plan_prints_bytes_and_writes_json(tiny_folder, tmp_path):
    file = tmp_path / "plan.json"
    rules = ["--rule", "*.down_proj=dense", "--rule", "*.0.*up_proj=:0.4"]
    args = ["--method", "cospadi", "--ratio", "0.2", *rules, "--knob", "rho=2"]
    result = run("plan", tiny_folder, *args, "--json", file)
    assert result.exit_code == 0, result.output
    plan = Plan.load(file)
    by_name = {l.name.split("layers.")[1]: l for l in plan.layers}
    assert by_name["1.mlp.down_proj"].method == "dense"
    assert by_name["0.mlp.up_proj"].ratio == 0.4
    assert by_name["1.mlp.up_proj"].knobs == {"rho": 2}
    assert f"{plan.ratio:.4f}" in result.stdout
    assert "Estimated peak memory" in result.stdout


def test_codes_is_short_for_a_knob(tiny_folder, tmp_path):
    result = run("plan", tiny_folder, "--method", "cospadi", "--codes", "nm24", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert Plan.load(tmp_path / "plan.json").layers[0].knobs == {"codes": "nm24"}


def test_compress_saves_what_it_promised(compressed, tiny_folder):
    layers = checkpoint.read(compressed)
    assert len(layers) == 14
    assert not compressed.with_name("small.work").exists()
    model = checkpoint.load(compressed)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_auto_prints_the_choice_and_rounding_beside_it(tiny_folder, tmp_path):
    result = run("compress", tiny_folder, "-o", tmp_path / "out", "--ratio", "0.2", *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("<- chosen") == 1
    assert "int8 rounding, for comparison" in result.stdout
    assert "loses least of the layers' output energy" in " ".join(result.stdout.split())


def test_compress_follows_a_plan_file(tiny_folder, tmp_path):
    file = tmp_path / "plan.json"
    made = run("plan", tiny_folder, "--method", "magnitude", "--rule", "*.0.*=dense", "--json", file)
    assert made.exit_code == 0, made.output
    result = run("compress", tiny_folder, "-o", tmp_path / "out", "--plan", file, *SMALL)
    assert result.exit_code == 0, result.output
    assert all(".layers.1." in name for name in checkpoint.read(tmp_path / "out"))


def test_eval_gives_the_same_perplexity_from_any_spelling_of_the_text(compressed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    result = run("eval", compressed, "--text", text, "--window", 64, "--windows", 3)
    assert result.exit_code == 0, result.output
    assert "(token-level, 189 tokens in windows of 64)" in result.stdout
    assert result.stdout.startswith("perplexity 2")  # a random model: near the vocabulary's 257


def test_eval_without_a_text_reads_wikitext(compressed):
    result = run("eval", compressed, "--window", 16, "--windows", 1)
    assert "perplexity" in result.stdout, result.output


def test_export_loads_without_gossamer(compressed, tmp_path):
    result = run("export", compressed, tmp_path / "dense")
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert run("eval", tmp_path / "dense", "--window", 16, "--windows", 1).exit_code == 0


def test_generate_continues_the_prompt(compressed):
    result = run("generate", compressed, "--prompt", "[bold]Once", "--tokens", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("[bold]Once")
    assert run("generate", compressed, "--prompt", "[bold]Once", "--tokens", 4, "--no-prepare").exit_code == 0


def test_bench_says_what_it_measures_without_a_terminal(compressed):
    result = run("bench", compressed, "--tokens", 2, "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert {"dense: vendor", "dispatched"} <= set(result.stderr.splitlines())
    assert "dispatched / best dense:" in result.stdout


INTERRUPTED = """
import signal, sys
from gossamer.cli import app
from gossamer.work import Folder

save = Folder.save

def save_and_be_interrupted(*args):
    save(*args)
    signal.raise_signal(signal.SIGINT)

Folder.save = save_and_be_interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this one
app(sys.argv[1:])
"""


def test_ctrl_c_keeps_the_work_and_says_how_to_resume(tiny_folder, tmp_path):
    out = tmp_path / "out"
    args = ["compress", tiny_folder, "-o", out, "--method", "sparsegpt", "--ratio", "0.2", *SMALL]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, args)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 130, child.stdout + child.stderr
    assert f"to resume:\n  gossamer compress {tiny_folder} -o {out}" in child.stdout
    assert len(list((tmp_path / "out.work" / "groups").iterdir())) == 1 and not out.exists()
    assert run(*args).exit_code == 0


MISTAKES = {
    "no such folder": (["plan", "{tmp}/nowhere"], "no folder.*fix:"),
    "an empty folder": (["eval", "{tmp}"], "no config.json.*fix:"),
    "ratio 0": (["plan", "{model}", "--ratio", "0"], "not between 0 and 1"),
    "ratio out of reach": (["plan", "{model}", "--method", "svd", "--ratio", "0.999"], "layers.0.*out of reach"),
    "unknown method": (["plan", "{model}", "--method", "magic"], "unknown method 'magic'; there are: .*cospadi"),
    "unknown knob": (["plan", "{model}", "--method", "svd", "--knob", "rho=2"], "has no knob rho; it has: .*dtype"),
    "a knob without value": (["plan", "{model}", "--method", "svd", "--knob", "rho"], "not NAME=VALUE; fix"),
    "a rule without method": (["plan", "{model}", "--rule", "*.mlp"], "not PATTERN=METHOD:RATIO; fix"),
    "a rule for nothing": (["plan", "{model}", "--rule", "*.conv=dense"], "matches no layer"),
    "a full output folder": (["compress", "{model}", "-o", "{model}"], "exists and is not empty; fix"),
    "a missing text": (["compress", "{model}", "-o", "{tmp}/x", "--calibration", "{tmp}/no.txt"], "no.txt; fix"),
    "a short text": (["compress", "{model}", "-o", "{tmp}/x", "--calibration", "{tmp}/short.txt"], "5 tokens.*fix"),
    "a binary text": (["eval", "{model}", "--text", "{tmp}/binary.txt"], "no UTF-8 text.*fix"),
    "too many windows": (["eval", "{model}", "--text", "{tmp}/short.txt"], "has 5 tokens, 1,024 are needed.*fix"),
    "another device": (["eval", "{model}", "--device", "tpu9"], "device 'tpu9' cannot be used.*fix"),
    "another dtype": (["eval", "{model}", "--dtype", "float7"], "unknown dtype 'float7'; fix"),
    "a damaged plan": (["compress", "{model}", "-o", "{tmp}/x", "--plan", "{tmp}/short.txt"], "not JSON.*fix"),
    "a rule beside a plan": (
        ["compress", "{model}", "-o", "{tmp}/x", "--plan", "p", "--rule=*=svd"],
        "--rule beside --plan",
    ),
    "a damaged config": (["eval", "{tmp}/damaged"], "damaged.config.json.*fix"),
    "a pickle": (["eval", "{tmp}/pickle"], "is a pickle, .* refused; fix"),
    "export of a dense model": (["export", "{model}", "{tmp}/x"], "no Gossamer checkpoint.*fix"),
    "no samples": (["compress", "{model}", "-o", "{tmp}/x", "--samples", "0"], "--samples 0 .*fix: at least 1"),
    "short windows": (["compress", "{model}", "-o", "{tmp}/x", "--length", "1"], "--length 1 .*fix: at least 2"),
    "all layers dense": (["compress", "{model}", "-o", "{tmp}/x", "--rule", "*=dense"], "every layer dense; fix"),
    "an export over something": (["export", "{model}", "{tmp}/damaged"], "not empty; fix: .* --overwrite"),
    "windows too long": (["eval", "{model}", "--window", "9999"], "fix: a window of 2048 or less"),
    "a plan to nowhere": (["plan", "{model}", "--json", "{tmp}/no/x.json"], "no folder [^ ]*/no to write x.json.*fix"),
    "a plan over a folder": (["plan", "{model}", "--json", "{tmp}/damaged"], "damaged cannot be written .*fix"),
    "perplexity of an encoder": (["eval", "{bert}", "--window", "16"], "BertModel predicts no tokens; fix"),
    "decoding of an encoder": (["bench", "{bert}"], "BertModel predicts no tokens; fix: .*--target cpu"),
    "an empty prompt": (["generate", "{model}", "--prompt", ""], "prompt is empty; fix"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_fix(mistake, tiny_folder, bert_folder, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"\x80")
    args, pattern = MISTAKES[mistake]
    line = failed(*(a.format(tmp=tmp_path, model=tiny_folder, bert=bert_folder) for a in args))
    assert re.search(pattern, line), line
    assert not (tmp_path / "x").exists()


def test_another_run_in_the_work_folder_is_refused(tiny_folder, tmp_path):
    work = tmp_path / "work"
    base = ["compress", tiny_folder, "--method", "magnitude", "--work", work, *SMALL]
    assert run(*base, "-o", tmp_path / "a", "--ratio", "0.2").exit_code == 0
    assert work.exists()
    assert "holds another run" in failed(*base, "-o", tmp_path / "b", "--ratio", "0.3")
    assert run(*base, "-o", tmp_path / "b", "--ratio", "0.3", "--fresh").exit_code == 0


@pytest.mark.parametrize("where", ["front", "back"])
def test_debug_shows_the_traceback(where, tmp_path):
    args = ["plan", str(tmp_path / "nowhere")]
    result = run("--debug", *args) if where == "front" else run(*args, "--debug")
    assert isinstance(result.exception, ValueError | OSError)


def test_tasks_without_lm_eval_name_the_extra(compressed, monkeypatch):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    assert "fix: pip install lm-eval" in failed("eval", compressed, "--tasks", "piqa")


def test_task_results_become_plain_numbers():
    raw = {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 1, "sample_len": 9}
    assert lm_eval.numbers(raw) == {"acc": 0.5, "acc_norm": 1.0}


def test_knobs_are_json_where_they_can_be():
    assert shrink.parse_knobs(["rho=2.5", "share=false", "codes=nm24"]) == {"rho": 2.5, "share": False, "codes": "nm24"}


@pytest.mark.parametrize(
    ("text", "method", "ratio"), [("*.v=svd:0.1", "svd", 0.1), ("*.v=dense", "dense", None), ("*.v=:0.5", None, 0.5)]
)
def test_rules(text, method, ratio):
    rule = shrink.parse_rule(text)
    assert (rule.pattern, rule.method, rule.ratio) == ("*.v", method, ratio)


def test_code_that_a_model_brings_is_not_run(tiny_folder, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for args in (["eval", folder], ["plan", folder, "--method", "magnitude"], ["generate", folder, "--prompt", "a"]):
        result = CliRunner().invoke(app, [str(a) for a in args], input="y\ny\ny\n", env={"COLUMNS": "160"})
        assert result.exit_code == 2 and "code of its own, which is not run; fix" in result.stderr, result.output
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def matrix(tmp_path):
    file = tmp_path / "docs.npz"
    sp.save_npz(file, sp.eye(3, 8, format="csr", dtype="float32"))
    return file


@pytest.mark.parametrize("name", ["text.npz", "empty.npz", "array.npy", "cut.npz"])
def test_files_that_hold_no_embeddings(name, matrix, tmp_path):
    (tmp_path / "text.npz").write_text("no matrix")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "cut.npz").write_bytes(matrix.read_bytes()[:-30])
    line = failed("index", "build", tmp_path / name, tmp_path / "x.gsx")
    assert f"{name} is no .npz file, or a damaged one: write it by scipy.sparse.save_npz" in line
    line = failed("index", "build", matrix, tmp_path / "x.gsx", "--ids", matrix)
    assert "docs.npz is no .npy file, or a damaged one: write it by numpy.save" in line
    assert not (tmp_path / "x.gsx").exists()


def test_an_index_is_built_searched_and_never_named_by_its_hidden_file(matrix, tmp_path):
    index = tmp_path / "docs.gsx"
    assert run("index", "build", matrix, index).exit_code == 0
    assert run("index", "search", index, matrix, "-k", 1).stdout.splitlines()[2] == "2\t2:1"
    assert re.search("no folder .*/no to write x.gsx to; fix", failed("index", "build", matrix, tmp_path / "no/x.gsx"))
    (tmp_path / "folder").mkdir()
    line = failed("index", "build", matrix, tmp_path / "folder", "--overwrite")
    assert "/folder cannot be written" in line and ".writing" not in line and "; fix" in line


def test_an_export_replaces_what_it_is_told_to(compressed, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert run("export", compressed, tmp_path, "--overwrite").exit_code == 0
    assert "architectures" in json.loads((tmp_path / "config.json").read_text())
