"""What several test files need, and which tests a machine without a GPU leaves out."""

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for mark, needed in (("gpu", 1), ("multigpu", 2)):
        skip = pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {gpus}")
        for item in items:
            if gpus < needed and item.get_closest_marker(mark):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def at() -> Callable[[int, int, int], torch.Tensor]:
    """(address, rows, columns) -> the bfloat16 matrix that lies there, in main memory."""

    def found(address: int, rows: int, cols: int) -> torch.Tensor:
        held = (ctypes.c_uint16 * (rows * cols)).from_address(address)
        return torch.frombuffer(held, dtype=torch.bfloat16).view(rows, cols)

    return found


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder: 2 Llama blocks of width 32, random weights, a tokenizer whose tokens are bytes."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<end>", *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def legacy_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """The tiny model pruned 2:4, as compressed-tensors used to write it (sparse-24-bitmask)."""
    from safetensors.torch import load_file, save_file

    from gossamer import patterns
    from gossamer.formats.bitmask import pack_bits

    folder = tmp_path / "legacy"
    shutil.copytree(tiny_folder, folder)
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if "_proj" in n]:
        weight = state.pop(name)
        mask = patterns.nm(weight.abs())
        layer = name.removesuffix(".weight")
        state[f"{layer}.shape"] = torch.tensor(weight.shape).view(-1, 1)
        state[f"{layer}.compressed"] = weight[mask].view(weight.shape[0], -1)
        state[f"{layer}.bitmask"] = pack_bits(mask)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense"}
    config["quantization_config"]["sparsity_config"] = {"format": "sparse-24-bitmask", "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))

    return folder


def small_bert():
    """A BERT of 2 layers of width 32; its 61 tokens are punctuation and letters."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=61, max_position_embeddings=64, **sizes), add_pooling_layer=False).eval()


@pytest.fixture
def bert():
    pytest.importorskip("transformers")
    return small_bert()


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of `small_bert`, with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    import string

    folder = tmp_path_factory.mktemp("bert") / "model"
    small_bert().save_pretrained(folder)
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "!", "?", ",", *letters]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
