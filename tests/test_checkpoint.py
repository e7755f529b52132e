"""Saving and loading: whole or not at all, and every kind of damage is named before it can do harm."""

import copy
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gossamer import canary, checkpoint, folders, formats, patterns
from gossamer.canary import CanaryError
from gossamer.nn import SparseLinear, describe, sparse_layers
from gossamer.shards import CheckpointError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 11)[None]
LAYER = "model.layers.1.mlp.up_proj"


def model(name: str = "bitmask", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama with every block linear 2:4 sparse in format `name`."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    found = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for layer, old in list(found.named_modules()):
        if isinstance(old, nn.Linear) and layer != "lm_head":
            weight = old.weight.detach().bfloat16()
            kept = weight * patterns.nm(weight.abs().float())
            found.set_submodule(layer, SparseLinear.from_format(formats.registry[name].encode(kept)))
    return found


def logits(found: Any) -> torch.Tensor:
    with torch.no_grad():
        return found(IDS).logits


@pytest.fixture(scope="module", params=["bitmask", "nm24"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / request.param
    checkpoint.save(model(request.param), folder)
    return folder


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint of ours that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "saved"))


@pytest.fixture
def bitmask(tmp_path: Path) -> Path:
    checkpoint.save(model(), tmp_path / "bitmask")
    return tmp_path / "bitmask"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> list[Path]:
    """Write the weights again in several files."""
    found = checkpoint.load(folder)
    (folder / "model.safetensors").unlink()
    found.save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("*.safetensors"))


# ------------------------------------------------------------------ the round trip


def test_round_trip(pristine: Path) -> None:
    first, second = model(pristine.name), checkpoint.load(pristine)
    assert torch.equal(logits(first), logits(second))
    assert describe(first) == describe(second)
    assert not second.training


def test_the_files_of_a_checkpoint(pristine: Path) -> None:
    assert {p.name for p in pristine.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert not list(pristine.parent.glob(".*")), "something temporary is left"


def test_size_on_disk_is_what_nbytes_says(pristine: Path) -> None:
    layers = sparse_layers(checkpoint.load(pristine))
    tensors = load_file(pristine / "model.safetensors")
    stored = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.rpartition(".")[0] in layers)
    assert stored == formats.nbytes(layer.format for layer in layers.values())
    assert (pristine / "model.safetensors").stat().st_size < stored + tensors["model.embed_tokens.weight"].nbytes + 8000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loading_in_another_dtype(pristine: Path, dtype: torch.dtype) -> None:
    found = checkpoint.load(pristine, dtype=dtype)
    assert found.dtype == dtype
    assert all(layer.weight.dtype == torch.bfloat16 for layer in sparse_layers(found).values())


