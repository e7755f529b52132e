"""Sparse embeddings that search fast: heads trained to a cost, and the index that searches their codes.

What is named here is imported on first use: a search needs no trainer, and a head no index.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .controller import FlopsController, FlopsRegularizer, QuadraticRamp
    from .encoder import load_encoder, portable, sparse_encoder
    from .fit import fit_head
    from .head import SparseHead
    from .index import Hits, SparseIndex
    from .losses import ArcFace
    from .search import hybrid_search, semantic_search_gossamer, two_stage_search
    from .trainer import FlopsCallback, SparseLoss

__all__ = [
    "ArcFace",
    "FlopsCallback",
    "FlopsController",
    "FlopsRegularizer",
    "Hits",
    "QuadraticRamp",
    "SparseHead",
    "SparseIndex",
    "SparseLoss",
    "fit_head",
    "hybrid_search",
    "load_encoder",
    "portable",
    "semantic_search_gossamer",
    "sparse_encoder",
    "two_stage_search",
]

_HOME = {
    "controller": ("FlopsController", "FlopsRegularizer", "QuadraticRamp"),
    "encoder": ("load_encoder", "portable", "sparse_encoder"),
    "fit": ("fit_head",),
    "head": ("SparseHead",),
    "index": ("Hits", "SparseIndex"),
    "losses": ("ArcFace",),
    "search": ("hybrid_search", "semantic_search_gossamer", "two_stage_search"),
    "trainer": ("FlopsCallback", "SparseLoss"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
