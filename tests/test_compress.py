import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import nn

from gossamer import methods
from gossamer.choose import choose, rounded
from gossamer.compress import FitError, compress
from gossamer.formats import nbytes
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.formats.product import Product
from gossamer.layers import LayerError, find
from gossamer.methods import Method
from gossamer.nn import SparseLinear, sparse_layers
from gossamer.plan import Rule, plan
from gossamer.stats import CalibrationError
from gossamer.work import WorkError

FITS: list[str] = []


@dataclass(frozen=True)
class Toy(Method):
    """A shared identity times half of the weight, at random places; the values depend on every bit of the Gram."""

    fail: str = ""

    name: ClassVar[str] = "toy"
    shares: ClassVar[bool] = True

    def fit(self, group, stats, ratio):
        FITS.append(f"{len(group)}x{tuple(group[0].shape)}")
        if self.fail == "interrupt" and len(FITS) == 3:
            raise KeyboardInterrupt
        if self.fail == "solver":
            raise torch.linalg.LinAlgError("not positive definite")
        right = Dense.encode(torch.eye(group[0].shape[1]))
        scale = 1 + stats.gram.mean().tanh().float()
        nan = float("nan") if self.fail == "nan" else 1.0
        return [Product.of(Bitmask.encode(w * scale * nan * (torch.rand(w.shape) < 0.5)), right) for w in group]

    def size(self, shapes, ratio):
        k = shapes[0][1]
        return [4 * k * k * (i == 0) + Bitmask.size(s, s[0] * k // 2, 4) for i, s in enumerate(shapes)]


class _Entry:
    def load(self):
        return Toy


PLUGINS = {"_plugins": {"toy": _Entry()}}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    # For these tests only: the contract tests walk the registry.
    monkeypatch.setattr(methods.registry, "__dict__", methods.registry.__dict__ | PLUGINS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        y = self.norm(x)
        return x + self.out(self.a(y) * self.b(y))


class Model(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(3))


def toy(**options):
    FITS.clear()
    return compress(Model(options.pop("blocks", 2)), IDS, method="toy", **options)


def state_of(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# A worker of its own kills children at every step: `python test_compress.py FOLDER SEQUENTIAL`.


def _in_child(body) -> int:
    """The exit status of `body`, run in a fork."""
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def _kill_at(step: int, after: bool) -> None:
    """kill -9 this process at its `step`-th rename, before or after it takes place."""
    calls, rename = [0], os.replace

    def replace(*args):
        calls[0] += 1
        if calls[0] == step and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def _work(folder: Path, sequential: bool) -> None:
    methods.registry.__dict__.update(PLUGINS)
    torch.set_num_threads(1)  # forks and thread pools do not mix

    def run(work: Path, step: int = 0, after: bool = False) -> None:
        if step:
            _kill_at(step, after)
        model = toy(work=work, sequential=sequential)
        (folder / f"{work.name}.json").write_text(json.dumps({"state": state_of(model), "fits": len(FITS)}))

    for step in range(1, 100):
        for after in (False, True):
            work = folder / f"{step}-{after}"
            killed = _in_child(lambda w=work, s=step, a=after: run(w, s, a))
            done = len(list((work / "groups").glob("*.safetensors")))
            assert _in_child(lambda w=work: run(w)) == 0
            found = json.loads((folder / f"{work.name}.json").read_text())
            print(json.dumps(found | {"step": step, "killed": killed, "done": done}), flush=True)
        if not killed:
            return


@pytest.mark.parametrize("sequential", [False, True])
def test_kill_at_every_step_then_resume(tmp_path, sequential):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, str(tmp_path), str(int(sequential))]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    *killed, _, whole = rows
    # The fingerprint, two boundaries, four groups and the report.
    assert whole["killed"] == 0 and [r["killed"] for r in killed] == [signal.SIGKILL] * 16
    for row in rows:
        assert row["state"] == whole["state"], row
        assert row["fits"] == 4 - row["done"], row
    assert {r["done"] for r in killed} == {0, 1, 2, 3, 4}


def test_a_shared_factor_is_stored_and_counted_once(tmp_path):
    reports = []
    model = toy(work=tmp_path, report=reports.append)
    a, b = model.blocks[0].a, model.blocks[0].b
    assert a.format.right.weight.data_ptr() == b.format.right.weight.data_ptr()
    assert not any(n.endswith("b.right_weight") for n in model.state_dict())
    with safe_open(tmp_path / "groups" / "blocks.0.a.safetensors", "pt") as f:
        assert sum(n.endswith("right_weight") for n in f.keys()) == 1  # noqa: SIM118
    stored = {l.name: l.stored_bytes for l in reports[0].layers}
    assert stored["blocks.0.a"] + stored["blocks.0.b"] == nbytes([a.format, b.format])
    assert json.loads((tmp_path / "report.json").read_text())["layers"][1]["stored_bytes"] == stored["blocks.0.b"]


def test_biases_and_the_mode_survive():
    model = Model().train()
    bias = model.blocks[0].b.bias.detach().clone()
    compress(model, IDS, method="wanda", ratio=0.3)
    assert torch.equal(model.blocks[0].b.bias, bias) and model.blocks[0].a.bias is None
    assert all(m.training for m in model.modules())
    assert type(model.head) is nn.Linear and len(sparse_layers(model)) == 6


def test_the_result_is_what_the_method_makes_of_the_statistics():
    dense, model = Model(), Model()
    compress(model, IDS, method="magnitude", ratio=0.3)
    expected = methods.create("magnitude").fit([dense.blocks[1].a.weight.detach()], None, 0.3)[0]
    assert torch.equal(model.blocks[1].a.decode(), expected.decode())


def test_magnitude_needs_no_text():
    reports = []
    compress(Model(), method="magnitude", report=reports.append)
    assert all(l.error is None for l in reports[0].layers)
    with pytest.raises(CalibrationError, match=r"blocks\.0\.a: method 'wanda' needs calibration text"):
        compress(Model(), method="wanda")


def test_sequential_blocks_see_what_their_predecessors_put_out():
    errors = {}
    for sequential in (False, True):
        reports = []
        compress(Model(3), IDS, method="wanda", ratio=0.5, sequential=sequential, report=reports.append)
        errors[sequential] = [l.error for l in reports[0].layers]
    assert errors[True][:3] == errors[False][:3]
    assert all(a != b for a, b in zip(errors[True][3:], errors[False][3:], strict=True))


def test_rules_mix_methods_and_leave_layers_dense():
    model = Model()
    made = plan(model, "magnitude", 0.3, [Rule("*.a", "dense"), Rule("blocks.1.b", "wanda")])
    reports = []
    compress(model, IDS, made, report=reports.append)
    assert type(model.blocks[0].a) is nn.Linear and isinstance(model.blocks[1].b, SparseLinear)
    assert len(sparse_layers(model)) == 4
    assert (reports[0].dense_bytes, reports[0].stored_bytes) == (made.dense_bytes, made.stored_bytes)


def test_progress_counts_to_the_end():
    seen = []
    toy(progress=seen.append)
    last = {p.stage: p for p in seen}
    assert list(last) == ["check", "calibrate", "fit"]
    assert (last["fit"].done, last["fit"].total, last["fit"].layer) == (4, 4, "blocks.1.out")
    assert last["calibrate"].done == last["calibrate"].total == 2
    assert last["fit"].seconds_left == 0
    assert all(a.done <= b.done for a, b in pairwise(seen) if a.stage == b.stage)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"ids": IDS + 0 * IDS - (IDS == 3).long()}, "calibration"),
        ({"ratio": 0.4}, "plan"),
        ({"sequential": True}, "sequential"),
        ({"weight": 1.0}, "weights"),
    ],
)
def test_another_run_in_the_folder_is_refused(tmp_path, change, named):
    compress(Model(), IDS, method="wanda", work=tmp_path)
    model = Model()
    with torch.no_grad():
        model.head.weight[0, 0] += change.pop("weight", 0.0)
    ids = change.pop("ids", IDS)
    with pytest.raises(WorkError, match=rf"holds another run, they differ in {named}: \w+ there, \w+ here; fix"):
        compress(model, ids, method="wanda", work=tmp_path, **change)
    assert not sparse_layers(model)
    compress(model, ids, method="wanda", work=tmp_path, fresh=True, **change)
    assert sparse_layers(model)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "chapter.tex").write_text("too")
    (tmp_path / "report.json").write_text("{}")
    for fresh in (False, True):
        with pytest.raises(WorkError, match="is not empty and holds no Gossamer run"):
            toy(work=tmp_path, fresh=fresh)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["chapter.tex", "groups", "report.json", "thesis.txt"]
    with pytest.raises(WorkError, match=r"thesis\.txt is a file; fix"):
        toy(work=tmp_path / "thesis.txt")


