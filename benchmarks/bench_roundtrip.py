"""Stored size and bit-exact reload of a real compressed model.

    python benchmarks/bench_roundtrip.py MODEL --windows 8

For each ratio: compress, `gossamer.save`, then a new process that loads the folder through transformers. Measured: the
bytes of the compressed linears in the safetensors file against the ratio asked for (summary "stored_ratio_error", in
percentage points) and the largest difference between the logits before and after (summary "logits_difference").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from gossamer import texts
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "roundtrip.jsonl"
RELOAD = """
import sys, torch, gossamer
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    torch.save(model(torch.arange(64)[None] * 97 % 40000).logits, sys.argv[2])
"""


def stored_bytes(folder: Path) -> int:
    """Bytes on disk of the tensors of the block linears."""
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                if name.rpartition(".")[0] in layers:
                    tensor = f.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def measure(model_dir: str, method: str, ratio: float, windows: int) -> tuple[float, float]:
    """(ratio stored - ratio asked, largest difference of the logits)."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # Few alternations: what is measured here does not depend on how good the fit is.
    plan = gossamer.plan(model, method, ratio, **({"iterations": 2} if method == "cospadi" else {}))
    gossamer.compress(model, texts.calibration(), plan, tokenizer=tokenizer, samples=windows)
    with torch.inference_mode():
        before = model(torch.arange(64)[None] * 97 % 40000).logits
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        gossamer.save(model, out, tokenizer=tokenizer)
        logits = Path(folder) / "logits.pt"
        subprocess.run([sys.executable, "-c", RELOAD, str(out), str(logits)], check=True)
        return 1 - stored_bytes(out) / plan.dense_bytes - ratio, float((torch.load(logits) - before).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", default="SmolLM2-135M")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--methods", nargs="*", default=["sparsegpt", "cospadi"])
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 calibration tokens")
    args = parser.parse_args()
    for ratio in args.ratios:
        for method in args.methods:
            error, difference = measure(args.model, method, ratio, args.windows)
            print(f"{method} {ratio}: stored ratio {ratio + error:.4f}, logits differ by {difference}", flush=True)
            case = {"model": args.name, "method": method, "cr": ratio}
            for summary, value, must, unit in (
                ("stored_ratio_error", abs(error) * 100, 1.0, "percentage points"),
                ("logits_difference", difference, 0.0, "logits"),
            ):
                line = {"bench": "roundtrip", "summary": summary, "case": case, "value": value, "sense": "<="}
                append(RESULTS, line | {"must": must, "unit": unit, "n": 1} | environment())


if __name__ == "__main__":
    main()
