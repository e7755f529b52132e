"""A canary: what the model answered to eight fixed tokens when it was saved.

Loaders that do not know a checkpoint may fill layers with random numbers and only warn. The canary notices.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .shards import CheckpointError

TOKENS = 8
TOP = 8
# Of the logits' standard deviation. A bfloat16 run of a float32 model is 0.01 to 0.03 off; one random layer of the 210
# of SmolLM2-135M is 1 or more.
TOLERANCE = 0.15

Canary = dict[str, Any]


class CanaryError(CheckpointError):
    """The weights in memory are not those that were saved."""


def make(model: nn.Module) -> Canary | None:
    """The answer of `model` as JSON-able numbers; None for a model that does not take token ids."""
    vocabulary = _vocabulary(model)
    if vocabulary is None:
        return None
    # Spread over the vocabulary; a prime step keeps them apart in small ones.
    tokens = [(1 + i * 7919) % vocabulary for i in range(TOKENS)]
    logits = _answer(model, tokens)
    values, ids = logits.topk(min(TOP, logits.numel()))
    return {
        "tokens": tokens,
        "ids": ids.tolist(),
        "values": values.tolist(),
        "mean": float(logits.mean()),
        "std": float(logits.std(correction=0)),
        "sha256": _digest(logits),
    }


def check(model: nn.Module, canary: Canary) -> None:
    """CanaryError if `model` does not answer as the saved one did.

    The same bits pass at once; otherwise the answers may differ by rounding (another dtype, device or thread count).
    """
    logits = _answer(model, canary["tokens"])
    if _digest(logits) == canary["sha256"]:
        return
    distance = _distance(logits, canary)
    if not distance <= TOLERANCE:
        raise CanaryError(
            f"the weights in memory are not those that were saved: the answer to the canary is {distance:.2f} standard "
            f"deviations off (tolerance {TOLERANCE}); fix: copy the checkpoint again, load it with gossamer.load, and "
            "check that `import gossamer` comes before from_pretrained"
        )


def _distance(logits: Tensor, canary: Canary) -> float:
    """Root mean square over the remembered logits, mean and std, in units of the remembered std."""
    if max(canary["ids"]) >= logits.numel():
        return float("inf")
    now = torch.cat([logits[canary["ids"]], logits.mean()[None], logits.std(correction=0)[None]])
    then = torch.tensor([*canary["values"], canary["mean"], canary["std"]])
    return float((now - then).square().mean().sqrt() / max(canary["std"], 1e-30))


@torch.no_grad()
def _answer(model: Any, tokens: list[int]) -> Tensor:
    """float32 logits (or hidden state, for a model without a head) at the last token, on the CPU, in eval mode."""
    ids = torch.tensor([tokens], device=model.device)
    kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    training = model.training
    model.eval()
    try:
        output = model(input_ids=ids, return_dict=True, **kwargs)
    finally:
        model.train(training)
    answer = output.logits if "logits" in output else output[0]
    return answer.reshape(-1, answer.shape[-1])[-1].float().cpu()


def _vocabulary(model: Any) -> int | None:
    if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(model, "get_input_embeddings"):
        return None
    embedding = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None)


def _digest(logits: Tensor) -> str:
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
