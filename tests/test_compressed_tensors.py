"""Sparse checkpoints of compressed-tensors: what its version 0.9.4 writes, whole models, and damaged ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gossamer
from gossamer import patterns
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.hub import compressed_tensors
from gossamer.hub.source import open_model
from gossamer.nn import sparse_layers
from gossamer.shards import CheckpointError

# Written by compressed-tensors 0.9.4; the first group of the first row keeps a zero beside the 7.
DENSE = [
    [0, 0, 0, 7, 0, 6, 0, -8, -8, 0, 8, 0, 0, -6, 0, -7],
    [-9, -9, 0, 0, 0, 0, 8, -7, 0, -4, 0, 8, 0, -9, 0, -9],
]
COMPRESSED = [[0.0, 7, 6, -8, -8, 8, -6, -7], [-9, -9, 8, -7, -4, 8, -9, -9]]
BITMASK_24, BITMASK = [[172, 165], [195, 170]], [[168, 165], [195, 170]]


def folder_of(tmp_path: Path, name: str, state: dict[str, Tensor], **more: object) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    config = {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": name}} | more}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def test_what_the_library_wrote(tmp_path: Path) -> None:
    shape, dense = torch.tensor([[2], [16]]), torch.tensor(DENSE).float()
    values, mask = torch.tensor(COMPRESSED), torch.tensor(BITMASK_24, dtype=torch.uint8)
    state = {"x.shape": shape, "x.compressed": values, "x.bitmask": mask, "y.weight": torch.ones(3)}
    found = dict(compressed_tensors.read(folder_of(tmp_path, "sparse-24-bitmask", state)))
    assert isinstance(found["x"], NM) and torch.equal(found["x"].decode(), dense)
    assert isinstance(found["y.weight"], Tensor) and set(found) == {"x", "y.weight"}

    state = {"x.shape": shape.flatten(), "x.compressed": dense[dense != 0]}
    state |= {"x.bitmask": torch.tensor(BITMASK, dtype=torch.uint8), "x.row_offsets": torch.tensor([0, 7])}
    found = dict(compressed_tensors.read(folder_of(tmp_path, "sparse-bitmask", state)))
    assert isinstance(found["x"], Bitmask) and torch.equal(found["x"].decode(), dense) and set(found) == {"x"}


def test_other_checkpoints_are_not_for_it(tmp_path: Path, tiny_folder: Path) -> None:
    assert compressed_tensors.format_of(tiny_folder) is None and compressed_tensors.format_of(tmp_path) is None
    with pytest.raises(CheckpointError, match="is no checkpoint in one of sparse-24-bitmask"):
        next(compressed_tensors.read(tiny_folder))
    folder = folder_of(tmp_path, "sparse-24-bitmask", {"a": torch.ones(1)}, config_groups={"group_0": {}})
    with pytest.raises(CheckpointError, match="quantised, too, which is not read; fix"):
        compressed_tensors.format_of(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"x.bitmask": torch.zeros(2, 3, dtype=torch.uint8)}, r"x.bitmask is uint8 \[2, 3\] for a weight 2 x 16; fix"),
        ({"x.bitmask": torch.zeros(2, 2)}, r"x.bitmask is float32 \[2, 2\] for a weight 2 x 16; fix"),
        ({"x.shape": torch.tensor([2, 16, 1])}, r"x.shape is \[2, 16, 1\], no rows and columns; fix"),
        ({"x.shape": torch.tensor([2.5, 16])}, r"x.shape is \[2.5, 16.0\], no rows and columns; fix"),
        (
            {"x.compressed": torch.ones(2, 8, dtype=torch.int8)},
            "x.compressed is int8: quantised, too.*; fix: decompress",
        ),
        ({"x.compressed": torch.ones(2, 8).to(torch.float8_e4m3fn)}, "x.compressed is float8_e4m3fn: quantised"),
        (
            {"x.bitmask": torch.tensor([[255, 0]] * 2).byte()},
            "x is not 2:4 sparse: row 0, columns 4..7 hold 4.*; fix: copy",
        ),
        ({"x.bitmask": torch.zeros(2, 2, dtype=torch.uint8)}, "x: 0 bits for 16 values; fix"),
        ({"x.shape": None}, "x has no shape; fix: copy it again"),
    ],
)
def test_damage_has_a_name(tmp_path: Path, damage: dict[str, Tensor | None], message: str) -> None:
    state = {"x.shape": torch.tensor([2, 16]), "x.compressed": torch.tensor(COMPRESSED)}
    state |= {"x.bitmask": torch.tensor(BITMASK_24, dtype=torch.uint8)} | damage  # type: ignore[operator]
    folder = folder_of(tmp_path, "sparse-24-bitmask", {n: t for n, t in state.items() if t is not None})
    with pytest.raises(CheckpointError, match=message):
        list(compressed_tensors.read(folder))


def test_a_model_of_two_blocks(legacy_folder: Path, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = open_model(legacy_folder)
    with pytest.raises(
        CheckpointError, match="of compressed-tensors; fix: read it with gossamer.hub.compressed_tensors"
    ):
        gossamer.load(legacy_folder)
    layers = sparse_layers(model)
    assert len(layers) == 14 and {layer.spec["format"] for layer in layers.values()} == {"nm24"}
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    for name, layer in layers.items():
        weight = expected.get_parameter(f"{name}.weight")
        weight.data = torch.where(patterns.nm(weight.abs()), weight, 0)
        assert torch.equal(layer.decode(), weight)
    ids = tokenizer("2:4", return_tensors="pt").input_ids
    assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-5)
