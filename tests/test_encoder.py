"""The int8 encoder: the native pipeline against its emulation and the model, files, and every bad input."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.kernels import _bsr
from gossamer.nn import SparseLinear

transformers = pytest.importorskip("transformers")
from gossamer import encoder as encoders  # noqa: E402
from gossamer.encoder import Encoder, EncoderError, blob, files, pack, reference  # noqa: E402
from gossamer.shards import CheckpointError  # noqa: E402

pytestmark = pytest.mark.skipif(pack._core is None, reason="the compiled encoder is not built")
WORDS = 97
LEVELS = [*dict.fromkeys([*_bsr.isas(), "scalar"])] if _bsr.available() else []


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


class Tokenizer:
    """A word is its number; 0 pads."""

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
        rows = [[2 + zlib.crc32(word.encode()) % (WORDS - 2) for word in text.split()][:max_length] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


# 1,040 tokens.
TEXTS = [" ".join(str(i * j) for j in range(4 * i)) for i in range(1, 32, 2)] + ["word " * 16]


def convert(model: nn.Module) -> Encoder:
    return encoders.convert(model, Tokenizer(), TEXTS)


def pruned(module: nn.Module, sparsity: float, block: int = 1) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            m, k = layer.weight.shape
            keep = torch.rand(m // 4, 1, k // block, 1) >= sparsity
            layer.weight.data.mul_(keep.expand(-1, 4, -1, block).reshape(m, k))


def made(kind: str = "bert", sparsity: float = 0.5, block: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "max_position_embeddings": 200, **options}
    if kind == "distilbert":
        config = transformers.DistilBertConfig(dim=64, n_heads=4, n_layers=2, hidden_dim=128, **sizes)
        model = transformers.DistilBertModel(config)
    else:
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128} | sizes
        names = {"bert": "Bert", "roberta": "Roberta"}
        config = getattr(transformers, f"{names[kind]}Config")(**sizes)
        model = getattr(transformers, f"{names[kind]}Model")(config)
    for p in model.parameters():  # far from what they are at first, where layers hardly matter
        p.data += 0.1 * torch.randn_like(p)
    pruned(model, sparsity, block)
    return model.eval()


def batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)).expand(len(lengths), -1) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(2, WORDS, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def emulated(own: Encoder, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        types = inputs.get("token_type_ids")
        return reference.forward(own.parts, inputs["input_ids"], inputs["attention_mask"], types)


def alike(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Cosine of the mean hidden state, per sentence."""
    mean = [(x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True) for x in (a, b)]
    return torch.cosine_similarity(*mean, dim=-1)