def test_a_damaged_result_is_named(tmp_path):
    toy(work=tmp_path)
    file = tmp_path / "groups" / "blocks.1.out.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(WorkError, match=r"blocks\.1\.out\.safetensors is damaged .*fix: delete this file"):
        toy(work=tmp_path)
    file.unlink()
    toy(work=tmp_path)
    assert len(FITS) == 1


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("gossamer.work.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(WorkError, match="MiB of disk, 1 MiB are free; fix"):
        toy(work=tmp_path)
    assert not FITS


def test_ctrl_c_while_choosing(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.choose._try_all", interrupted)
    with pytest.raises(KeyboardInterrupt, match="to resume"):
        compress(Model(), IDS, work=tmp_path)


def test_ctrl_c_says_how_to_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="load the model again and run the same command"):
        toy(work=tmp_path, fail="interrupt")
    assert len(list((tmp_path / "groups").iterdir())) == 2
    with pytest.raises(KeyboardInterrupt, match="give one"):
        toy(fail="interrupt")
    resumed = toy(work=tmp_path, fail="interrupt")
    assert len(FITS) == 2
    assert state_of(resumed) == state_of(toy())


def test_failures_name_the_layer():
    with pytest.raises(FitError, match=r"blocks\.0\.a, blocks\.0\.b: method 'toy' failed \(LinAlgError"):
        toy(fail="solver")
    with pytest.raises(FitError, match=r"blocks\.0\.a: .*NaN or Inf"):
        toy(fail="nan")
    for bad in (float("nan"), float("inf")):
        model = Model()
        with torch.no_grad():
            model.blocks[1].out.weight[0, 0] = bad
        with pytest.raises(ValueError, match=r"blocks\.1\.out\.weight: NaN or Inf in the weights; fix"):
            compress(model, IDS, method="wanda")
    with pytest.raises(TypeError, match=r"knobs .*beside a plan"):
        compress(Model(), IDS, plan(Model(), "wanda", 0.3), damp=0.1)


def test_a_compressed_model_is_not_compressed_again():
    with pytest.raises(LayerError, match=r"blocks\.0\.a is compressed already; fix"):
        compress(toy(), IDS, method="wanda")


def test_auto_takes_the_least_loss_and_says_why(tmp_path):
    reports = []
    model = compress(Model(3), IDS, ratio=0.4, work=tmp_path, report=reports.append)
    choice = reports[0].choice
    errors = [t.error for t in choice.trials]
    assert errors == sorted(errors) and choice.trials[0].method == choice.method
    assert choice.method in choice.reason and "int8" in choice.reason
    assert {t.method for t in choice.trials} == {"sparsegpt", "wanda", "magnitude", "svd", "cospadi"}
    assert [t.method for t in choice.rounding] == ["int8", "int6"]
    assert choice.rounding[0].error < choice.rounding[1].error
    assert choice.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert {l.method for l in reports[0].layers} == {choice.method}
    resumed = compress(Model(3), IDS, ratio=0.4, work=tmp_path, report=reports.append)
    assert reports[1].choice == choice and state_of(resumed) == state_of(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["choice.json", "fingerprint.json", "groups", "report.json"]


def test_a_method_out_of_reach_is_not_chosen(tmp_path):
    from gossamer.calibrate import Calibration

    model = Model()
    found = choose(model, find(model), Calibration(IDS), 0.8, tmp_path, candidates=("svd", "magnitude"))
    assert found.method == "magnitude" and found.trials[1].error == float("inf")
    assert not sparse_layers(model)


def test_rounding_uses_every_level():
    w = torch.linspace(-1, 1, 255).view(1, -1)
    assert rounded(w, 8).unique().numel() == 255 and (rounded(w, 8) - w).abs().max() < 1 / 127
    assert torch.equal(rounded(torch.zeros(2, 3), 6), torch.zeros(2, 3))


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2] == "1")


