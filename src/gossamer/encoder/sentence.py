"""The int8 encoder as the first module of a sentence-transformers model.

model = quantised(SentenceTransformer("all-MiniLM-L6-v2"))   # the same pooling and normalisation after it
model.encode(["a sentence"])
model.save_pretrained("folder")
model = SentenceTransformer("folder", trust_remote_code=True)   # where gossamer is installed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor

from . import convert
from .files import load
from .module import Encoder

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class SentenceEncoder(InputModule):
    """Texts to "token_embeddings" (sentences, length, hidden), with an `Encoder` and its tokenizer."""

    config_file_name: str = "sentence_encoder.json"
    config_keys: ClassVar[list[str]] = ["max_seq_length"]
    save_in_root: bool = True

    def __init__(self, encoder: Encoder, tokenizer: Any, max_seq_length: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer: Any = tokenizer
        self.max_seq_length = min(max_seq_length or encoder.parts.longest, encoder.parts.longest)

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        texts = [f"{prompt or ''}{text}".strip() for text in inputs]
        return dict(
            self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
            )
        )  # fmt: skip

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        found = self.encoder(**{name: features[name] for name in INPUTS if name in features})
        features["token_embeddings"] = found.last_hidden_state
        return features

    def get_embedding_dimension(self) -> int:
        return self.encoder.parts.hidden

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.encoder.save(output_path, self.tokenizer, overwrite=True)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        from transformers import AutoTokenizer

        options = {key: kwargs[key] for key in ("subfolder", "token", "cache_folder", "revision") if key in kwargs}
        config = cls.load_config(model_name_or_path, **options)
        folder = model_name_or_path
        return cls(load(folder), AutoTokenizer.from_pretrained(folder), config.get("max_seq_length"))


def quantised(model: SentenceTransformer, sentences: Sequence[str] | None = None) -> SentenceTransformer:
    """The same model around an int8 encoder; `sentences` as for `convert`. EncoderError for other encoders."""
    first, *rest = model.children()
    tokenizer: Any = first.tokenizer
    encoder = convert(first.auto_model, tokenizer, sentences)  # type: ignore[arg-type]
    return SentenceTransformer(modules=[SentenceEncoder(encoder, tokenizer, model.max_seq_length), *rest], device="cpu")
