import pytest
import torch
from torch import nn

from gossamer import layers
from gossamer.calibrate import Calibration, Stream
from gossamer.stats import CalibrationError

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS = {
    "llama": transformers.LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **TINY),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0),
    # Masks and rotary embeddings that differ from block to block.
    "gemma3": transformers.Gemma3TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **TINY,
    ),
    "eager": transformers.Qwen2Config(num_key_value_heads=2, attn_implementation="eager", **TINY),
}


def words(text, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [ord(c) for c in text]}


def test_texts_are_packed_end_to_end_and_no_further():
    def texts():
        yield from ("abcd", "", "efghij")
        raise AssertionError("read more than was needed")

    ids = Calibration.of(texts(), words, samples=3, length=3).ids
    assert ids.tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, 105]]
    assert Calibration.of("abcdefghij", words, 3, 3).digest() == Calibration(ids).digest()


def test_token_ids_in_every_shape():
    expected = [[1, 2], [3, 4]]
    assert Calibration.of([[1, 2, 3], torch.tensor([4, 5])], None, 2, 2).ids.tolist() == expected
    assert Calibration.of(torch.tensor([1, 2, 3, 4, 5]), None, 2, 2).ids.tolist() == expected
    assert Calibration.of(torch.tensor(expected, dtype=torch.int32), None, 7, 7).ids.tolist() == expected


def test_digest_sees_the_shape():
    ids = torch.arange(6)
    assert Calibration(ids.view(2, 3)).digest() != Calibration(ids.view(3, 2)).digest()


@pytest.mark.parametrize(
    "data, tokenizer, match",
    [
        ([], words, "empty"),
        ("", words, "empty"),
        ("abcdefg", words, r"has 7 tokens, 4 windows of 3 take 12; fix: .*ask for 2 samples"),
        ("ab", words, r"has 2 tokens.*1 sample of length 2"),
        ("abc", None, "tokenizer"),
        ([[0.5, 1.0]], None, "not integers"),
        (torch.zeros(2, 2), None, "not .samples, length. int"),
    ],
)
def test_bad_data(data, tokenizer, match):
    with pytest.raises(CalibrationError, match=match):
        Calibration.of(data, tokenizer, samples=4, length=3)


def test_ids_and_windows_that_the_model_cannot_read():
    model = make("llama")
    with pytest.raises(CalibrationError, match=r"from 0 to 64, the model knows 0 to 63.*tokenizer"):
        Calibration(torch.tensor([[0, 64]])).check(model)
    with pytest.raises(CalibrationError, match="65 tokens, the model reads at most 64; fix: a length of 64"):
        Calibration(torch.zeros(1, 65, dtype=torch.long)).check(model)


def make(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name])


def streamed(model, ids, folder):
    blocks = layers.find(model)
    stream = Stream(model, layers.block_modules(model, blocks), Calibration(ids), folder)
    stream.start()
    stats = {}
    for i, block in enumerate(blocks):
        watch = {g[0]: model.get_submodule(g[0]) for g in block.groups}
        stats |= stream.run(i, watch, onward=i + 1 < len(blocks))
    return stats


@pytest.mark.parametrize("name", CONFIGS)
def test_grams_are_those_of_whole_forward_passes(name, tmp_path):
    model, ids = make(name), torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(1))
    stats = streamed(model.train(), ids, tmp_path)
    assert model.training and model.config.use_cache is not False
    seen = {}

    def watch(layer):
        def hook(_, args):
            x = args[0].detach().flatten(0, -2).double()
            seen[layer] = seen.get(layer, 0) + x.T @ x

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in stats]
    with torch.no_grad():
        model.eval()(ids)
    assert len(hooks) == len(stats) == 12
    for n, found in stats.items():
        assert found.tokens == 96 and found.gram.dtype == torch.float64
        torch.testing.assert_close(found.gram, seen[n], rtol=1e-4, atol=1e-4)


def test_streaming_repeats_to_the_bit(tmp_path):
    model, ids = make("llama").to(torch.bfloat16), torch.arange(64).view(4, 16)
    first, second = streamed(model, ids, tmp_path / "a"), streamed(model, ids, tmp_path / "b")
    assert all(torch.equal(first[n].gram, second[n].gram) for n in first)
    assert (tmp_path / "a" / "002.bin").read_bytes() == (tmp_path / "b" / "002.bin").read_bytes()
    assert (tmp_path / "a" / "002.bin").stat().st_size == 64 * 32 * 2


def test_batches_divide_the_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("gossamer.calibrate.CPU_TOKENS", 64)
    model, ids = make("gpt2"), torch.zeros(6, 16, dtype=torch.long)
    stream = Stream(model, list(model.transformer.h), Calibration(ids), tmp_path)
    assert (stream.batch, stream.batches) == (3, 2)
    ticks = []
    stream.start()
    stream.run(0, tick=lambda done, total: ticks.append((done, total)))
    assert ticks == [(1, 2), (2, 2)] and stream.has(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_name_the_layer_and_leave_no_boundary(bad, tmp_path):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = bad
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.gate_proj: NaN or Inf"):
        streamed(model, torch.zeros(2, 8, dtype=torch.long), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.bin", "001.bin"]
    assert not any(m._forward_pre_hooks for m in model.modules())


class PerWindow(nn.Module):
    """Its blocks get the ids too, which streaming cannot know for later windows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([Adder() for _ in range(2)])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(hidden_states=x, ids=input_ids)[0]
        return x


class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states, ids):
        return (self.linear(hidden_states) + ids[..., None],)


def test_blocks_that_need_more_than_hidden_states_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gossamer.calibrate.CPU_TOKENS", 3)
    model = PerWindow()
    with pytest.raises(CalibrationError, match="PerWindow take more than hidden states"):
        streamed(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), tmp_path)
    assert len(streamed(model, torch.tensor([[1, 2, 3], [1, 2, 3]]), tmp_path)) == 2


def test_rows_of_a_data_set_are_named():
    with pytest.raises(CalibrationError, match=r"holds a dict; fix: pass texts or token ids"):
        Calibration.of([{"text": "It was the best of times"}], None, 1, 4)
