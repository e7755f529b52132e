"""How good and how fast a language model is: token-level perplexity and greedy decoding speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Progress = Callable[[int, int], object]  # called with (windows done, windows in all)

_ROWS = 128  # rows of logits turned to float32 at a time


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll`); `nll` is the mean over the `tokens` predicted tokens, in nats."""

    value: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Speed:
    """Greedy decoding at batch 1: median `tokens_per_second`, `spread` = interquartile range / median."""

    tokens_per_second: float
    spread: float


def encode_text(tokenizer: Any, text: str) -> Tensor:
    """Token ids [T] of a text, no special tokens added. ValueError if the text is empty."""
    if not text.strip():
        raise ValueError("the text to evaluate on is empty; fix: give a text file with some thousand words")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def perplexity(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    window: int = 1024,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Token-level perplexity over windows that do not overlap; each predicts its tokens 1 .. window - 1.

    `ids` [T] are cut into `windows` (default: as many as fit) of `window` tokens; nothing is put in front of them. The
    model runs on its own device in its own dtype, log-softmax is float32.
    ValueError for too few tokens, for ids outside the vocabulary, for logits that are NaN or Inf, and for a model
    without logits.
    """
    ids = torch.as_tensor(ids, dtype=torch.long).flatten()
    windows = _count(len(ids), window, windows)
    _check_vocabulary(model, ids[: windows * window])
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and window > longest:
        raise ValueError(
            f"windows have {window} tokens, the model reads at most {longest}; fix: a window of {longest} or less"
        )
    total, device, training = 0.0, next(model.parameters()).device, model.training
    model.eval()
    try:
        for i in range(windows):
            piece = ids[i * window : (i + 1) * window].to(device)
            total += _nll(model, piece, where=f"window {i + 1} of {windows}")
            if progress:
                progress(i + 1, windows)
    finally:
        model.train(training)
    tokens = windows * (window - 1)
    return Perplexity(math.exp(total / tokens), total / tokens, tokens)


def _count(tokens: int, window: int, windows: int | None) -> int:
    if window < 2 or (windows is not None and windows < 1):
        asked = "all" if windows is None else windows
        raise ValueError(f"{asked} windows of {window} tokens; fix: at least 1 window of at least 2 tokens")
    needed = window * (windows or 1)
    if tokens < needed:
        raise ValueError(
            f"the text has {tokens:,} tokens, {needed:,} are needed ({windows or 1} x {window}); "
            "fix: give a longer text, or fewer or shorter windows"
        )
    return windows or tokens // window


def _check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(ids.max()) >= rows:
        raise ValueError(
            f"token id {int(ids.max())} is outside the model's vocabulary of {rows}; fix: use the model's own tokenizer"
        )


@torch.inference_mode()
def _nll(model: nn.Module, ids: Tensor, where: str) -> float:
    """Summed negative log-likelihood of ids[1:]."""
    logits = _logits(model, model(input_ids=ids[None], use_cache=False))[0]
    total = sum(
        float(nn.functional.cross_entropy(rows.float(), targets, reduction="sum"))
        for rows, targets in zip(logits[:-1].split(_ROWS), ids[1:].split(_ROWS), strict=True)
    )
    if not math.isfinite(total):
        raise ValueError(
            f"{where}: the model's logits are NaN or Inf; fix: load it in float32 or bfloat16 (float16 overflows in "
            "some models), or compress it again if only the compressed model does this"
        )
    return total


def _logits(model: nn.Module, out: Any) -> Tensor:
    """[batch, T, vocabulary]; ValueError for a model that predicts no tokens, such as an encoder or a classifier."""
    logits = getattr(out, "logits", None)
    if logits is None or logits.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} predicts no tokens; fix: give a language model (an encoder is timed by "
            "`gossamer bench FOLDER --target cpu`)"
        )
    return logits


def tokens_per_second(model: nn.Module, ids: Tensor | Sequence[int], new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Greedy decoding after the prompt `ids`, batch 1, with a KV cache; one warm-up run, the prefill is not counted.

    ValueError for a model without logits, and for no token or no run.
    """
    if min(new_tokens, repeats) < 1:
        raise ValueError(f"{repeats} runs of {new_tokens} new tokens; fix: at least 1 of each")
    device = next(model.parameters()).device
    prompt = torch.as_tensor(ids, dtype=torch.long).flatten().to(device)[None]
    rates = [new_tokens / _decode_seconds(model, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    median = statistics.median(rates)
    low, _, high = statistics.quantiles(rates, n=4, method="inclusive") if repeats > 1 else (median,) * 3
    return Speed(median, (high - low) / median)


@torch.inference_mode()
def _decode_seconds(model: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    out = model(input_ids=prompt, use_cache=True)
    start = _now(prompt.device)
    for _ in range(new_tokens):
        token = _logits(model, out)[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return _now(prompt.device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
