"""A sentence-transformers encoder with a sparse head: `sparse_encoder` makes one of any dense encoder.

    model = sparse_encoder(SentenceTransformer("all-MiniLM-L6-v2"), dim=2048, k=48)     # a SparseEncoder
    ...                                                                                # train: see trainer.py
    model.save_pretrained("sparse")
    model = load_encoder("sparse")

`SparseEncoder("sparse", trust_remote_code=True)` loads it too, where gossamer is installed.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.sparse_encoder import SparseEncoderModelCardData
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import Tensor, nn

from .activations import SThresh, TopK
from .head import SparseHead

Tune = Literal["head", "lora", "full"]


class SentenceSparseHead(Module):
    """`SparseHead` as the last module of an encoder: replaces "sentence_embedding" by its code.

    Dense embeddings are scaled to unit length first and left in the features as "dense_embedding" (batch, input_dim);
    while training "decoded_embedding", of the same shape, is left there too, for the loss.
    """

    forward_kwargs: ClassVar[set[str]] = {"max_active_dims"}  # type: ignore[misc]

    def __init__(self, input_dim: int, dim: int, activation: str = "topk", **options: float) -> None:
        super().__init__()
        self.head = SparseHead(input_dim, dim, activation, **options)

    def forward(self, features: dict[str, Any], max_active_dims: int | None = None) -> dict[str, Any]:
        dense: Tensor = nn.functional.normalize(features["sentence_embedding"], dim=-1)
        codes = self.head(dense, max_active_dims)
        features |= {"sentence_embedding": codes, "dense_embedding": dense}
        if self.training:
            features["decoded_embedding"] = self.head.decode(codes) + self.head.offset
        return features

    def get_embedding_dimension(self) -> int:
        return self.head.linear.out_features

    def get_config_dict(self) -> dict[str, Any]:
        return self.head.config()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> SentenceSparseHead:
        hub = {
            k: kwargs[k] for k in ("subfolder", "token", "cache_folder", "revision", "local_files_only") if k in kwargs
        }
        config = cls.load_config(model_name_or_path, **hub)
        return cls.load_torch_weights(model_name_or_path, model=cls(**config), **hub)  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"SentenceSparseHead({self.get_config_dict()})"


class Card(SparseEncoderModelCardData):
    """The library's model card, with a snippet that loads a head of ours."""

    def generate_usage_snippet(self) -> str:
        snippet = super().generate_usage_snippet()
        loads = re.sub(r'(SparseEncoder\("[^"]*")\)', r"\1, trust_remote_code=True)", snippet)
        return loads.replace(
            "```python\n", "```python\n# pip install 'gossamer[retrieval]': the head is a class of it\n", 1
        )


def sparse_encoder(
    dense: SentenceTransformer | str,
    dim: int = 2048,
    activation: str = "topk",
    tune: Tune = "head",
    lora: Any = None,
    **options: float,
) -> SparseEncoder:
    """`dense` (left as it is: this works on a copy) with an untrained sparse head of `dim` columns after it.

    `activation` and its `options` are `SparseHead`'s (topk: k, start; sthresh: threshold; relu). `tune`: what training
    may change: the head alone, the head and LoRA adapters (a peft config in `lora`, or rank 16 on every linear layer),
    or everything. A ready head on cached embeddings comes from `fit.fit_head`: `model[-1].head = head`.
    """
    model = SentenceTransformer(dense) if isinstance(dense, str) else copy.deepcopy(dense)
    width = model.get_embedding_dimension()
    if width is None:
        raise ValueError("the encoder does not tell its dimension; fix: end it with a Pooling or Dense module")
    if tune not in ("head", "lora", "full"):
        raise ValueError(f"tune={tune!r} is unknown; fix: head, lora or full")
    model.requires_grad_(tune == "full")
    head = SentenceSparseHead(width, dim, activation, **options)
    card = Card()
    card.base_model = model.model_card_data.base_model
    modules = [*model.children(), head]
    sparse = SparseEncoder(modules=modules, device=str(model.device), similarity_fn_name="dot", model_card_data=card)
    if tune == "lora":
        sparse.add_adapter(lora if lora is not None else _lora())
    card.add_tags(["gossamer", "sparse-head"])
    return sparse


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
    )


def load_encoder(path: str | Path, **kwargs: Any) -> SparseEncoder:
    """A saved encoder, from a folder or the hub, without `trust_remote_code`: our class is imported already.

    Code that comes with the model stays untrusted: sentence-transformers refuses it and says how to allow it.
    `kwargs` go to `SparseEncoder`.
    """
    own = {f"{SentenceSparseHead.__module__}.{SentenceSparseHead.__name__}": SentenceSparseHead}
    kwargs.setdefault("model_card_data", Card())
    # Private, but the only way to hand over a class without trusting whatever else the model brings.
    return SparseEncoder._load_with_module_classes(str(path), own, **kwargs)


def portable(model: SparseEncoder) -> SparseEncoder:
    """The same codes from sentence-transformers' own modules: what it saves loads anywhere, without Gossamer.

    relu and topk heads become a `SparseAutoEncoder` and a `Normalize`. ValueError for sthresh, which it has not.
    """
    *before, last = model.children()
    if not isinstance(last, SentenceSparseHead) or isinstance(last.head.activation, SThresh):
        raise ValueError("only a relu or topk head at the end can be made portable; fix: save_pretrained and load")
    head, (width, dim) = last.head, (last.head.linear.in_features, last.head.linear.out_features)
    k = head.activation.k if isinstance(head.activation, TopK) else dim
    coder = SparseAutoEncoder(width, dim, k=k, k_aux=0)
    coder.encoder.weight, coder.latent_bias = head.linear.weight, head.linear.bias  # type: ignore[assignment]
    coder.pre_bias = head.offset
    same = SparseEncoder(modules=[*before, Normalize(), coder, Normalize()], similarity_fn_name="dot")
    return same.to(model.device)
