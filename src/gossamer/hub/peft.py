"""LoRA on sparse layers through PEFT.

    config = gossamer.hub.peft.lora(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

The sparse base stays as it is, the gradient reaches the adapters through it. Adapters cannot be merged into a sparse
weight: `gossamer.densify(model)` first.
"""

from __future__ import annotations

from typing import Any

from ..nn import SparseLinear


def lora(config: Any) -> Any:
    """Teach a `peft.LoraConfig` to wrap SparseLinear layers; returns it."""
    from peft.tuners.lora.layer import Linear

    config._register_custom_module({SparseLinear: Linear})
    return config