def test_save_replaces_its_own_and_keeps_what_others_put_there(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    files = shard(saved)
    assert len(files) > 2
    checkpoint.save(model("nm24", seed=1), saved)
    assert [p.name for p in saved.glob("*.safetensors*")] == ["model.safetensors"]
    assert (saved / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(checkpoint.load(saved)), logits(model("nm24", seed=1)))


def test_save_over_the_folder_it_was_loaded_from(saved: Path) -> None:
    found = checkpoint.load(saved)
    checkpoint.save(found, saved)
    assert torch.equal(logits(checkpoint.load(saved)), logits(found))


def test_a_tokenizer_is_saved_and_exported(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    checkpoint.save(model(), tmp_path / "sparse", tokenizer)
    checkpoint.export(tmp_path / "sparse", tmp_path / "dense")
    for folder in ("sparse", "dense"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert again("b a", add_special_tokens=False)["input_ids"] in ([1, 0], [0])


def test_a_sharded_checkpoint_loads(saved: Path) -> None:
    before = logits(checkpoint.load(saved))
    assert len(shard(saved)) > 2
    assert torch.equal(logits(checkpoint.load(saved)), before)


def test_a_changed_model_saved_plainly_is_not_accused(saved: Path) -> None:
    """A canary of older weights must not survive in save_pretrained."""
    found = checkpoint.load(saved)
    with torch.no_grad():
        found.model.embed_tokens.weight.mul_(-3)
        found.model.norm.weight.neg_()
    found.save_pretrained(saved)
    assert torch.equal(logits(checkpoint.load(saved)), logits(found))


# ------------------------------------------------------------------ plain modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def sparse_net() -> Net:
    torch.manual_seed(3)
    net = Net()
    weight = net.first.weight.detach()
    a = formats.registry["bitmask"].encode(weight * (torch.rand_like(weight) < 0.3))
    net.first = SparseLinear.from_format(a, net.first.bias)  # type: ignore[assignment]
    return net


def test_a_plain_module(tmp_path: Path) -> None:
    net, x = sparse_net(), torch.randn(5, 16)
    checkpoint.save(net, tmp_path / "net")
    again = checkpoint.load(tmp_path / "net", model=Net())
    assert torch.equal(again(x), net(x))
    checkpoint.export(net, tmp_path / "dense")
    dense = Net()
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    torch.testing.assert_close(dense(x), net(x))
    assert isinstance(net.first, SparseLinear), "export changed the model"


def test_a_plain_module_needs_its_skeleton(tmp_path: Path) -> None:
    checkpoint.save(sparse_net(), tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"fix: gossamer\.load\(folder, model=skeleton\)"):
        checkpoint.load(tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"layer 'first' is .* and not there in the model"):
        checkpoint.load(tmp_path / "net", model=nn.Sequential(nn.Linear(16, 24)))
    edit_weights(tmp_path / "net", lambda t: t.pop("second.weight"))
    with pytest.raises(CheckpointError, match=r"does not fit the model .*second\.weight.*; fix: give a skeleton"):
        checkpoint.load(tmp_path / "net", model=Net())


# ------------------------------------------------------------------ densify and export


def test_densify_puts_linears_back() -> None:
    found = model()
    before, decoded = logits(found), found.model.layers[0].mlp.up_proj.decode(torch.float32)
    assert checkpoint.densify(found) is found
    layer = found.model.layers[0].mlp.up_proj
    assert type(layer) is nn.Linear and layer.weight.requires_grad and torch.equal(layer.weight, decoded)
    assert not sparse_layers(found)
    torch.testing.assert_close(logits(found), before)  # another kernel, another order of the sums


def test_densify_of_a_loaded_model_forgets_the_config(saved: Path, tmp_path: Path) -> None:
    found = checkpoint.densify(checkpoint.load(saved), torch.float32)
    assert not hasattr(found, "hf_quantizer") and not found.is_quantized
    found.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(found))


def test_densify_puts_conv1d_back_and_borrowers_get_their_own() -> None:
    torch.manual_seed(4)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, initializer_range=0.2)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    block = gpt2.transformer.h[0]
    for name in ("attn.c_proj", "mlp.c_fc"):
        old = block.get_submodule(name)
        a = formats.registry["bitmask"].encode(old.weight.detach().mT)
        block.set_submodule(name, SparseLinear.from_format(a, old.bias))
    before = logits(gpt2)
    checkpoint.densify(gpt2)
    assert type(block.attn.c_proj).__name__ == "Conv1D" and block.mlp.c_fc.weight.shape == (16, 64)
    torch.testing.assert_close(logits(gpt2), before)


def test_export_leaves_the_model_alone(tmp_path: Path) -> None:
    found = model()
    before = describe(found)
    checkpoint.export(found, tmp_path / "dense", dtype=torch.bfloat16)
    assert describe(found) == before and found.dtype == torch.float32
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert tensors[f"{LAYER}.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors[f"{LAYER}.weight"], found.get_submodule(LAYER).decode())
    assert "lm_head.weight" not in tensors


# ------------------------------------------------------------------ the canary


def test_the_canary_passes_in_other_dtypes(pristine: Path) -> None:
    remembered = json.loads((pristine / "config.json").read_text())["quantization_config"]["canary"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = checkpoint.load(pristine, dtype=dtype)
        canary.check(found, remembered)
        assert canary._distance(canary._answer(found, remembered["tokens"]), remembered) < canary.TOLERANCE / 3


@pytest.mark.parametrize("seed", range(5))
def test_random_layers_never_pass(seed: int) -> None:
    found = model(seed=seed)
    remembered = canary.make(found)
    assert remembered is not None
    canary.check(found, remembered)
    torch.manual_seed(seed + 100)
    for layer in sparse_layers(found).values():
        layer.weight.data = torch.randn_like(layer.weight) * layer.weight.float().std()
    with pytest.raises(CanaryError, match=r"not those that were saved.*fix:"):
        canary.check(found, remembered)


def test_one_bad_layer_of_many_does_not_pass() -> None:
    found = model()
    remembered = canary.make(found)
    assert remembered is not None
    found.model.layers[1].mlp.down_proj.weight.data.neg_()
    with pytest.raises(CanaryError):
        canary.check(found, remembered)


def test_load_asks_the_canary(bitmask: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name] = tensors[name].flip(0).contiguous()

    edit_weights(bitmask, swap)
    with pytest.raises(CanaryError, match="not those that were saved"):
        checkpoint.load(bitmask)


def test_the_canary_keeps_the_mode_and_has_no_gradient() -> None:
    found = model().train()
    remembered = canary.make(found)
    assert found.training and remembered == canary.make(found.eval())
    json.dumps(remembered)


def test_nan_logits_do_not_pass() -> None:
    found = model()
    remembered = canary.make(found)
    assert remembered is not None
    found.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(CanaryError):
        canary.check(found, remembered)


def test_models_without_token_ids_have_no_canary() -> None:
    assert canary.make(nn.Linear(2, 2)) is None


# ------------------------------------------------------------------ damage


def refused(folder: Path, match: str, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.load(folder, **kwargs)
    assert "fix: " in str(caught.value) or "refused" in str(caught.value)


def test_no_folder_and_no_config(saved: Path) -> None:
    refused(saved / "nothing", "there is no folder")
    (saved / "config.json").unlink()
    refused(saved, r"config\.json is missing")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_config(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    refused(saved, r"config\.json (cannot be read|is not a JSON object)")


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    checkpoint.densify(model()).save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", r"is no Gossamer checkpoint.*from_pretrained.*gossamer\.compress")


def test_a_missing_shard(saved: Path) -> None:
    victim = shard(saved)[1]
    victim.unlink()
    refused(saved, f"shard .*{victim.name} is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard(saved: Path, keep: int) -> None:
    victim = shard(saved)[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    refused(saved, f"shard .*{victim.name} ")


def test_a_shard_with_a_damaged_header(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)
    refused(saved, "damaged header")


def test_an_index_that_points_elsewhere(saved: Path) -> None:
    shard(saved)
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for file in ("../model.safetensors", "pytorch_model.bin", "/etc/passwd"):
        index["weight_map"] = {f"{LAYER}.weight": file}
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"not to a \.safetensors file in its own folder"):
            checkpoint.load(saved)


def test_a_pickle_is_refused(saved: Path) -> None:
    torch.save({}, saved / "pytorch_model.bin")
    checkpoint.load(saved)  # beside safetensors it is not read
    (saved / "model.safetensors").unlink()
    refused(saved, r"pytorch_model\.bin is a pickle, .* refused")


def test_no_weights_at_all(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    refused(saved, r"holds no model\.safetensors")


def test_a_newer_layout(saved: Path) -> None:
    edit_config(saved, lambda q: q.update(format_version=2))
    refused(saved, r"format_version 2 is newer than this Gossamer reads \(1\); fix: install a newer Gossamer")


@pytest.mark.parametrize("version", [None, "1", 0, True])
def test_a_senseless_layout_version(saved: Path, version: Any) -> None:
    edit_config(saved, lambda q: q.update(format_version=version))
    refused(saved, "format_version is")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "nonsense", "unknown format 'nonsense'; there are: .*bitmask"),
        ("version", 99, "version 99 is newer .*install a newer Gossamer"),
        ("version", "x", ""),
        ("shape", [48, 33], ""),
        ("shape", [49, 32], ""),
        ("shape", [-1, 32], "is not .out_features, in_features"),
        ("shape", "ab", "is not .out_features, in_features"),
        ("dtype", "float32", "is .* torch.bfloat16, config.json says .* torch.float32"),
        ("dtype", "load", "unknown dtype 'load'"),
    ],
)
def test_a_tampered_spec(saved: Path, key: str, value: Any, match: str) -> None:
    edit_config(saved, lambda q: q["layers"][LAYER]["spec"].update({key: value}))
    refused(saved, f"layer '{LAYER}': .*{match}")


def test_a_spec_that_lacks_a_key(saved: Path) -> None:
    edit_config(saved, lambda q: q["layers"][LAYER].pop("spec"))
    refused(saved, f"layer '{LAYER}': spec")


def test_a_layer_that_the_model_has_not_got(saved: Path) -> None:
    def rename(q: dict[str, Any]) -> None:
        q["layers"]["model.layers.7.mlp.up_proj"] = q["layers"].pop(LAYER)

    edit_config(saved, rename)
    refused(saved, r"layer 'model\.layers\.7\.mlp\.up_proj'")


def test_a_lender_that_does_not_lend(saved: Path) -> None:
    edit_config(saved, lambda q: q["layers"][LAYER].update(lender="lm_head"))
    refused(saved, f"layer '{LAYER}'")


def test_layers_that_are_no_layers(saved: Path) -> None:
    edit_config(saved, lambda q: q.update(layers=[1]))
    refused(saved, "lists no layers")


def test_a_tampered_mask(bitmask: Path) -> None:
    edit_weights(bitmask, lambda t: t[f"{LAYER}.mask"][0, 0].bitwise_xor_(1))
    refused(bitmask, f"layer '{LAYER}': bitmask: the mask has")
    with pytest.raises(CheckpointError, match=f"layer '{LAYER}': bitmask"):
        transformers.AutoModelForCausalLM.from_pretrained(bitmask)


def test_a_tampered_index(tmp_path: Path) -> None:
    checkpoint.save(model("nm24"), tmp_path / "nm24")
    edit_weights(tmp_path / "nm24", lambda t: t[f"{LAYER}.index"][0, 0].fill_(0))
    refused(tmp_path / "nm24", f"layer '{LAYER}': nm24: the indices")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf(saved: Path, bad: float) -> None:
    edit_weights(saved, lambda t: t[f"{LAYER}.weight"].view(-1)[:1].fill_(bad))
    refused(saved, f"layer '{LAYER}': NaN or Inf in tensor 'weight'")


def test_a_missing_tensor(saved: Path) -> None:
    edit_weights(saved, lambda t: t.pop(f"{LAYER}.weight"))
    refused(saved, f"layer '{LAYER}': tensor 'weight' is in no shard")


NORM = "model.layers.0.input_layernorm.weight"


def test_a_missing_dense_tensor_is_not_filled_with_its_initial_value(saved: Path) -> None:
    edit_weights(saved, lambda t: [t.pop(NORM), t.pop("model.norm.weight")])
    refused(saved, rf"lacks {NORM}, model\.norm\.weight; fix")


def test_a_dense_tensor_of_a_wrong_shape(saved: Path) -> None:
    edit_weights(saved, lambda t: t.update({NORM: torch.ones(7)}))
    refused(saved, rf"'{NORM}' is \[7\] in the shards of .*, config.json implies \[32\]; fix")


def test_a_sparse_layer_that_the_config_forgets(saved: Path) -> None:
    edit_config(saved, lambda c: c["layers"].pop(LAYER))
    refused(saved, rf"'{LAYER}\.weight' is \[.*\] in the shards of .*, config.json implies \[48, 32\]; fix")


def test_who_asks_for_another_shape_gets_it(tmp_path: Path) -> None:
    """A new classification head, as transformers spells it."""
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    found = transformers.BertForSequenceClassification(config).eval()
    layer = "bert.encoder.layer.0.intermediate.dense"
    old = found.get_submodule(layer)
    weight = old.weight.detach() * patterns.nm(old.weight.detach().abs())
    found.set_submodule(layer, SparseLinear.from_format(formats.registry["bitmask"].encode(weight), old.bias))
    checkpoint.save(found, tmp_path / "two")
    edit_config(tmp_path / "two", lambda c: c.pop("canary"))
    with pytest.raises(CheckpointError, match=r"'classifier\.bias' is \[2\] in"):
        checkpoint.load(tmp_path / "two", num_labels=3)
    again = checkpoint.load(tmp_path / "two", num_labels=3, ignore_mismatched_sizes=True)
    assert again.classifier.weight.shape == (3, 32)


def test_a_header_that_contradicts_itself(saved: Path) -> None:
    """Only safetensors itself would see it, in an error of its own kind."""
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[32]', b'"shape":[31]', 1))
    assert path.read_bytes() != data
    refused(saved, "damaged header .*; fix")


def test_an_architecture_that_is_not_a_model(saved: Path) -> None:
    path = saved / "config.json"
    for name in ("NoSuchModel", "pipeline", "AutoConfig"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
        refused(saved, f"has no architecture .*{name}")


def test_code_in_a_checkpoint_is_not_run(saved: Path) -> None:
    refused(saved, "trust_remote_code is refused", trust_remote_code=True)
    path = saved / "config.json"
    remote = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": remote}))
    (saved / "evil.py").write_text("raise SystemExit('executed')")
    assert sparse_layers(checkpoint.load(saved))


# ------------------------------------------------------------------ targets


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for write in (checkpoint.save, checkpoint.export):
        with pytest.raises(CheckpointError, match=r"holds something else already.*overwrite=True"):
            write(model(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    checkpoint.save(model(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work" and sparse_layers(checkpoint.load(tmp_path))


def test_a_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.save(model(), tmp_path / "file", overwrite=True)


def test_a_dense_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no sparse layer"):
        checkpoint.save(checkpoint.densify(model()), tmp_path / "out")


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    for write in (checkpoint.save, checkpoint.export):
        with pytest.raises(CheckpointError, match=r"no space for .*out: 1\d MB needed, 0 MB free; fix: free some"):
            write(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_checkpoint_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_write_card", fail)
    with pytest.raises(error):
        checkpoint.save(model(), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_kill_between_the_renames_loses_nothing(saved: Path) -> None:
    os.replace(saved, old := saved.with_name(".saved.gossamer-old"))
    (left := saved.with_name(".saved.gossamer-new")).mkdir()
    (old / "notes.txt").write_text("mine")
    checkpoint.save(model(), saved)
    assert (saved / "notes.txt").exists() and not old.exists() and not left.exists()


# ------------------------------------------------------------------ the card


def test_the_card(pristine: Path) -> None:
    text = (pristine / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert "library_name: transformers" in front and "- gossamer" in front
    snippet = body.split("```python\n", 1)[1]
    assert snippet.startswith("import gossamer")
    layers = sparse_layers(checkpoint.load(pristine))
    dense = sum(2 * a.out_features * a.in_features for a in layers.values())
    stored = formats.nbytes(a.format for a in layers.values())
    assert f"| all | | 14 | {dense} | {stored} | {1 - stored / dense:.3f} |" in body
    assert f"| `up_proj` | {pristine.name}" in body and "gossamer.export(" in body


def test_the_card_counts_a_shared_dictionary_once(tmp_path: Path) -> None:
    net = sparse_net()
    product, dense = formats.registry["product"], formats.registry["dense"]
    shared = product.of(dense.encode(torch.randn(24, 4)), dense.encode(torch.randn(4, 16)))
    net.first = SparseLinear.from_format(shared)  # type: ignore[assignment]
    borrowed = product.of(dense.encode(torch.randn(24, 4)), shared.right)
    net.third = SparseLinear.from_format(borrowed, lender=net.first)  # type: ignore[arg-type]
    checkpoint.save(net, tmp_path / "net")
    body = (tmp_path / "net" / "README.md").read_text()
    assert "| `first` | product (dense x dense) | 1 | 768 | 640 |" in body
    assert "| `third` | product (dense x dense) | 1 | 768 | 384 |" in body
    assert "| all | | 2 | 1536 | 1024 |" in body


def test_saving_does_not_change_what_a_copy_says(tmp_path: Path) -> None:
    found = model()
    twin = copy.deepcopy(found)
    checkpoint.save(found, tmp_path / "out")
    assert torch.equal(logits(found), logits(twin))
    assert found.hf_quantizer.canary is None


def test_export_never_replaces_a_sparse_checkpoint(saved: Path, tmp_path: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds something else already.*overwrite=True"):
        checkpoint.export(saved, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    checkpoint.export(saved, tmp_path / "dense")
    checkpoint.export(saved, tmp_path / "dense", overwrite=True)


def test_export_in_another_precision(saved: Path, tmp_path: Path) -> None:
    checkpoint.export(saved, tmp_path / "dense", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_config_must_tell_the_truth_about_biases(saved: Path) -> None:
    edit_config(saved, lambda q: q["layers"][LAYER].update(bias=True))
    refused(saved, f"layer '{LAYER}': config.json and the shards disagree about its bias")
    with pytest.raises(CheckpointError, match="wrong about its bias"):
        transformers.AutoModelForCausalLM.from_pretrained(saved)
    edit_config(saved, lambda q: q["layers"][LAYER].pop("bias"))
    refused(saved, f"layer '{LAYER}': bias")


def test_a_layer_without_any_of_its_tensors_is_refused_by_transformers_too(saved: Path) -> None:
    edit_weights(saved, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(f"{LAYER}.")])
    with pytest.raises(CheckpointError, match=f"layer '{LAYER}': tensor 'weight' is in no shard"):
        transformers.AutoModelForCausalLM.from_pretrained(saved)


def test_a_damaged_canary(saved: Path) -> None:
    for damaged in ("x", {"tokens": [10**6]}, {"tokens": []}):
        edit_config(saved, lambda q, c=damaged: q.update(canary=c))
        with pytest.raises(CheckpointError, match="fix"):
            checkpoint.load(saved)


def test_saving_through_a_link_writes_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        checkpoint.save(model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_others_can_read_what_the_umask_lets_them(saved: Path) -> None:
    modes = {(saved / name).stat().st_mode & 0o777 for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1
