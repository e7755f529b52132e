"""Encoders of published shapes with random weights, for bench_encoder.py: ours, transformers', and ONNX files.

Speed does not depend on what the weights are but on which blocks are zero, and the peers multiply zeros, too.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from gossamer.encoder import Encoder
from gossamer.encoder.parts import Layer, Linear, Norm, Parts, Scales
from gossamer.formats.bsr_int8 import BsrInt8

WORDS, POSITIONS = 30522, 512


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    layers: int
    intermediate: int
    limit: float  # milliseconds, the paper's for this model

    def config(self) -> BertConfig:
        return BertConfig(
            vocab_size=WORDS, hidden_size=self.hidden, num_attention_heads=self.heads, num_hidden_layers=self.layers,
            intermediate_size=self.intermediate, max_position_embeddings=POSITIONS,
        )  # fmt: skip


# DistilBERT has no token types; its layers are BERT's.
SHAPES = {
    "bert-mini": Shape(256, 4, 4, 1024, 1),
    "minilm-l6": Shape(384, 12, 6, 1536, 10),
    "distilbert": Shape(768, 12, 6, 3072, 10),
    "bert-base": Shape(768, 12, 12, 3072, 20),
    "bert-large": Shape(1024, 16, 24, 4096, 50),
}


def ours(shape: Shape, sparsity: float, block: tuple[int, int] = (4, 1)) -> Encoder:
    """Uniform masks of whole blocks; scales as calibration would give for such weights."""
    generator = torch.Generator().manual_seed(0)

    def linear(m: int, k: int, factors: bool = False) -> Linear:
        kept = torch.rand(m // 4, 1, k // block[1], 1, generator=generator) >= sparsity
        weight = torch.randn(m // 4, 4, k // block[1], block[1], generator=generator) * kept * k**-0.5
        return Linear(BsrInt8.encode(weight.view(m, k), block), torch.zeros(m), torch.ones(k) if factors else None)

    def layer() -> Layer:
        h, wide = shape.hidden, shape.intermediate
        return Layer(
            linear(3 * h, h, True), linear(h, h), linear(wide, h, True), linear(h, wide), norm(), norm(), "gelu",
            Scales(*(torch.full((n,), 0.03) for n in (shape.heads, shape.heads, h))),
        )  # fmt: skip

    def norm() -> Norm:
        return Norm(torch.ones(shape.hidden), torch.zeros(shape.hidden), 1e-12)

    def table(rows: int) -> Tensor:
        return torch.randn(rows, shape.hidden, generator=generator).bfloat16()

    parts = Parts(
        shape.heads, table(WORDS), table(POSITIONS), table(2), norm(), None, tuple(layer() for _ in range(shape.layers))
    )
    return Encoder(parts, shape.config())


def dense(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    return BertModel(shape.config(), add_pooling_layer=False).eval()


class _Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state


FILES = ("fp32", "fp32_fused", "int8_dynamic", "int8_dynamic_fused", "int8_static")


def export(name: str, folder: Path) -> dict[str, Path]:
    """ONNX files of a shape, made once: as it is and fused by onnxruntime.transformers, each in fp32 and int8."""
    paths = {kind: folder / f"{name}.{kind}.onnx" for kind in FILES}
    missing = [kind for kind, path in paths.items() if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        logging.disable(logging.WARNING)
        for kind in missing:  # each from those before it
            part = folder / f"{name}.{kind}.part.onnx"
            _make(kind, SHAPES[name], paths, part)
            part.rename(paths[kind])
            print(f"{paths[kind].name}: {paths[kind].stat().st_size:,} bytes", flush=True)
        logging.disable(logging.NOTSET)
    return paths


def _make(kind: str, shape: Shape, paths: dict[str, Path], out: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.transformers import optimizer

    extra, fp32 = {"DefaultTensorType": onnx.TensorProto.FLOAT}, str(paths["fp32"])
    if kind == "fp32":
        _to_onnx(dense(shape), out)
    elif kind == "fp32_fused":
        optimizer.optimize_model(
            fp32, model_type="bert", num_heads=shape.heads, hidden_size=shape.hidden
        ).save_model_to_file(str(out))
    elif kind == "int8_static":
        quantize_static(
            fp32, str(out), _Reader(), QuantFormat.QDQ, op_types_to_quantize=["MatMul"],
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True, extra_options=extra,
        )  # fmt: skip
    else:
        source = paths[kind.replace("int8_dynamic", "fp32")]
        quantize_dynamic(str(source), str(out), weight_type=QuantType.QInt8, extra_options=extra)


def _to_onnx(model: nn.Module, out: Path) -> None:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    model.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Hidden(model), tuple(inputs(2, 16).values()), str(out), input_names=names, output_names=["hidden"],
            dynamic_axes={n: {0: "sentences", 1: "tokens"} for n in [*names, "hidden"]}, opset_version=17, dynamo=False,
        )  # fmt: skip


class _Reader:
    """Calibration of the static model."""

    def __init__(self) -> None:
        self.left = [inputs(4, 64, seed) for seed in range(4)]

    def get_next(self) -> dict[str, Any] | None:
        return {k: v.numpy() for k, v in self.left.pop().items()} if self.left else None


def inputs(sentences: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(999, WORDS, (sentences, tokens)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