@pytest.fixture(scope="module")
def bert() -> Encoder:
    return convert(made())


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(("sparsity", "block"), [(0.0, 1), (0.7, 1), (0.5, 4)])
def test_is_what_the_emulation_and_the_model_say(kind: str, sparsity: float, block: int) -> None:
    options: dict[str, Any] = {"pad_token_id": 0} if kind != "roberta" else {"pad_token_id": 1}
    model = made(kind, sparsity, block, **options)
    own, inputs = convert(model), batch([5, 70, 1, 33])
    if kind == "bert":
        inputs["token_type_ids"] = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"]) % 2
    with torch.no_grad():
        expected = model(**inputs)
    found = own(**inputs)
    assert own.parts.sparsity == pytest.approx(sparsity, abs=0.03)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    mask = inputs["attention_mask"]
    assert alike(found[0], emulated(own, inputs), mask).min() > 0.999
    assert alike(found[0], expected[0], mask).min() > 0.99
    if "pooler_output" in found:
        assert torch.cosine_similarity(found.pooler_output, expected.pooler_output).min() > 0.98
    assert isinstance(own(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kernel", ["bsr", "amx"])
@pytest.mark.parametrize("function", ["gelu", "gelu_new", "relu", "silu"])
def test_every_instruction_set(level: str, kernel: str, function: str) -> None:
    if kernel == "amx" and (level != "avx512" or not _bsr.amx()):
        pytest.skip("no AMX")
    own = convert(made(hidden_act=function))
    own = Encoder(own.parts, own.config, arrays=pack.pack(own.parts, kernel))
    inputs = batch([64, 17, 130, 2, 16])
    best = pack.require().isa()
    try:
        pack.require().set_isa(level)
        found = own(**inputs).last_hidden_state
    finally:
        pack.require().set_isa(best)
    assert alike(found, emulated(own, inputs), inputs["attention_mask"]).min() > 0.999


def test_threads_and_neighbours_change_no_bit(bert: Encoder) -> None:
    lengths = [3, 64, 1, 190, 65, 16, 120, 80, 200, 7]
    inputs, before = batch(lengths), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bert(**inputs).last_hidden_state)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for i, length in enumerate(lengths):
        alone = bert(inputs["input_ids"][i : i + 1, :length]).last_hidden_state
        assert torch.equal(alone[0], found[0][i, :length])


def test_padding_anywhere_is_skipped_and_zero(bert: Encoder) -> None:
    ids = batch([40])["input_ids"]
    mask = (torch.arange(40) % 3 != 1).long().unsqueeze(0)
    found = bert(ids, mask).last_hidden_state
    assert (found[0, mask[0] == 0] == 0).all() and (found[0, mask[0] == 1] != 0).any(-1).all()
    assert alike(found, emulated(bert, {"input_ids": ids, "attention_mask": mask}), mask).min() > 0.999


def test_rows_of_padding_and_empty_batches(bert: Encoder) -> None:
    inputs = batch([5, 5, 5])
    inputs["attention_mask"][1] = 0
    found = bert(**inputs)
    assert (found.last_hidden_state[1] == 0).all() and found.pooler_output.isfinite().all()
    assert torch.equal(found.last_hidden_state[2], bert(inputs["input_ids"][2:]).last_hidden_state[0])
    assert bert(torch.zeros(0, 7, dtype=torch.long)).last_hidden_state.shape == (0, 7, 64)
    assert bert(torch.zeros(2, 0, dtype=torch.long)).last_hidden_state.shape == (2, 0, 64)
    nothing = bert(inputs["input_ids"], torch.zeros_like(inputs["input_ids"]))
    assert (nothing.last_hidden_state == 0).all()


def test_positions_and_types_may_be_given(bert: Encoder) -> None:
    ids = batch([20])["input_ids"]
    plain = bert(ids).last_hidden_state
    assert torch.equal(bert(ids, position_ids=torch.arange(20).unsqueeze(0)).last_hidden_state, plain)
    assert not torch.equal(bert(ids, position_ids=torch.arange(20).unsqueeze(0) + 1).last_hidden_state, plain)
    assert not torch.equal(bert(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state, plain)


def test_calls_from_many_threads(bert: Encoder) -> None:
    inputs = [batch([10 + i, 90]) for i in range(4)]
    expected = [bert(**x).last_hidden_state for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(bert(**inputs[i]).last_hidden_state, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_runs_it(bert: Encoder) -> None:
    ids = batch([80])["input_ids"]
    expected = bert(ids).last_hidden_state
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(bert(ids).last_hidden_state, expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_sparse_layers_are_taken_as_they_are() -> None:
    model = made(sparsity=0.75)
    own = convert(model)
    for name, layer in list(model.encoder.named_modules()):
        if isinstance(layer, nn.Linear):
            sparse = SparseLinear.from_format(BsrInt8.encode(layer.weight.data), layer.bias.data)
            model.encoder.set_submodule(name, sparse)
    again = convert(model)
    inputs = batch([30, 50])
    assert again.parts.sparsity == own.parts.sparsity
    assert torch.equal(own(**inputs).last_hidden_state, again(**inputs).last_hidden_state)


class Doubled(nn.Linear):
    """A linear layer that is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("which", [0, 1])
def test_an_unsupported_layer_is_named_and_left_dense(which: int, caplog: pytest.LogCaptureFixture) -> None:
    model = made(num_hidden_layers=3)
    layer: Any = model.encoder.layer[which]
    layer.output.dense = Doubled(128, 64)
    with caplog.at_level(logging.WARNING, "gossamer"):
        own = convert(model)
    assert f"encoder.layer.{which} is left dense: output.dense is a Doubled" in caplog.text
    inputs = batch([9, 70])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    assert alike(own(**inputs).last_hidden_state, expected, mask).min() > 0.99
    with pytest.raises(CheckpointError, match=f"layers {which} were left dense"):
        own.save("nowhere")


def test_refuses_models_that_are_no_such_encoder() -> None:
    with pytest.raises(EncoderError, match="none of the encoders that run here"):
        convert(nn.Linear(3, 3))
    config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64)
    with pytest.raises(EncoderError, match=r"model\.bert = gossamer\.encoder\.convert\(model\.bert"):
        convert(transformers.BertForSequenceClassification(config))
    with pytest.raises(EncoderError, match="decoder"):
        config.is_decoder = True
        convert(transformers.BertModel(config))
    model = made()
    model.embeddings.extra = nn.Linear(64, 64)
    with pytest.raises(EncoderError, match=r"embeddings\.extra is a Linear"):
        convert(model)
    with pytest.raises(EncoderError, match="no layer of this model"):
        convert(made(hidden_size=40, num_attention_heads=4))


def test_takes_a_place_under_a_head() -> None:
    base = made(sparsity=0.0)
    model = transformers.BertForSequenceClassification(base.config).eval()
    model.bert = base
    inputs = batch([12, 30])
    with torch.no_grad():
        expected = model(**inputs).logits
        model.bert = convert(model.bert)
        assert torch.allclose(model(**inputs).logits, expected, atol=0.05)


def test_calibration_on_one_sentence_and_on_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gossamer"):
        own = encoders.convert(made(), Tokenizer(), ["one sentence of six short words"])
    assert "calibrated on 6 tokens of 1 sentence(s)" in caplog.text
    assert own(**batch([30])).last_hidden_state.isfinite().all()
    with pytest.raises(EncoderError, match="no sentence to calibrate on"):
        encoders.convert(made(), Tokenizer(), [])
    with pytest.raises(EncoderError, match="not calibrated"):
        Encoder(replace(own.parts, layers=tuple(replace(a, scales=None) for a in own.parts.int8())), own.config)


def test_bad_inputs(bert: Encoder) -> None:
    ids = batch([8])["input_ids"]
    with pytest.raises(EncoderError, match=r"201 tokens is longer than the 200.*truncation"):
        bert(torch.ones(1, 201, dtype=torch.long))
    with pytest.raises(IndexError, match=r"token id 97 of row 0, token 3 is not in 0 \.\. 96"):
        bert(torch.where(torch.arange(8) == 3, WORDS, ids))
    with pytest.raises(IndexError, match="token id -1"):
        bert(torch.full_like(ids, -1))
    with pytest.raises(IndexError, match="token type 2"):
        bert(ids, token_type_ids=torch.full_like(ids, 2))
    with pytest.raises(IndexError, match="position 200"):
        bert(ids, position_ids=torch.full_like(ids, 200))
    for wrong in (None, ids.float(), ids[0]):
        with pytest.raises(EncoderError, match="input_ids are integers"):
            bert(wrong)
    with pytest.raises(EncoderError, match="attention_mask has the shape"):
        bert(ids, torch.ones(1, 1, 8, 8))
    with pytest.raises(EncoderError, match="output_attentions"):
        bert(ids, output_attentions=True)
    # Nothing that the mask leaves out is looked up.
    mask = (torch.arange(8) != 3).long().unsqueeze(0)
    assert bert(torch.where(torch.arange(8) == 3, WORDS, ids), mask).last_hidden_state.isfinite().all()


def test_no_positions_left_for_roberta() -> None:
    own = convert(made("roberta", pad_token_id=1))
    assert own.parts.longest == 198
    own(torch.full((1, 198), 5))
    with pytest.raises(EncoderError, match="longer than the 198"):
        own(torch.full((1, 199), 5))


def test_saves_and_loads_to_the_bit(bert: Encoder, tmp_path: Path) -> None:
    inputs = batch([20, 130])
    expected = bert(**inputs)
    bert.save(tmp_path / "folder")
    for _ in range(2):  # packs, then maps what was packed
        again = gossamer.load(tmp_path / "folder")
        found = again(**inputs)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.pooler_output, expected.pooler_output)
    assert len(list((tmp_path / "cache" / "encoders").glob("*.blob"))) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").touch()
    with pytest.raises(CheckpointError, match="holds something else"):
        bert.save(tmp_path / "other")


def test_a_folder_that_is_replaced(bert: Encoder, tmp_path: Path) -> None:
    other = convert(made(sparsity=0.9))
    inputs, folder = batch([20, 50]), tmp_path / "folder"
    bert.save(folder)
    code = (
        "import sys, torch, gossamer\n"
        "own, ids = gossamer.load(sys.argv[1]), torch.tensor(eval(sys.argv[2]))\n"
        "first = own(ids).last_hidden_state\n"
        "print('ready', flush=True); input()\n"
        "print(torch.equal(first, own(ids).last_hidden_state),"
        " torch.equal(first, gossamer.load(sys.argv[1])(ids).last_hidden_state))"
    )
    ids = str(inputs["input_ids"].tolist())
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), ids], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    mine = gossamer.load(folder)
    other.save(folder)
    assert child.communicate("\n", timeout=60)[0].split() == ["True", "False"]
    assert torch.equal(mine(**inputs).last_hidden_state, bert(**inputs).last_hidden_state)
    assert torch.equal(gossamer.load(folder)(**inputs).last_hidden_state, other(**inputs).last_hidden_state)


def test_damaged_folders(bert: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, ids = tmp_path / "folder", batch([9])["input_ids"]
    bert.save(folder)
    gossamer.load(folder)
    (packed,) = (tmp_path / "cache" / "encoders").glob("*.blob")
    for damage in (b"", b"something else altogether", packed.read_bytes()[:-64]):
        packed.write_bytes(damage)
        assert torch.equal(gossamer.load(folder)(ids).last_hidden_state, bert(ids).last_hidden_state)
    assert "packed again" in caplog.text
    about = (folder / files.ABOUT).read_text()
    (folder / files.ABOUT).write_text(about.replace('"version": 1', '"version": 99', 1))
    with pytest.raises(CheckpointError, match="version 99"):
        gossamer.load(folder)
    (folder / files.ABOUT).write_text(about.replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(CheckpointError, match="of two encoders"):
        gossamer.load(folder)
    (folder / files.ABOUT).write_text(about.replace('"heads"', '"hats"'))
    with pytest.raises(CheckpointError, match="damaged: 'heads'"):
        gossamer.load(folder)
    (folder / files.ABOUT).write_text(about)
    (folder / files.TENSORS).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        gossamer.load(folder)


def test_a_cache_that_cannot_be_written(bert: Encoder, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    bert.save(tmp_path / "folder")
    (tmp_path / "file").touch()
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))
    again = gossamer.load(tmp_path / "folder")
    ids = batch([9])["input_ids"]
    assert "no memory is shared" in caplog.text
    assert torch.equal(again(ids).last_hidden_state, bert(ids).last_hidden_state)


def test_blobs_keep_shapes_and_types(tmp_path: Path) -> None:
    arrays = {
        "a": torch.arange(7, dtype=torch.int16),
        "b": torch.randn(3, 5),
        "c": torch.empty(0, 4),
        "d": torch.ones(()),
    }
    blob.write(tmp_path / "x", arrays, {"k": [1]})
    found, about = blob.read(tmp_path / "x")
    assert about == {"k": [1]} and found.keys() == arrays.keys()
    for name, t in arrays.items():
        assert torch.equal(found[name], t) and found[name].dtype == t.dtype and found[name].shape == t.shape
        assert found[name].data_ptr() % 64 == 0 or not t.numel()


def test_stub_names_what_the_core_has() -> None:
    stub = Path(gossamer.__file__).with_name("_encoder.pyi")
    lines = [line for line in stub.read_text().splitlines() if line.startswith(("def ", "class "))]
    declared = {line.split("(")[0].split(":")[0].removeprefix("def ").removeprefix("class ") for line in lines}
    assert declared == {name for name in dir(pack.require()) if not name.startswith("_")}
