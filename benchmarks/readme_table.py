"""Writes the result tables of README.md from benchmarks/results: `python benchmarks/readme_table.py`.

A test compares the two, so a newer result or an edited table does not go unnoticed.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
RATIOS = (0.2, 0.3, 0.4, 0.5)
ROWS = (
    ("sparsegpt", "`sparsegpt`"),
    ("shared", "`cospadi`"),
    ("wanda", "`wanda`"),
    ("per_matrix", "`cospadi`, a dictionary per matrix"),
    ("magnitude", "`magnitude`"),
    ("svd", "`svd` (SVD-LLM)"),
)


def results(bench: str) -> list[dict]:
    lines = (ROOT / "benchmarks" / "results" / f"{bench}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def latest(bench: str, summary: str, **case: object) -> float:
    """The newest value of a figure; lines of some layers, windows or CPUs are none, unless asked for."""
    found = [
        line["value"]
        for line in results(bench)
        if line.get("summary") == summary
        and not ({"layers", "windows", "cpu"} - case.keys()) & line["case"].keys()
        and all(line["case"].get(k) == v for k, v in case.items())
    ]
    return found[-1]


def table() -> str:
    dense, int8 = (latest("quality", "ppl", method=m) for m in ("dense", "int8"))
    lines = [
        f"WikiText-2 perplexity of SmolLM2-135M (dense: {dense:.2f}) when its linear layers are stored in 20 to 50 %",
        "fewer bytes than in bf16, masks and indices counted, each method fitted to 256 x 1,024 calibration tokens:",
        "",
        "| method | " + " | ".join(f"-{r:.0%}" for r in RATIOS) + " |",
        "|---|" + "---:|" * len(RATIOS),
    ]
    for variant, name in ROWS:
        cells = (f"{latest('quality', 'ppl', variant=variant, cr=r):,.1f}" for r in RATIOS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    published = latest("quality", "ppl", variant="ksvd", cr=0.3)
    minutes = latest("compress_time", "minutes", method="cospadi", device="cpu", windows=64)
    slower = latest("compress_time", "speedup_vs_ksvd", device="cuda")
    lines += [
        "",
        f"CoSpaDi with the solver of its paper (60 rounds of OMP and K-SVD): {published:.1f} at -30 %,",
        f"in {slower:.0f} times the time of ours for dictionaries of the same size. Fitting the whole model",
        f"with ours takes {minutes:.1f} minutes on 2 CPU cores.",
        "",
        f"Rounding to int8 stores 50 % less, too, at {int8:.2f}: on a model this small nothing sparse comes near it.",
        "Measured by [benchmarks/bench_quality.py](benchmarks/bench_quality.py) on an H100, 64 windows of 1,024.",
        "",
    ]
    return "\n".join(lines)


SPARSITIES = (0.5, 0.7)
DECODE = (
    ("eager", "the linear layers"),
    ("compile", "the linear layers, `torch.compile`"),
    ("model_eager", "whole decoding steps"),
    ("model_compile", "whole decoding steps, `torch.compile`"),
)
TOKENS = (1, 8, 16, 32, 64, 128)
BATCHES = (1, 8, 16)
NO_AMX, AMX = (f"Intel(R) Xeon(R) Processor {with_or_not} AMX" for with_or_not in ("without", "with"))


def speed() -> str:
    """Decoding on the CPU and on a GPU, against the best dense of the same run."""
    lines = [
        "",
        "Tokens per second of SmolLM2-135M decoding on 2 CPU cores, linear layers and head pruned and stored as bf16",
        "bitmasks, over the best dense run (torch float32, torch bfloat16, our own dense kernel):",
        "",
        "| sparsity | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |",
        "|---|" + "---:|" * len(SPARSITIES),
    ]
    for variant, name in DECODE:
        ratios = (latest("decode_cpu", "tokens_per_s_ratio", variant=variant, sparsity=s) for s in SPARSITIES)
        cells = (f"{ratio:.2f}x" for ratio in ratios)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Unstructured sparsity on an H100 (`cuda_lscd`, bf16), over the best of cuBLAS and cuBLASLt, geometric mean of",
        "7 layer shapes of large language models, the sparse kernel in every cell; where it loses, dense runs:",
        "",
        "| sparsity | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in TOKENS) + " |",
        "|---|" + "---:|" * len(TOKENS),
    ]
    for s in (0.5, 0.6, 0.7, 0.8, 0.9):
        cells = (f"{latest('lscd', 'geomean_vs_cublaslt', sparsity=s, tokens=n):.2f}x" for n in TOKENS)
        lines.append(f"| {s:.0%} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def whole_models() -> str:
    """Language models decoding on a GPU."""
    lines = [
        "",
        "Tokens per second of a whole Llama of 8B shapes decoding on that GPU (random weights, 512 tokens of context,",
        "CUDA graphs and fused norms, rotations and gates on both sides; with transformers' own the gain is smaller),",
        "over dense bf16, and the memory of its linear layers; [more](docs/llm_decode.md):",
        "",
        "| sparsity | " + " | ".join(f"batch {b}" for b in BATCHES) + " | memory |",
        "|---|" + "---:|" * (len(BATCHES) + 1),
    ]
    for s in (0.5, 0.6, 0.7):
        case = {"model": "llama-3-8b", "sparsity": s}
        cells = [f"{latest('llm_decode', 'tokens_per_s_ratio', batch=b, **case):.2f}x" for b in BATCHES]
        cells.append(f"{latest('llm_decode', 'linear_memory_ratio', **case):.2f}x")
        lines.append(f"| {s:.0%} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def int8() -> str:
    """Block-sparse int8 on the CPU."""
    lines = [
        "",
        "Block-sparse int8 on one core of an Intel Xeon with AMX, 64 tokens, over the fastest of oneDNN and torch's",
        "int8, geometric mean of 6 shapes ([more](docs/kernels/bsr_int8.md)):",
        "",
        "| sparsity | 4x1 blocks | 4x4 | 4x1, AMX switched off for all | 4x4 |",
        "|---|" + "---:|" * 4,
    ]
    for s in (0.7, 0.8, 0.9):
        case = {"sparsity": s, "tokens": 64, "threads": 1}
        cells = (
            f"{latest('bsr_int8', 'geomean_vs_best_dense', cpu=cpu, variant=v, **case):.2f}x"
            for cpu in (AMX, NO_AMX)
            for v in ("4x1", "4x4")
        )
        lines.append(f"| {s:.0%} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


WIDTHS = (8, 32, 128, 512)


BLOCKS = (
    ("d = 4096, SwiGLU", {"d": 4096, "ff": 14336}),
    ("d = 2048, GELU", {"d": 2048, "ff": 8192}),
)


def pairs() -> str:
    """2:4 on a GPU."""
    gemm = (("decode", {}), ("prefill", {"variant": None}), ("fp8", {"variant": None}))
    decode, prefill, fp8 = (latest("nm24_gemm", f"{name}_geomean", **case) for name, case in gemm)
    lines = [
        "",
        "2:4 sparsity on the H100, over the dense product of the same run, geometric means of 5 shapes: decoding 1 to",
        f"64 tokens {decode:.2f}x, prompts of 4,096 tokens and more {prefill:.2f}x in bf16 and {fp8:.2f}x in fp8,",
        "with a scale for each operand, in CUDA graphs ([more](docs/kernels/nm24.md)).",
        "",
        "Forward and backward of a feed-forward block with them, 16,384 tokens in bfloat16, pruning and compressing",
        "included, over `torch.compile` of the dense one:",
        "",
        "| sparse products | " + " | ".join(name for name, _ in BLOCKS) + " |",
        "|---|" + "---:|" * len(BLOCKS),
    ]
    for name, summary in (("y (S-STE)", "s_ste"), ("y, dx", "transposable"), ("y, dx, dw (FST)", "fst")):
        cells = (f"{latest('ffn24', summary, **case):.2f}x" for _, case in BLOCKS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def pretraining() -> str:
    """2:4 from the first step."""
    lost = {
        m: latest("pretrain24", "val_loss_gap", method=m, model="10m", variant=v, tokens_a_parameter=None)
        for m, v in (("s_ste", "deployable"), ("sr_ste", "deployable"), ("fst", "dense_eval"), ("dense", "one_shot"))
    }
    lines = [
        "",
        "Pre-training 2:4 from the first step, a byte-level Llama of 10.7 M parameters on 13 bytes of novels a",
        f"parameter, mean of 3 seeds: S-STE ends {lost['s_ste']:.3f} nats above dense, SR-STE {lost['sr_ste']:.3f},",
        f"FST with its dense tail {lost['fst']:.3f}; the dense model pruned to 2:4 afterwards {lost['dense']:.3f}",
        "([more](docs/pretrain24.md)).",
    ]
    return "\n".join([*lines, ""])


def matrices() -> str:
    """General sparse matrices on a GPU."""
    precisions = ("fp16", "tf32", "fp32")
    lines = [
        "",
        "`SparseMatrix` on the H100, any sparse matrix times a dense one of N columns, over the best algorithm of",
        "cuSPARSE's CSR in float32, geometric mean of 27 matrices, packing and choosing not counted",
        "([more](docs/spmm.md)):",
        "",
        "| | " + " | ".join(f"N = {n}" for n in WIDTHS) + " |",
        "|---|" + "---:|" * len(WIDTHS),
    ]
    for precision in precisions:
        case = {"precision": precision, "choice": "default"}
        cells = (f"{latest('spmm', 'geomean_vs_cusparse', N=n, **case):.2f}x" for n in WIDTHS)
        lines.append(f"| {precision} | " + " | ".join(cells) + " |")

    def worst(choice: str, *of: str) -> float:
        name = "worst_vs_best_of_cusparse_dense"
        return min(latest("spmm", name, N=n, choice=choice, precision=p) for n in WIDTHS for p in of)

    kept = [f"{worst('default', p):.2f}x ({p})" for p in precisions]
    lines += [
        "",
        "The kernel is chosen in a short race with cuSPARSE and dense: at worst it is",
        f"{kept[0]}, {kept[1]} and {kept[2]} of the best of these;",
        f"by prediction alone (`measure=False`) {worst('predicted', *precisions):.2f}x.",
    ]
    return "\n".join([*lines, ""])


PEERS = (("onnxruntime", "int8"), ("openvino", "int8"), ("torch", "bf16"), ("torch", "fp32"))


def encoder_speed() -> str:
    """Block-sparse encoders on the CPU."""
    lines = [
        "",
        "Whole encoders on 2 cores of that CPU, 128 tokens a sentence, weights in random 4x1 blocks, over int8 of ONNX",
        "Runtime and OpenVINO and over torch, at 80 % / 90 % zeros ([more](docs/encoder.md)):",
        "",
        "| model, batch | " + " | ".join(f"{name} {kind}" for name, kind in PEERS) + " |",
        "|---|" + "---:|" * len(PEERS),
    ]
    for model, batch in (("bert-base", 1), ("bert-base", 8), ("minilm-l6", 1), ("minilm-l6", 8)):
        case = {"model": model, "batch": batch, "tokens": 128, "threads": 2}
        cells = (
            " / ".join(f"{latest('encoder', f'ratio_vs_{name}_{kind}', sparsity=s, **case):.1f}x" for s in (0.8, 0.9))
            for name, kind in PEERS
        )
        lines.append(f"| {model}, {batch} | " + " | ".join(cells) + " |")
    older = {"cpu": "AMD Zen 3", "model": "bert-base", "tokens": 128, "threads": 2}
    one, eight = (
        " / ".join(
            f"{latest('encoder', 'ratio_vs_onnxruntime_int8', sparsity=s, batch=b, **older):.1f}x" for s in (0.8, 0.9)
        )
        for b in (1, 8)
    )
    lines += [
        "",
        f"On 2 cores of an AMD Zen 3, which has AVX2 and no VNNI, bert-base is {one} as fast as ONNX Runtime's int8",
        f"with one sentence, {eight} with eight.",
    ]
    return "\n".join([*lines, ""])


def encoders() -> str:
    """What block-sparse encoders keep; activations rounded token by token."""
    common = {"pattern": "4x1", "activations": None}
    kept = {
        (s, v): latest("quality", "ndcg_kept", **common, sparsity=s, variant=v, int8=v != "one_shot")
        for s in (0.7, 0.8)
        for v in ("distilled", "one_shot")
    }
    lines = [
        "",
        "all-MiniLM-L6-v2 in 4x1 blocks on int8 keeps this share of its nDCG@10 on three retrieval collections, after",
        "minutes of distillation on general text, or (not on int8) pruned at once ([more](docs/sparse_encoder.md)):",
        "",
        "| sparsity | distilled | one-shot |",
        "|---|---:|---:|",
        *(f"| {s:.0%} | {kept[s, 'distilled']:.1%} | {kept[s, 'one_shot']:.1%} |" for s in (0.7, 0.8)),
    ]
    return "\n".join([*lines, ""])


def render(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    parts = (table, speed, whole_models, pairs, pretraining, matrices, int8, encoder_speed, encoders)
    return before + BEGIN + "".join(part() for part in parts) + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
