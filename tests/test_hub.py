"""The transformers plug-in: save here, load in other processes, with and without Gossamer."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

import gossamer.hub.lazy as lazy  # noqa: E402
from gossamer import checkpoint, formats, patterns  # noqa: E402
from gossamer.formats.product import Product  # noqa: E402
from gossamer.hub.transformers import GossamerConfig, attach  # noqa: E402
from gossamer.nn import SparseLinear, sparse_layers  # noqa: E402
from gossamer.shards import CheckpointError  # noqa: E402

IDS = torch.arange(1, 11)[None]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def llama(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
    # Not `.to(dtype)`: that would round the rotary frequencies as well, which loading does not.
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes | config), dtype=dtype).eval()


def qwen2() -> Any:
    torch.manual_seed(1)
    sizes = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()


def gpt2() -> Any:
    torch.manual_seed(2)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config).eval()


def weights(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Name -> (weight [out, in] in bf16, bias) of the block linears."""
    found = {}
    for name, layer in model.named_modules():
        if name == "lm_head" or type(layer).__name__ not in ("Linear", "Conv1D"):
            continue
        weight = layer.weight.detach().to(torch.bfloat16)
        found[name] = (weight if isinstance(layer, nn.Linear) else weight.mT.contiguous(), layer.bias)
    return found


def sparsify(model: Any, name: str = "bitmask") -> Any:
    """Every block linear at 2:4 in format `name`; biases made visible."""
    for layer, (weight, bias) in weights(model).items():
        kept = weight * patterns.nm(weight.abs().float())
        bias = None if bias is None else torch.randn_like(bias)
        model.set_submodule(layer, SparseLinear.from_format(formats.registry[name].encode(kept), bias))
    return attach(model)


def share(model: Any) -> Any:
    """q/k/v and gate/up as products with one dictionary each, the rest as products of their own."""
    lenders: dict[str, SparseLinear] = {}
    for name, (weight, bias) in weights(model).items():
        owner = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        lender = lenders.get(owner)
        codes = torch.randn(weight.shape[0], 16).to(torch.bfloat16)
        left = formats.registry["nm24"].encode(codes * patterns.nm(codes.abs().float()))
        right = lender.format.right if lender else formats.registry["dense"].encode(weight[:16].contiguous())
        lenders[name] = SparseLinear.from_format(Product.of(left, right), bias, lender=lender)
        model.set_submodule(name, lenders[name])
    return attach(model)


CASES = {
    "bitmask": lambda: sparsify(llama(tie_word_embeddings=True)),
    "nm24": lambda: sparsify(qwen2(), "nm24"),
    "product": lambda: share(llama()),
    "conv1d": lambda: sparsify(gpt2()),
    "bfloat16": lambda: sparsify(llama(torch.bfloat16)),
}

RELOAD = """
import json, sys
root, first, *cases = sys.argv[1:]
if first == "gossamer":
    import gossamer
    assert not any(m.split(".")[0] in ("transformers", "rich", "typer") for m in sys.modules), "import is not light"
    import transformers
elif first == "transformers":
    import transformers.quantizers.auto
    import gossamer
    import gossamer  # twice is once
import transformers, torch
from safetensors.torch import load_file
report = {}
for case in cases:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{root}/{case}")
        want = load_file(f"{root}/{case}.ref")
        with torch.no_grad():
            logits = model(want["ids"]).logits
            equal, close = torch.equal(logits, want["logits"]), torch.allclose(logits, want["logits"], atol=1e-4)
        tokens = model.generate(want["ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
        report[case] = {"equal": equal, "close": close, "generates": torch.equal(tokens, want["tokens"])}
        if first == "gossamer":
            model.save_pretrained(f"{root}/{case}-again")
    except Exception as error:
        report[case] = {"error": f"{type(error).__name__}: {error}"}
if first != "none":
    import importlib
    auto = importlib.reload(transformers.quantizers.auto)
    assert "gossamer" in auto.AUTO_QUANTIZER_MAPPING and "gossamer" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
else:
    assert "gossamer" not in sys.modules
print(json.dumps(report))
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the other processes: on some CPUs the bits of torch's products depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per case, written by plain save_pretrained, with the answers of the model in memory beside it."""
    root = tmp_path_factory.mktemp("hub")
    for case, make in CASES.items():
        model = make()
        with torch.no_grad():
            logits = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for name in (case, f"{case}-dense"):
            save_file({"ids": IDS, "logits": logits, "tokens": tokens}, root / f"{name}.ref")
        model.save_pretrained(root / case, max_shard_size="8KB" if case == "bitmask" else "5GB")
        checkpoint.export(model, root / f"{case}-dense")
    return root


