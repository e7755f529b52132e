"""Gossamer makes neural-network sparsity pay: a model goes in, a smaller one comes out, and it runs.

    import gossamer

    model = gossamer.compress(model, texts, tokenizer=tokenizer, ratio=0.3)
    gossamer.save(model, "smaller", tokenizer)
    model = gossamer.load("smaller")

Importing needs torch and safetensors only. It also teaches transformers to read our checkpoints, whichever of the two
is imported first.
"""

# Imported here and not on first use: a verb that shares its module's name would otherwise be replaced by the module as
# soon as anyone imports that. The modules themselves import transformers, rich and the methods when they need them.
from .checkpoint import densify, export, load, save
from .compress import compress
from .hub.lazy import install
from .nn import SparseLinear
from .plan import Plan, Rule, plan

__version__ = "0.1.0"
__all__ = ["Plan", "Rule", "SparseLinear", "compress", "densify", "export", "load", "plan", "save"]

install()
