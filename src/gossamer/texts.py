"""The texts that ship with Gossamer, so that a first run needs no download. data/LICENCES.md names their sources."""

from __future__ import annotations

import lzma
from importlib.resources import files

_BREAK = "\n<|endoftext|>\n"


def calibration() -> list[str]:
    """144 documents, novels and Wikipedia leads in turn, each a little over 1,024 SmolLM2 tokens long."""
    return _read("calibration.txt.xz").removesuffix("\n").split(_BREAK)


def evaluation() -> str:
    """The start of the WikiText-2 raw test set, joined as `join_wikitext` does: 64 windows of 1,024 SmolLM2 tokens."""
    return join_wikitext(_read("evaluation.txt.xz"))


def join_wikitext(raw: str) -> str:
    """The official file as Hugging Face `datasets` gives it: every line a row, rows joined by a blank line.

    Published token-level perplexities on WikiText are of this text, not of the file as it stands.
    """
    return "\n\n".join(line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1])


def _read(name: str) -> str:
    # Bytes, because text mode would turn line ends and so change the tokens.
    return lzma.decompress((files("gossamer") / "data" / name).read_bytes()).decode("utf-8")
