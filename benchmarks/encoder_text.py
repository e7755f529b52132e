"""Unlabelled text and tokenised collections for bench_encoder_quality.py, as small files that travel to a GPU.

    python benchmarks/encoder_text.py MODEL DATA OUT [--wordnet DIR] [--gcide FILE] [--foldoc FILE] [--docstrings SITE]

Novels, Wikipedia leads and the questions of the zero-shot sets (ARC, OpenBookQA, PIQA) of the data folder; glosses of
WordNet (Debian's wordnet-base, usr/share/wordnet), entries of the GNU dictionary (dict-gcide, usr/share/dictd/
gcide.dict.dz) and of a dictionary of computing (dict-foldoc), docstrings of installed packages (SITE: site-packages).
No document and no query of a test collection is among them. A file holds one source: uint16 ids, xz.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

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


def write_model(path: Path, model: nn.Module) -> None:
    """Matrices in int8 with a scale per row, xz: 0.4 of what float16 takes on the way to a GPU.

    Word embeddings, the same for teacher and student, have but 63 levels.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if value.ndim != 2:
            tensors[name] = value
            continue
        levels = 31 if name.endswith("word_embeddings.weight") else 127
        scale = value.abs().amax(1, keepdim=True).clamp_min(1e-8) / levels
        tensors |= {f"{name}:int8": (value / scale).round().to(torch.int8), f"{name}:scale": scale}
    path.write_bytes(lzma.compress(to_bytes(tensors), preset=6))


def read_model(path: Path) -> nn.Module:
    """What `write_model` wrote, in float32; the config lies beside it."""
    tensors = from_bytes(lzma.decompress(path.read_bytes()))
    for name in [n.removesuffix(":int8") for n in tensors if n.endswith(":int8")]:
        tensors[name] = tensors.pop(f"{name}:int8") * tensors.pop(f"{name}:scale")
    model = AutoModel.from_config(AutoConfig.from_pretrained(path.parent), dtype=torch.float32, add_pooling_layer=False)
    model.load_state_dict(tensors)
    return model


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


def foldoc(file: Path) -> Iterator[str]:
    """Entries without their markup, references, addresses and dates."""
    for entry in re.split(r"\n(?=\S)", gzip.decompress(file.read_bytes()).decode(errors="replace"))[40:]:
        head, _, body = entry.partition("\n")
        body = " ".join(
            re.sub(r"\{\(.*?\)\}|\[[^\]]{0,300}\]|\(\d{4}-\d\d-\d\d\)|<[^>]*>", "", body, flags=re.S).split()
        )
        if len(body) > 60:
            yield f"{head}: {re.sub(r'[{}]', '', body)}"


def questions(data: Path) -> Iterator[str]:
    """Questions with their answers."""
    for name in ("arc_easy", "arc_challenge", "openbook_qa", "piqa"):
        for row in map(json.loads, lzma.decompress((data / f"zeroshot/{name}.jsonl.xz").read_bytes()).splitlines()):
            yield f"{row['query'].removeprefix('Question:').strip()} {row['choices'][row['gold']]}"


def docstrings(site: Path) -> Iterator[str]:
    """Paragraphs that are mostly letters, each once."""
    seen: set[str] = set()
    for file in (f for package in PACKAGES for f in sorted((site / package).rglob("*.py"))):
        try:
            tree = ast.parse(file.read_text(errors="replace"))
        except SyntaxError:  # of a newer Python
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
        for text in (t for n in nodes for t in re.split(r"\n\s*\n", ast.get_docstring(n) or "")):
            line = " ".join(text.split())
            letters = sum(c.isalpha() or c == " " for c in line)
            if len(line) > 80 and ">>>" not in line and letters > 0.85 * len(line) and line not in seen:
                seen.add(line)
                yield line


READERS: dict[str, Callable[[Path], Iterator[str]]] = {"wordnet": wordnet, "gcide": gcide, "foldoc": foldoc}
READERS |= {"docstrings": docstrings}


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
    sources["questions"] = list(questions(args.data))
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
