"""Whole 2:4 models: pruned here or read from a compressed-tensors folder, prepared, a prompt and decoding."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer import dispatch, patterns, timing
from gossamer.hub.source import open_model
from gossamer.nn import sparse_layers

PROMPT, STEPS = 600, 4


def decoded(model: nn.Module) -> nn.Module:
    """The same model with dense layers, in float32."""
    dense = copy.deepcopy(model)
    for name, layer in sparse_layers(dense).items():
        held = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.device)
        held.weight.data = layer.decode(torch.float32)
        dense.set_submodule(name, held)
    return nn.Module.float(dense)  # transformers takes such a model for a quantized one, and refuses


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the prompt and of every token after it, with a cache."""
    found = model(ids[:, :PROMPT], use_cache=True)
    logits = [found.logits]
    for i in range(PROMPT, ids.shape[1]):
        found = model(ids[:, i : i + 1], past_key_values=found.past_key_values, use_cache=True)
        logits.append(found.logits)
    return torch.cat(logits, 1).double()


def check(model: nn.Module, wanted: set[str], device: str, dtype: torch.dtype) -> None:
    model = nn.Module.to(model, device=device, dtype=dtype).eval()
    layers = sparse_layers(model)
    assert len(layers) == 14 and {layer.spec["format"] for layer in layers.values()} == {"nm24"}
    ids = torch.randint(1, 257, (1, PROMPT + STEPS), device=device)
    with torch.inference_mode():
        expected = run(decoded(model), ids)
    gossamer.prepare(model, dtype=dtype)
    routes = [dispatch.route(layer.layout) for layer in layers.values()]
    assert {s.kernel for found in routes for _, way in found.ways for s in way} >= wanted
    with torch.inference_mode():
        assert float((run(model, ids) - expected).norm() / expected.norm()) < (1e-2 if dtype.itemsize == 2 else 1e-5)


@pytest.fixture(params=["magnitude", "sparsegpt", "sparse-24-bitmask"])
def model(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    if request.param == "sparse-24-bitmask":
        return open_model(request.getfixturevalue("legacy_folder"))[0]
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tiny_folder).bfloat16()  # 2:4 in float32 saves 15/32 only
    texts = torch.randint(1, 257, (8, 64)) if request.param == "sparsegpt" else None
    return gossamer.compress(found, texts, method=request.param, ratio=7 / 16, format="nm24", samples=8, length=64)


def test_prompt_and_decode(model: nn.Module) -> None:
    check(model, set(), "cpu", torch.float32)


def test_a_model_that_is_2_of_4_already_keeps_its_weights(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder).bfloat16()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "_proj" in n}
    for layer in linears.values():
        layer.weight.data = torch.where(patterns.nm(torch.rand(layer.weight.shape)), layer.weight, -0.0)
    kept = {n: m.weight.detach().clone() for n, m in linears.items()}
    found = sparse_layers(gossamer.compress(model, method="magnitude", ratio=7 / 16, format="nm24"))
    assert found.keys() == kept.keys() and all(torch.equal(m.decode(), kept[n]) for n, m in found.items())


@pytest.mark.gpu
@pytest.mark.parametrize("measured", [False, True])
def test_prompt_and_decode_on_the_gpu(model: nn.Module, measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not measured:  # at these sizes dense copies win: let every 2:4 kernel do so where it can run

        def race(runners, device, seconds=0.0):
            for calls in runners.values():
                calls[0]()
            return {name: 1.0 if name.startswith("cuda_nm24") else 9.0 for name in runners}

        monkeypatch.setattr(timing, "race", race)
    check(model, set() if measured else {"cuda_nm24", "cuda_nm24_vendor"}, "cuda", torch.bfloat16)
