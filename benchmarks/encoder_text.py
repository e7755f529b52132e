"""Unlabelled text and tokenised collections for bench_encoder_quality.py, as small files that travel to a GPU.

    python benchmarks/encoder_text.py MODEL DATA OUT [--text NAME=FILE ...]

Novels and Wikipedia leads of the data folder, and more text files, one document a line (`--text`). No document and no
query of a test collection is among them. A file holds one source: uint16 token ids, xz.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

import ir_data

MOST = 256  # tokens of a document, as the model card says
CHUNK = 2000  # documents per call of the tokenizer
DOT = 1012  # "." ends every document: starts of spans are looked for after it


def write(path: Path, ids: Iterable[int]) -> None:
    array = np.fromiter(ids, np.uint16)
    path.write_bytes(lzma.compress(array.tobytes(), preset=6))
    print(f"{path.name}: {len(array):,} tokens, {path.stat().st_size:,} bytes", flush=True)


def read(path: Path) -> Tensor:
    """int32 ids."""
    return torch.from_numpy(np.frombuffer(lzma.decompress(path.read_bytes()), np.uint16).astype(np.int32))


def write_text(tokenizer, texts: list[str], path: Path, most: int) -> None:
    """The first `most` tokens of documents, a full stop after each."""
    found: list[int] = []
    for start in range(0, len(texts), CHUNK):
        for ids in tokenizer(texts[start : start + CHUNK], add_special_tokens=False)["input_ids"]:
            found += ids if ids[-1:] == [DOT] else [*ids, DOT]
        if len(found) > most:
            break
    write(path, found[:most])


def write_collection(tokenizer, texts: list[str], path: Path) -> None:
    """Whole inputs with [CLS] and [SEP], at most 256 tokens, one after the other."""
    ids = tokenizer(texts, truncation=True, max_length=MOST)["input_ids"]
    write(path, [i for row in ids for i in row])


def split(ids: Tensor) -> list[Tensor]:
    """The inputs of a collection's file: each begins with [CLS]."""
    starts = (ids == 101).nonzero().flatten().tolist()
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--most", type=int, default=5_000_000, help="tokens of a source")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = {"wikipedia": ir_data.wikipedia(args.data), "novels": list(ir_data.novels(args.data, 120))}
    for name, _, file in (pair.partition("=") for pair in args.text):
        sources[name] = [line for line in Path(file).read_text().splitlines() if line.strip()]
    generator = np.random.default_rng(0)
    for name, texts in sources.items():
        order = generator.permutation(len(texts))
        write_text(tokenizer, [texts[i] for i in order], args.out / f"text.{name}.xz", args.most)
    for name, load in ir_data.COLLECTIONS.items():
        found = load(args.data)
        write_collection(tokenizer, found.docs, args.out / f"{name}.docs.xz")
        write_collection(tokenizer, found.queries, args.out / f"{name}.queries.xz")


if __name__ == "__main__":
    main()