@pytest.fixture(scope="module")
def reports(root: Path) -> dict[str, Any]:
    """What three processes made of those folders, by what they import first."""
    asked = {
        "gossamer": list(CASES),
        "transformers": ["bitmask", "product"],
        "none": [*CASES, "bitmask-dense", "nm24-dense", "conv1d-dense"],
    }
    running = {
        first: subprocess.Popen(
            [sys.executable, "-c", RELOAD, str(root), first, *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        for first, cases in asked.items()
    }
    outputs = {first: process.communicate(timeout=240) for first, process in running.items()}
    return {
        first: json.loads(out.splitlines()[-1]) if running[first].returncode == 0 else err
        for first, (out, err) in outputs.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_gives_the_same_bits(reports: dict[str, Any], case: str) -> None:
    assert reports["gossamer"][case] == {"equal": True, "close": True, "generates": True}


def test_the_order_of_imports_does_not_matter(reports: dict[str, Any]) -> None:
    good = {"equal": True, "close": True, "generates": True}
    assert reports["transformers"] == {"bitmask": good, "product": good}


@pytest.mark.parametrize("case", CASES)
def test_without_gossamer_loading_fails_instead_of_inventing_weights(reports: dict[str, Any], case: str) -> None:
    assert "ignore_mismatched_sizes" in reports["none"][case]["error"]


@pytest.mark.parametrize("case", ["bitmask", "nm24", "conv1d"])
def test_an_export_loads_without_gossamer(reports: dict[str, Any], case: str) -> None:
    """Decoding these formats is exact, and in float32 the reference kernel does what a dense layer does."""
    report = reports["none"][f"{case}-dense"]
    assert report["close"] and report["generates"]


def test_an_export_of_a_product_is_the_product(root: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(root / "product-dense")
    want = load_file(root / "product.ref")["logits"]
    torch.testing.assert_close(dense(IDS).logits, want, rtol=1e-3, atol=1e-3)
    assert not hasattr(dense.config, "quantization_config")


@pytest.mark.parametrize("case", CASES)
def test_saving_again_writes_the_same_tensors(reports: dict[str, Any], root: Path, case: str) -> None:
    assert reports["gossamer"][case].get("equal")
    assert {n: t.shape for n, t in everything(root / f"{case}-again").items()} == {
        n: t.shape for n, t in everything(root / case).items()
    }
    for name, tensor in everything(root / case).items():
        assert torch.equal(tensor, everything(root / f"{case}-again")[name])


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_small_shards_and_tied_embeddings(root: Path) -> None:
    assert len(list((root / "bitmask").glob("*.safetensors"))) > 3
    names = everything(root / "bitmask")
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "lm_head.weight" not in everything(root / "bitmask-dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(root / "bitmask-dense")
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_a_shared_dictionary_is_on_disk_once(root: Path) -> None:
    names = [n for n in everything(root / "product") if n.startswith("model.layers.0.") and "right_" in n]
    held = {n.rpartition(".")[0].rpartition(".")[2] for n in names}
    assert held == {"q_proj", "o_proj", "gate_proj", "down_proj"}


def test_conv1d_weights_are_exported_the_way_they_came(root: Path) -> None:
    dense = everything(root / "conv1d-dense")
    assert dense["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    model = transformers.GPT2LMHeadModel.from_pretrained(root / "conv1d")
    layer = model.transformer.h[0].attn.c_proj  # square, so only the values tell the orientation
    assert torch.equal(dense["transformer.h.0.attn.c_proj.weight"], layer.decode(torch.float32).mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_tensors_keep_their_dtype(root: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "nm24", dtype=dtype)
    layers = sparse_layers(model)
    assert model.dtype == dtype and len(layers) == 14
    for layer in layers.values():
        assert layer.weight.dtype == torch.bfloat16 and layer.index.dtype == torch.uint8
        assert not any(p.requires_grad for p in layer.parameters())
    assert layers["model.layers.0.self_attn.q_proj"].bias.dtype == dtype
    model.save_pretrained(tmp_path)
    before, after = everything(root / "nm24"), everything(tmp_path)
    for name in layers:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


def test_weights_that_a_model_keeps_in_float32_stay_as_stored(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 lists `wo` in _keep_in_fp32_modules; transformers then casts what it reads."""
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "_keep_in_fp32_modules_strict", ["down_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "nm24", dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(IDS).logits).all()


def test_device_map_auto_counts_stored_bytes(root: Path) -> None:
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "product", device_map="auto")
    want = load_file(root / "product.ref")["logits"]
    torch.testing.assert_close(model(IDS.to(model.device)).logits.cpu(), want)
    layers = sparse_layers(model)
    counted = sum(
        p.numel() * model.hf_quantizer.param_element_size(model, f"{name}.{n}", p)
        for name, layer in layers.items()
        for n, p in layer.named_parameters()
    )
    assert counted == formats.nbytes(layer.format for layer in layers.values())


def test_offload_to_disk(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    where = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "nm24", device_map=where, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_file(root / "nm24.ref")["logits"])
    # A dictionary would be away when its borrower runs: said at once, not at the first forward.
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj' borrows a dictionary.*without offload"):
        transformers.AutoModelForCausalLM.from_pretrained(root / "product", device_map=where, offload_folder=tmp_path)


def test_compile_keeps_the_graph_whole(root: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "product")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


def test_the_base_model_loads_from_a_checkpoint_of_the_head_model(root: Path) -> None:
    base = transformers.AutoModel.from_pretrained(root / "product")
    whole = transformers.AutoModelForCausalLM.from_pretrained(root / "product")
    assert "layers.0.self_attn.k_proj" in sparse_layers(base)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_dequantize_is_densify(root: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "bitmask")
    model.dequantize()
    assert not sparse_layers(model) and not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, load_file(root / "bitmask.ref")["logits"])


def test_a_missing_tensor_is_an_error_not_a_random_layer(root: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "nm24")
    model.save_pretrained(tmp_path)
    tensors = everything(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj.*'weight' is in no shard"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_cannot_be_loaded_as_sparse(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this one is dense; fix: .*gossamer\.compress"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GossamerConfig())


def test_a_newer_config_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"format_version 2 is newer .*install a newer Gossamer"):
        GossamerConfig.from_dict({"quant_method": "gossamer", "format_version": 2, "layers": {}})


def test_a_tied_weight_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    weight = model.lm_head.weight.detach()
    model.set_submodule("lm_head", SparseLinear.from_format(formats.registry["bitmask"].encode(weight)))
    with pytest.raises(CheckpointError, match="layer 'lm_head' is tied"):
        attach(model)


def test_a_copy_and_a_changed_model_save_what_they_hold(tmp_path: Path) -> None:
    model = copy.deepcopy(sparsify(llama()))
    dense = nn.Linear(32, 32, bias=False)
    model.set_submodule("model.layers.0.self_attn.o_proj", dense)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].self_attn.o_proj.weight, dense.weight)
    assert len(sparse_layers(again)) == 13


def test_install_twice_changes_nothing() -> None:
    lazy.install()
    before = len(sys.meta_path)
    lazy.install()
    assert len(sys.meta_path) == before


def test_a_failing_plugin_does_not_break_the_import(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ImportError("no such name")

    monkeypatch.setattr("gossamer.hub.transformers.register", broken)
    lazy.install()
    assert "could not register with transformers (no such name)" in caplog.text


def test_metadata_of_the_shards_says_torch(root: Path) -> None:
    """transformers refuses safetensors files without it."""
    for file in (root / "bitmask").glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata()["format"] == "pt"


def test_lora_trains_on_a_sparse_base() -> None:
    peft = pytest.importorskip("peft")
    from gossamer.hub.peft import lora

    model = sparsify(llama())
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = peft.get_peft_model(model, lora(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(5):
        loss = tuned(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(p, base[n.replace("base_layer.", "")]) for n, p in model.named_parameters() if "lora" not in n
    )


def test_an_adapter_comes_back_and_is_merged_into_dense_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from gossamer.hub.peft import lora

    model = sparsify(llama())
    config = lora(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    tuned.save_pretrained(tmp_path)
    config = lora(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, config=config).eval()
    assert torch.equal(again(IDS).logits, tuned(IDS).logits)
    with pytest.raises(ValueError, match=r"cannot be merged into a sparse weight; fix: .*densify"):
        again.merge_and_unload()
    dense = peft.PeftModel.from_pretrained(checkpoint.densify(model), tmp_path).merge_and_unload()
    torch.testing.assert_close(dense(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-4)
