"""
The int8 encoder over raw pointers; gossamer.encoder is the typed, checked way in.
"""

from collections.abc import Sequence

def isa() -> str:
    """The instruction set in use: GOSSAMER_ISA, else the best."""

def set_isa(name: str) -> None:
    """Use this instruction set from now on, in every thread."""

def stages() -> list[str]:
    """What the times of `Encoder.run` are of."""

class Linear:
    """Weights with a bias; whoever has one keeps the memory behind it."""

    @property
    def layout(self) -> int: ...

def linear(
    rows: int,
    cols: int,
    block: int,
    panels: int,
    starts: int,
    data: int,
    offsets: int,
    wide: bool,
    scale: int,
    sums: int,
    bias: int,
    factors: int,
) -> Linear:
    """Groups, or where `panels` is not 0 those."""

class Norm:
    """A layer normalisation."""

def norm(weight: int, bias: int, eps: float) -> Norm:
    """Weight and bias are float32."""

class Layer:
    """A layer of the encoder."""

def layer(
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
    attention_norm: Norm,
    output_norm: Norm,
    score_scale: int,
    value_scale: int,
    function: int,
    least: float,
) -> Layer:
    """See native/encoder/encoder.h."""

class Embeddings:
    """Tables in bfloat16."""

def embeddings(
    words: int, word_rows: int, positions: int, position_rows: int, types: int, type_rows: int, pad: int, norm: Norm
) -> Embeddings:
    """See native/encoder/encoder.h."""

class Encoder:
    """A forward pass in one call; threads may call it at the same time."""

    def __init__(
        self, hidden: int, heads: int, intermediate: int, embeddings: Embeddings, layers: Sequence[Layer]
    ) -> None: ...
    def run(
        self,
        sentences: int,
        length: int,
        mask: int,
        ids: int,
        types: int,
        positions: int,
        rows: int,
        out: int,
        threads: int,
        times: int,
    ) -> None:
        """
        float32 [sentences, length, hidden] to `out`; IndexError for what the tables do not have.
        """
