import json

import pytest
import torch
from torch import nn

from gossamer import layers
from gossamer.layers import LayerError
from gossamer.once import say
from gossamer.shards import CheckpointError

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
GATED = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GATED += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
MODELS = {
    "llama": (transformers.LlamaConfig(num_key_value_heads=2, **TINY), "model.layers", GATED),
    "qwen2": (transformers.Qwen2Config(num_key_value_heads=2, **TINY), "model.layers", GATED),
    "gpt2": (
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0),
        "transformer.h",
        [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    ),
    # Parallel attention and MLP behind two norms, and behind one: only the latter share an input.
    "gpt_neox": (
        transformers.GPTNeoXConfig(**TINY),
        "gpt_neox.layers",
        [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
    ),
    "phi": (
        transformers.PhiConfig(**TINY),
        "model.layers",
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    ),
}


def make(name, device="cpu"):
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(MODELS[name][0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", MODELS)
def test_groups_are_the_layers_that_read_one_tensor(name, device):
    _, prefix, groups = MODELS[name]
    blocks = layers.find(make(name, device))
    assert [b.name for b in blocks] == [f"{prefix}.{i}" for i in range(3)]
    for block in blocks:
        assert block.groups == tuple(tuple(f"{block.name}.{n}" for n in group) for group in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_experts_stay_dense_and_are_told(dtype, caplog):
    """On the meta device, where their default product is known for some shapes in bfloat16 only."""
    sizes = TINY | {"intermediate_size": 36, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **sizes)).to(dtype)
    before = model.get_experts_implementation()
    say.cache_clear()
    blocks = layers.find(model)
    layers.find(model)
    assert [len(group) for group in blocks[0].groups] == [3, 1]
    assert model.get_experts_implementation() == before
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "3-d tensors such as 0.mlp.experts.gate_up_proj" in told[0]


def test_weight_of_conv1d_is_out_by_in():
    conv = make("gpt2").transformer.h[0].attn.c_attn
    x = torch.randn(5, 32)
    assert layers.shape_of(conv) == (96, 32)
    torch.testing.assert_close(x @ layers.weight_of(conv).T + conv.bias, conv(x))


class Toy(nn.Module):
    def __init__(self, forward=None):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.small = nn.ModuleList([nn.Linear(4, 4)])
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)])
        self.blocks[0].unused = nn.Linear(4, 4)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block[1](block[0](x))
        return x


def test_largest_list_wins_and_a_layer_that_never_runs_stays_dense(caplog):
    blocks = layers.find(Toy())
    assert blocks[0].groups == (("blocks.0.0",), ("blocks.0.1",))
    assert "blocks.0.unused was not called" in caplog.text


def test_errors_name_the_fix():
    with pytest.raises(LayerError, match=r"no nn\.ModuleList of equal blocks"):
        layers.find(nn.Linear(4, 4))
    broken = Toy()
    broken.blocks[1][1] = nn.Linear(9, 4)
    with pytest.raises(LayerError, match=r"Toy: a forward pass over 8 token ids failed.*fix"):
        layers.find(broken)
    bare = Toy()
    bare.blocks = nn.ModuleList([nn.Embedding(100, 4)])
    with pytest.raises(LayerError, match="no linear layers in blocks"):
        layers.find(bare)


def test_trace_leaves_no_hooks_and_restores_the_mode():
    model = make("llama").train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    layers.find(model)
    assert model.training and not model.model.layers[1].training and model.config.use_cache
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.fixture
def folder(tmp_path):
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60kB")
    return tmp_path


def test_skeleton_reads_no_weights(folder):
    model = layers.skeleton(folder)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16


def test_skeleton_of_another_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(LayerError, match=r"layers\.0\.mlp\.gate_proj\.weight is \(64, 32\).*\(80, 32\).*fix"):
        layers.skeleton(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(LayerError, match=r"model\.layers\.3\..*is in no shard"):
        layers.skeleton(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gossamer"}}))
    with pytest.raises(LayerError, match="compressed already"):
        layers.skeleton(folder)


def test_skeleton_of_a_bad_folder(folder, tmp_path_factory):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        layers.skeleton(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        layers.skeleton(folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(LayerError, match=r"no config\.json"):
        layers.skeleton(empty)
    (empty / "x.gguf").touch()
    with pytest.raises(LayerError, match=r"GGUF.*transformers.*first"):
        layers.skeleton(empty)
