"""Compress a Llama, Qwen or GPT-2 style model and save it: python examples/compress_llama.py MODEL OUT [RATIO]

MODEL is a Hugging Face folder or hub id. The calibration text that ships with Gossamer is used; for a model of your own
domain pass texts of that domain instead.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from gossamer import texts


def main(source: str, out: str, ratio: float = 0.3, samples: int = 128, length: int = 1024) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)

    # 30 % fewer bytes in every linear layer, but only 10 % in the layers that suffer most.
    rules = [gossamer.Rule("*.down_proj", ratio=ratio / 3), gossamer.Rule("*.v_proj", ratio=ratio / 3)]
    plan = gossamer.plan(model, method="sparsegpt", ratio=ratio, rules=rules)
    print(f"block linears: {plan.dense_bytes:,} -> {plan.stored_bytes:,} bytes (ratio {plan.ratio:.3f})")

    gossamer.compress(
        model,
        texts.calibration(),
        plan,
        tokenizer=tokenizer,
        samples=samples,
        length=length,
        work=f"{out}.work",  # interrupt whenever you like: the same call resumes
        progress=lambda p: print(f"{p.stage} {p.done}/{p.total} {p.layer}"),
    )
    gossamer.save(model, out, tokenizer=tokenizer)
    print(f"saved to {out}")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(float, sys.argv[3:4]))
