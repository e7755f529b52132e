"""From a transformers model to `Parts`: BERT and MiniLM, RoBERTa and its kin, DistilBERT.

A layer that is not what its kind prescribes is named and left as it is; what else differs is an EncoderError.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SparseLinear
from .parts import EncoderError, Layer, Linear, Norm, Parts, encode

log = logging.getLogger("gossamer")

FUNCTIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
MULTIPLE = 16  # of hidden, intermediate and head sizes


EMBEDDINGS = {"word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"}


class Unsupported(EncoderError):
    """Why a layer cannot run on int8."""


@dataclass(frozen=True)
class Kind:
    """Where the modules of a model family are; names relative to a layer, and to the model."""

    linears: tuple[str, str, str, str, str, str]  # query key value out up down
    norms: tuple[str, str]
    layers: str
    norm: str
    activation: str  # name in the config
    others: tuple[str, ...]  # modules without parameters or that hold the ones above


BERT = Kind(
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
     "intermediate.dense", "output.dense"),
    ("attention.output.LayerNorm", "output.LayerNorm"),
    "encoder.layer",
    "embeddings.LayerNorm",
    "hidden_act",
    ("attention", "attention.self", "attention.output", "intermediate", "output", "attention.self.dropout",
     "attention.output.dropout", "intermediate.intermediate_act_fn", "output.dropout"),
)  # fmt: skip
DISTILBERT = Kind(
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    ("sa_layer_norm", "output_layer_norm"),
    "transformer.layer",
    "embeddings.LayerNorm",
    "activation",
    ("attention", "attention.dropout", "ffn", "ffn.dropout", "ffn.activation"),
)
KINDS = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "camembert": BERT, "distilbert": DISTILBERT}
COUNTED = ("roberta", "xlm-roberta", "camembert")  # positions count tokens that are no padding


def translate(model: nn.Module) -> Parts:
    """A base model (BertModel, RobertaModel, DistilBertModel) as parts; layers left dense are logged and None.

    EncoderError for other models, decoders, and what is left when no layer can run on int8.
    """
    kind, config = _kind(model), _config(model)
    layers = tuple(_layer_or_none(kind, model, i, m) for i, m in enumerate(model.get_submodule(kind.layers).children()))
    if not any(layers):
        raise EncoderError("no layer of this model can run on int8; fix: see the warnings before this for each layer")
    embeddings = _embeddings(model)
    words = _table(embeddings, "word_embeddings")
    has_types = hasattr(embeddings, "token_type_embeddings")
    return Parts(
        heads=config.num_attention_heads,
        words=words,
        positions=_table(embeddings, "position_embeddings"),
        types=_table(embeddings, "token_type_embeddings") if has_types else torch.zeros_like(words[:1]),
        norm=_norm(model.get_submodule(kind.norm)),
        pad=config.pad_token_id if config.model_type in COUNTED else None,
        layers=layers,
    )


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _embeddings(model: nn.Module) -> nn.Module:
    embeddings = model.get_submodule("embeddings")
    for name, module in embeddings.named_children():
        if name not in EMBEDDINGS or (name.endswith("_embeddings") and type(module) is not nn.Embedding):
            raise EncoderError(
                f"embeddings.{name} is a {type(module).__name__}, which the int8 pipeline would leave out; fix: merge "
                "it into the tables"
            )
    return embeddings


def _table(embeddings: nn.Module, name: str) -> Tensor:
    return embeddings.get_parameter(f"{name}.weight").detach().to("cpu", torch.bfloat16)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's own layers."""
    return list(model.get_submodule(_kind(model).layers).children())


def pooler_of(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of tanh(W x + b) of the first token, if the model has that."""
    dense = getattr(getattr(model, "pooler", None), "dense", None)
    if dense is None:
        return None
    return dense.weight.detach().to("cpu", torch.float32), dense.bias.detach().to("cpu", torch.float32)


def _kind(model: nn.Module) -> Kind:
    config = _config(model)
    found = KINDS.get(getattr(config, "model_type", ""))
    if found is None:
        raise EncoderError(
            f"{type(model).__name__} is none of the encoders that run here ({', '.join(KINDS)}); fix: "
            "gossamer.compress and gossamer.prepare run any model"
        )
    prefix = getattr(model, "base_model_prefix", "")
    if not hasattr(model, "embeddings"):
        raise EncoderError(
            f"{type(model).__name__} has a head on its encoder; fix: convert the encoder and put it back: "
            f"model.{prefix} = gossamer.encoder.convert(model.{prefix}, ...)"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise EncoderError("a decoder's layers attend to the past only; fix: convert an encoder")
    return found


def _layer_or_none(kind: Kind, model: nn.Module, i: int, layer: nn.Module) -> Layer | None:
    try:
        return _layer(kind, model, layer)
    except Unsupported as reason:
        log.warning("encoder: %s.%d is left dense: %s", kind.layers, i, reason)
        return None


def _layer(kind: Kind, model: nn.Module, layer: nn.Module) -> Layer:
    known = {*kind.linears, *kind.norms, *kind.others, ""}
    if strange := sorted({name for name, _ in layer.named_modules()} - known - _inside(layer)):
        raise Unsupported(
            f"{strange[0]} ({type(layer.get_submodule(strange[0])).__name__}) is not part of such a layer"
        )
    config = _config(model)
    name = getattr(config, kind.activation)
    if not isinstance(name, str) or name not in FUNCTIONS:
        raise Unsupported(f"the activation function {name} is none of {', '.join(FUNCTIONS)}")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        raise Unsupported(f"positions are {config.position_embedding_type}, not absolute")
    weights, biases = zip(*(_linear(layer, name) for name in kind.linears), strict=True)
    hidden = weights[0].shape[0]
    if hidden % (MULTIPLE * config.num_attention_heads) or any(n % MULTIPLE for w in weights for n in w.shape):
        raise Unsupported(f"hidden, intermediate and head sizes must be multiples of {MULTIPLE}")
    qkv = Linear(encode(torch.cat(weights[:3])), torch.cat(biases[:3]))
    out, up, down = (Linear(encode(w), b) for w, b in zip(weights[3:], biases[3:], strict=True))
    first, second = (_norm(layer.get_submodule(name)) for name in kind.norms)
    return Layer(qkv, out, up, down, first, second, FUNCTIONS[name])


def _inside(layer: nn.Module) -> set[str]:
    """Names of what lies within activation functions, which their name in the config describes."""
    acts = [n for n, _ in layer.named_modules() if n.endswith(("intermediate_act_fn", "ffn.activation"))]
    return {n for n, _ in layer.named_modules() if any(n.startswith(f"{act}.") for act in acts)}


def _linear(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32 on the CPU."""
    module = layer.get_submodule(name)
    if isinstance(module, SparseLinear):
        weight = module.format.decode(torch.float32)
    elif type(module) is nn.Linear:
        weight = module.weight
    else:
        raise Unsupported(f"{name} is a {type(module).__name__}, neither Linear nor SparseLinear")
    weight = weight.detach().to("cpu", torch.float32)
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias.detach().to("cpu", torch.float32)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise Unsupported(f"{name} has NaN or Inf")
    return weight, bias


def _norm(module: nn.Module) -> Norm:
    if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
        raise Unsupported(f"{type(module).__name__} stands where a LayerNorm with weight and bias should")
    weight, bias = (t.detach().to("cpu", torch.float32).clone() for t in (module.weight, module.bias))
    return Norm(weight, bias, module.eps)
