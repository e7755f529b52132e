"""Load a compressed model through plain transformers, measure it, and let it write: ... FOLDER [PROMPT]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer  # noqa: F401  (teaches transformers to read the folder; without it the sparse layers would be random)
from gossamer import evaluate, texts


def main(folder: str, prompt: str = "The city of Rome was", window: int = 1024) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    ids = evaluate.encode_text(tokenizer, texts.evaluation())
    found = evaluate.perplexity(model, ids, window=window, windows=4)
    print(f"WikiText-2 perplexity over 4 windows: {found.value:.2f}")
    speed = evaluate.tokens_per_second(model, ids[:16], new_tokens=8)
    print(f"greedy decoding: {speed.tokens_per_second:.1f} tokens/s")

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:3])
