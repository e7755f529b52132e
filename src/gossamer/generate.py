"""Continue a text with a language model."""

from __future__ import annotations

from typing import Any

import torch


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = 64, temperature: float = 0.0) -> str:
    """What the model writes after `prompt`, at most `tokens` tokens; greedy at temperature 0, else sampled.

    ValueError for an empty prompt, a count below 1 or a negative temperature.
    """
    if tokens < 1 or temperature < 0:
        raise ValueError(f"{tokens} tokens at temperature {temperature}; fix: at least 1 token, temperature 0 or more")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if ids.numel() == 0:
        raise ValueError("the prompt is empty; fix: give some text to continue")
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=_padding(model, tokenizer),
            **how,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _padding(model: Any, tokenizer: Any) -> int:
    # One sequence is never padded; generate() only wants some id.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.pad_token_id)
    return next((i for i in known if i is not None), 0)
