"""Training that ends sparse, or is sparse on the way: 2:4 pre-training and what makes a dense model sparse by training.

What is named here is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fp8 import Fp8Products
    from .fst import FST
    from .lightning import Lightning24
    from .method import Dense, Method
    from .probe import Probe, suggest_decay
    from .products import Products
    from .s_ste import SSTE
    from .sparse24 import Sparse24Linear
    from .sparsifier import Sparsifier, sparsify
    from .sr_ste import SRSTE
    from .ste import STE
    from .trainer import Sparse24Callback

__all__ = [
    "FST",
    "SRSTE",
    "SSTE",
    "STE",
    "Dense",
    "Fp8Products",
    "Lightning24",
    "Method",
    "Probe",
    "Products",
    "Sparse24Callback",
    "Sparse24Linear",
    "Sparsifier",
    "sparsify",
    "suggest_decay",
]

_HOME = {
    "fp8": ("Fp8Products",),
    "fst": ("FST",),
    "lightning": ("Lightning24",),
    "method": ("Dense", "Method"),
    "probe": ("Probe", "suggest_decay"),
    "products": ("Products",),
    "s_ste": ("SSTE",),
    "sparse24": ("Sparse24Linear",),
    "sparsifier": ("Sparsifier", "sparsify"),
    "sr_ste": ("SRSTE",),
    "ste": ("STE",),
    "trainer": ("Sparse24Callback",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
