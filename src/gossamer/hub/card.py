"""The model card: README.md of a saved checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from torch import nn

from .. import formats
from ..formats import Spec
from ..nn import SparseLinear, sparse_layers

TEMPLATE = """\
---
{% if transformers -%}
library_name: transformers
{% if generates -%}
pipeline_tag: text-generation
{% endif -%}
{% if base -%}
base_model: {{ base }}
base_model_relation: quantized
{% endif -%}
{% endif -%}
tags:
- gossamer
- sparse
- compressed
---

# {{ name }}

{{ kind }} with {{ count }} linear layers stored sparse by Gossamer: \
{{ mb(stored) }} MB instead of {{ mb(dense) }} MB in bf16, every mask and index counted \
(compression ratio {{ "%.3f"|format(1 - stored / dense) }}).

```python
import gossamer  # first: it teaches transformers to read this checkpoint
{% if transformers -%}
from transformers import {{ auto }}, AutoTokenizer

model = {{ auto }}.from_pretrained("{{ name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
{% else -%}
model = gossamer.load("{{ name }}", model=skeleton)  # skeleton: the original, dense module
{% endif -%}
```

{% if transformers -%}
`gossamer.load("{{ name }}")` does the same and checks every file, every layer and the answer of the model as well.
{% endif %}
| layers | stored as | count | dense bf16 bytes | stored bytes | ratio |
|---|---|---:|---:|---:|---:|
{% for row in rows -%}
| `{{ row.name }}` | {{ row.format }} | {{ row.count }} | {{ row.dense }} | {{ row.stored }} \
| {{ "%.3f"|format(1 - row.stored / row.dense) }} |
{% endfor -%}
| all | | {{ count }} | {{ dense }} | {{ stored }} | {{ "%.3f"|format(1 - stored / dense) }} |

{% if transformers -%}
To use it without Gossamer, write a plain dense checkpoint, which loads anywhere:

```python
import gossamer

gossamer.export("{{ name }}", "{{ name }}-dense")
```
{%- endif %}
"""


def render(model: Any, name: str) -> str:
    """The card of `model`, to be saved in a folder called `name`."""
    layers = sparse_layers(model)
    config = getattr(model, "config", None)
    generates = bool(getattr(model, "can_generate", bool)())
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE).render(
        name=name,
        transformers=hasattr(model, "save_pretrained"),
        generates=generates,
        auto="AutoModelForCausalLM" if generates else type(model).__name__,
        base=_base(getattr(config, "_name_or_path", None)),
        kind=type(model).__name__,
        count=len(layers),
        rows=_rows(layers),
        dense=sum(_dense_bytes(layer) for layer in layers.values()),
        stored=formats.nbytes(layer.format for layer in layers.values()),
        mb=lambda count: f"{count / 1e6:.1f}",
    )


def _rows(layers: Mapping[str, SparseLinear]) -> list[dict[str, Any]]:
    """One row per layer type (the last part of its name) and format; a borrowed tensor counts for its lender."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, layer in layers.items():
        key = name.rpartition(".")[2], _format(layer.spec)
        row = rows.setdefault(key, {"name": key[0], "format": key[1], "count": 0, "dense": 0, "stored": 0})
        row["count"] += 1
        row["dense"] += _dense_bytes(layer)
        row["stored"] += _own_bytes(layer)
    return list(rows.values())


def _format(spec: Spec) -> str:
    if "left" in spec:
        return f"{spec['format']} ({_format(spec['left'])} x {_format(spec['right'])})"
    return f"{spec['format']} {spec['n']}:{spec['m']}" if "n" in spec else spec["format"]


def _dense_bytes(layer: nn.Module) -> int:
    return 2 * int(layer.out_features) * int(layer.in_features)  # type: ignore[arg-type]


def _own_bytes(layer: SparseLinear) -> int:
    return sum(p.numel() * p.element_size() for n, p in layer.named_parameters(recurse=False) if n != "bias")


def _base(path: str | None) -> str | None:
    """A model's name on the hub, where that is what it was loaded from."""
    found = path and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return path if found else None
