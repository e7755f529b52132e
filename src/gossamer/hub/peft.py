"""LoRA on sparse layers through PEFT.

    config = gossamer.hub.peft.lora(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)
    model.save_pretrained("adapter")
    ...
    config = gossamer.hub.peft.lora(LoraConfig.from_pretrained("adapter"))
    model = PeftModel.from_pretrained(gossamer.load("small"), "adapter", config=config)

The sparse base stays as it is, the gradient reaches the adapters through it. Adapters cannot be merged into a sparse
weight, only into a dense one: `PeftModel.from_pretrained(gossamer.densify(model), "adapter").merge_and_unload()`.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear

from ..nn import SparseLinear


class SparseLora(Linear):
    """Adapters around a SparseLinear."""

    def merge(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "adapters cannot be merged into a sparse weight; fix: model.save_pretrained(folder), then "
            "PeftModel.from_pretrained(gossamer.densify(gossamer.load(...)), folder).merge_and_unload()"
        )


def lora(config: Any) -> Any:
    """Teach a `peft.LoraConfig`, new or of an adapter on disk, to wrap SparseLinear layers; returns it."""
    config._register_custom_module({SparseLinear: SparseLora})
    return config
