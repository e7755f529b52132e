"""Gossamer makes neural-network sparsity pay: a model goes in, a smaller one comes out, and it runs.

    import gossamer

    model = gossamer.compress(model, texts, tokenizer=tokenizer, ratio=0.3)
    gossamer.save(model, "smaller", tokenizer)
    model = gossamer.load("smaller")
    gossamer.prepare(model)  # times dense and sparse kernels here, and lets each layer run the faster

Importing needs torch and safetensors only. It also teaches transformers to read our checkpoints, whichever of the two
is imported first.
"""

# Imported here and not on first use: a verb that shares its module's name would otherwise be replaced by the module as
# soon as anyone imports that. The modules themselves import transformers, rich and the methods when they need them.
from .bench import bench
from .checkpoint import densify, export, load, save
from .compress import compress
from .explain import explain
from .hub.lazy import install
from .matrix import SparseMatrix
from .nn import SparseLinear
from .plan import Plan, Rule, plan
from .prepare import prepare

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "Rule",
    "SparseLinear",
    "SparseMatrix",
    "bench",
    "compress",
    "densify",
    "explain",
    "export",
    "load",
    "plan",
    "prepare",
    "save",
]

install()
