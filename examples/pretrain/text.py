"""Text as bytes: files, compressed or not, and the batches cut from them."""

from __future__ import annotations

import lzma
from pathlib import Path

import torch
from torch import Tensor


def read(path: Path) -> Tensor:
    """The bytes of a .txt or .txt.xz file, uint8."""
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def find(folder: Path, part: str) -> Tensor:
    """The one file of `folder` whose name has `part` in it."""
    found = [p for p in sorted(folder.iterdir()) if f".{part}." in p.name]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} holds {len(found)} files named *.{part}.*; fix: one *.train.txt[.xz] and one *.valid.txt[.xz]"
        )
    return read(found[0])


def starts(length: int, step: int, seed: int, size: int, context: int) -> Tensor:
    """Random places [size] of windows in a text, the same for the same seed and step on any number of ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(length - context, (size,), generator=generator)


def cut(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Windows [size, context + 1] of `text`, both on one device."""
    return text[starts.unsqueeze(1) + torch.arange(context + 1, device=text.device)].long()


def windows(text: Tensor, context: int, size: int, most: int) -> list[Tensor]:
    """The first `most` windows [size, context + 1] of a text, end to end; a last batch that is not full is left out."""
    many = min((len(text) - 1) // context, most)
    many -= many % size if many > size else 0
    rows = torch.arange(many).unsqueeze(1) * context + torch.arange(context + 1)
    return [text[part.to(text.device)].long() for part in rows.split(size)]