def test_a_finished_run_needs_no_disk(tmp_path, monkeypatch):
    toy(work=tmp_path)
    monkeypatch.setattr("gossamer.work.SPARE", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    FITS.clear()
    toy(work=tmp_path)
    assert not FITS


def test_what_safetensors_left_after_a_kill_goes_away(tmp_path):
    toy(work=tmp_path)
    (tmp_path / "groups" / ".tmpAbC123").write_bytes(b"half")
    toy(work=tmp_path)
    assert not (tmp_path / "groups" / ".tmpAbC123").exists()


def test_a_disk_that_fills_up_names_the_layer(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.work.save_file", full)
    with pytest.raises(WorkError, match=r"blocks\.0\.\w+: its result could not be written .*fix: free some disk"):
        toy(work=tmp_path)
    assert not list((tmp_path / "groups").iterdir())
    monkeypatch.undo()


ARCHITECTURES = {
    "Qwen2": {"num_key_value_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "GPT2": {"n_layer": 2, "n_head": 4},
    "Llama": {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("method", ["sparsegpt", "cospadi", "svd"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_models_come_back_to_the_bit(architecture, method, tmp_path):
    transformers = pytest.importorskip("transformers")
    import gossamer

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=64, hidden_size=32, bos_token_id=0, eos_token_id=0, **ARCHITECTURES[architecture]
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(64, (6, 16))
    knobs = {"iterations": 2} if method == "cospadi" else {}
    compress(model, ids, method=method, ratio=0.3, **knobs)
    assert len(sparse_layers(model)) == (8 if architecture == "GPT2" else 14)
    with torch.inference_mode():
        before = model(ids).logits
        gossamer.save(model, tmp_path / "small")
        for again in (
            gossamer.load(tmp_path / "small"),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
        ):
            assert torch.equal(again(ids).logits, before)


def test_a_plan_of_dense_layers_leaves_the_model_a_plain_one():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    compress(model, plan=plan(model, "magnitude", 0.3, rules=[Rule("*", method="dense")]))
    assert not sparse_layers(model) and not getattr(model.config, "quantization_config", None)
