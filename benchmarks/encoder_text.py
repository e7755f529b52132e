"""Unlabelled text and tokenised collections for bench_encoder_quality.py, as small files that travel to a GPU.

    python benchmarks/encoder_text.py MODEL DATA OUT [--wordnet DIR] [--gcide FILE] [--docstrings SITE_PACKAGES]

Novels and Wikipedia leads of the data folder; glosses of WordNet (Debian's wordnet-base, usr/share/wordnet), entries of
the GNU dictionary (dict-gcide, usr/share/dictd/gcide.dict.dz) and docstrings of installed packages, for the words of
the sciences. No document and no query of a test collection is among them. A file holds one source: uint16 ids, xz.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

import ir_data

MOST = 256  # tokens of a document, as the model card says
CHUNK = 2000  # documents per call of the tokenizer
PACKAGES = ("numpy", "scipy", "sklearn", "sympy", "networkx", "pandas", "torch", "transformers")
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


def wordnet(folder: Path) -> Iterator[str]:
    """A line per synset: its words and its gloss, or one of the two shapes that are more like sentences."""
    for part in ("noun", "verb", "adj", "adv"):
        rows = [r for r in (folder / f"data.{part}").read_text(errors="replace").splitlines() if not r.startswith("  ")]
        for i, row in enumerate(rows):
            head, _, gloss = row.partition("|")
            fields, gloss = head.split(), gloss.strip().replace(" ; ", "; ")
            words = [w.replace("_", " ").partition("(")[0] for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            yield (
                f"{', '.join(words)}: {gloss}"
                if i % 5 < 3
                else gloss
                if i % 5 == 3
                else f"{words[0]} is {gloss.partition(';')[0]}"
            )


def gcide(file: Path) -> Iterator[str]:
    """Entries without their pronunciations, numbers and sources."""
    text = gzip.decompress(file.read_bytes()).decode(errors="replace")
    for entry in re.split(r"\n(?=\S)", text)[400:]:
        head, _, body = entry.partition("\n")
        body = " ".join(re.sub(r"\[[^\]]{0,40}\]", "", body).split())
        body = re.sub(r"[{}]|--[A-Z][\w. ]{1,20}|\b\d+\. ", "", body)
        if len(body) > 30:
            word = re.split(r"[\\(\[]", head)[0].strip(" ,.")
            yield f"{word}: {body}"


def docstrings(site: Path) -> Iterator[str]:
    """Paragraphs that are mostly letters, each once."""
    seen: set[str] = set()
    for file in (f for package in PACKAGES for f in sorted((site / package).rglob("*.py"))):
        tree = ast.parse(file.read_text(errors="replace"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
        for text in (t for n in nodes for t in re.split(r"\n\s*\n", ast.get_docstring(n) or "")):
            line = " ".join(text.split())
            letters = sum(c.isalpha() or c == " " for c in line)
            if len(line) > 80 and ">>>" not in line and letters > 0.85 * len(line) and line not in seen:
                seen.add(line)
                yield line


READERS: dict[str, Callable[[Path], Iterator[str]]] = {"wordnet": wordnet, "gcide": gcide, "docstrings": docstrings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    for reader in READERS:
        parser.add_argument(f"--{reader}", type=Path)
    parser.add_argument("--most", type=int, default=3_000_000, help="tokens of a source")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = {"wikipedia": ir_data.wikipedia(args.data), "novels": list(ir_data.novels(args.data, 120))}
    sources |= {name: list(read(path)) for name, read in READERS.items() if (path := getattr(args, name))}
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
