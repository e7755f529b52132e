"""What block sparsity and int8 cost a sentence encoder: nDCG@10 of all-MiniLM-L6-v2, one-shot and distilled.

    python benchmarks/encoder_text.py MODEL DATA CARRY --wordnet ...   # text to learn from, and collections
    python benchmarks/bench_encoder_quality.py pack MODEL DATA CARRY  # the model in float16
    python benchmarks/bench_encoder_quality.py run CARRY OUT --device cuda --seconds 200
    python benchmarks/bench_encoder_quality.py evaluate CARRY OUT --variants native --dense RESULTS

Every linear layer of the six blocks is pruned in 4x1 blocks, each to the same sparsity; embeddings are neither pruned
nor trained. Distillation goes on from one sparsity to the next. Appends to OUT/quality.jsonl (bench `quality`) and
writes OUT/distilled_NN.safetensors, from which `evaluate` repeats the judgement.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, BertTokenizerFast

import encoder_text
import ir_data
from encoder_judge import NAME, Judge, Record, dense_of
from gossamer import compress, plan
from gossamer.emulate import calibrate, emulate, linears
from gossamer.encoder import convert
from gossamer.formats.bitmask import Bitmask
from gossamer.methods.block import Block
from gossamer.plan import Rule
from gossamer.train.distill import Distiller, fit
from gossamer.train.gradual import BlockPruner, Cubic
from gossamer.train.spans import Spans
from results import append, environment

SHARES = {"wikipedia": 0.25, "novels": 0.12, "wordnet": 0.2, "gcide": 0.15, "docstrings": 0.13}  # of spans
SHARES |= {"foldoc": 0.1, "questions": 0.05}
ENDS = (1012, 999, 1029)  # . ! ?
CLS, SEP = 101, 102
INT8 = "model.int8.xz"
DTYPE = torch.bfloat16  # of autocast
STAGES = {0.5: 0.12, 0.7: 0.38, 0.8: 0.5}  # sparsity: share of the time
MINUTES = 20  # of one GPU that the distillation may take
SPARE = 0.93  # of the time left is planned with: steps that are observed, and choices of masks, take longer


def spans_of(carry: Path, tokens: int, device: str, noise: float = 0.0) -> Spans:
    files = {name: carry / f"text.{name}.xz" for name in SHARES}
    streams = [encoder_text.read(file) for file in files.values() if file.exists()]
    shares = [SHARES[name] for name, file in files.items() if file.exists()]
    words = (carry / "model/vocab.txt").read_text().splitlines()
    inner = torch.tensor([word.startswith("##") for word in words])
    return Spans(streams, CLS, SEP, inner, ENDS, tokens, shares, device=device, noise=noise)


def load(folder: Path, device: str) -> nn.Module:
    if (folder / INT8).exists():
        return encoder_text.read_model(folder / INT8).eval().to(device)
    return AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval().to(device)


def trainable(model: nn.Module) -> nn.Module:
    for parameter in model.embeddings.parameters():
        parameter.requires_grad_(False)
    return model


def learn(
    distiller: Distiller, spans: Spans, args: argparse.Namespace, done: Callable[[float, nn.Module, int, float], None]
) -> None:
    """All stages within about `args.seconds`; the number of steps follows from the speed measured so far."""
    start, begin, before = time.perf_counter(), 0, zeros(distiller.student)
    rate, lr = probe(distiller, spans, args)
    left, after = args.seconds - (time.perf_counter() - start), time.perf_counter()
    ends = np.cumsum([STAGES[s] for s in args.sparsities]) / sum(STAGES[s] for s in args.sparsities)
    for sparsity, end in zip(args.sparsities, ends, strict=True):
        steps = max(args.least, int(SPARE * (end * left - (time.perf_counter() - after)) / rate))
        rise = max(5, int(args.rise * steps))
        schedule = Cubic(sparsity, 5, rise, max(1, rise // args.rises), before)
        pruner = BlockPruner(distiller.student, schedule)
        print(f"{sparsity}: {steps} steps, {rate * 1e3:.1f} ms each, masks until {rise}", flush=True)
        at, batch = time.perf_counter(), partial(_from, spans, begin)
        train(distiller, batch, steps, lr, pruner, args, log=_log, log_every=max(1, steps // 12))
        rate, begin, before = (time.perf_counter() - at) / steps, begin + steps, sparsity
        pruner.close()
        print(f"{sparsity}: sparsity {pruner.sparsity():.4f}, {time.perf_counter() - start:.1f} s", flush=True)
        done(sparsity, distiller.student, begin, time.perf_counter() - start)


def _from(spans: Spans, begin: int, step: int) -> dict[str, Tensor]:
    """No stage sees the inputs of another."""
    return spans(begin + step)


def zeros(model: nn.Module) -> float:
    """The sparsity that a model starts with."""
    weights = [model.get_submodule(name).weight for name in linears(model)]
    return round(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights), 3)


def probe(distiller: Distiller, spans: Spans, args: argparse.Namespace) -> tuple[float, float]:
    """(seconds a step, the learning rate with the least loss at the end of a short run), on copies."""
    seconds, ends, steps = 0.0, {}, args.least
    for lr in (args.lr[0], *args.lr):  # kernels are loaded, or compiled, in the first
        trial = Distiller(copy.deepcopy(distiller.student), distiller.teacher, **distiller.weights)
        pruner = BlockPruner(trial.student, Cubic(args.sparsities[-1], 5, 5))
        seen: list[tuple[int, float, float]] = []
        train(trial, spans, steps, lr, pruner, args, log=partial(_keep, seen), log_every=max(1, steps // 8))
        half = seen[len(seen) // 2 - 1]  # masks were chosen long before
        seconds = (seen[-1][1] - half[1]) / max(1, seen[-1][0] - half[0])
        ends[lr] = float(np.mean([loss for _, _, loss in seen[-2:]]))
        print(f"probe: {lr} {ends[lr]:.4f}, {1e3 * seconds:.1f} ms a step", flush=True)
    return seconds, min(ends, key=ends.__getitem__)


def train(distiller: Distiller, batch, steps: int, lr: float, pruner: BlockPruner, args: argparse.Namespace, **more):
    fit(distiller, batch, steps, lr, pruner, dtype=DTYPE, compiled=args.compiled, **more)


def _keep(seen: list[tuple[int, float, float]], step: int, losses: Mapping[str, float]) -> None:
    seen.append((step, time.perf_counter(), losses["loss"]))


def _log(step: int, losses: Mapping[str, float]) -> None:
    print(f"  {step} " + " ".join(f"{name} {value:.4f}" for name, value in losses.items()), flush=True)


def save(path: Path, model: nn.Module, names: list[str]) -> None:
    """Block weights in float16 without their zeros, what else was trained in float32; the model gets what was saved."""
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.startswith("embeddings."):
                continue
            if key.removesuffix(".weight") in names:
                value.copy_(value.half())
                tensors |= {f"{key}:{n}": t.cpu() for n, t in Bitmask.encode(value.half()).tensors().items()}
            else:
                tensors[key] = value.cpu()
    save_file(tensors, path)


def restore(path: Path, model: nn.Module) -> nn.Module:
    """The dense model with what `save` wrote."""
    tensors, state = load_file(path), model.state_dict()
    for key in state:
        if f"{key}:weight" in tensors:
            found = Bitmask(tuple(state[key].shape), tensors[f"{key}:weight"], tensors[f"{key}:mask"])
            state[key] = found.decode(torch.float32)
        elif key in tensors:
            state[key] = tensors[key]
    model.load_state_dict(state)
    return model


def one_shot(model: nn.Module, spans: Spans, sparsity: float) -> nn.Module:
    """By `gossamer.compress`, calibrated on 260 spans of 256 tokens of the distillation text."""
    ids = torch.cat(
        [spans.cut(i, 52, 256, torch.Generator(spans.device).manual_seed(i)) for i in range(len(spans.shares))]
    )
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in linears(model)}
    rules = [Rule(name, None, Block().ratio(shape, sparsity)) for name, shape in shapes.items()]
    return compress(model, ids, plan(model, "block", 0.5, rules), sequential=True)


def calibration(spans: Spans, count: int) -> Iterator[dict[str, Tensor]]:
    return (spans(10**6 + i) for i in range(count))


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = load(args.carry / "model", args.device)
    spans = spans_of(args.carry, args.tokens, args.device, args.noise)
    names, stages = linears(teacher), {}
    student = trainable(copy.deepcopy(teacher))
    weights = dict(zip(("hidden", "embedding", "similarity"), args.weights, strict=True))
    distiller = Distiller(restore(args.start, student) if args.start else student, teacher, **weights)

    def done(sparsity: float, student: nn.Module, steps: int, seconds: float) -> None:
        stages[sparsity] = file = args.out / f"distilled_{round(100 * sparsity)}.safetensors"
        save(file, student, names)
        case = {"model": NAME, "sparsity": sparsity, "variant": "distilled", "tokens_a_step": args.tokens}
        case |= {"start": args.start.stem if args.start else "dense", "compiled": args.compiled}
        line = {"bench": "quality", "summary": "training_seconds", "case": case, "value": round(seconds, 1)}
        bar = {"sense": "<=", "must": MINUTES * 60, "unit": "s, trials of learning rates included", "n": steps}
        append(args.out / "quality.jsonl", line | bar | environment(args.device))

    learn(distiller, spans, args, done)
    print(f"trained {time.perf_counter() - began:.1f} s", flush=True)
    if args.collections:
        judge_all(args, teacher, spans_of(args.carry, args.tokens, args.device), stages)


def judge_all(args: argparse.Namespace, teacher: nn.Module, spans: Spans, stages: Mapping[float, Path]) -> None:
    known = dense_of(args.dense, args.collections) if args.dense else {}
    record = Record(Judge(args.carry, args.device, args.collections), args.out, args.device, known)
    if not known:
        record(teacher, "dense", 0.0)
    students = {s: restore(file, copy.deepcopy(teacher)) for s, file in sorted(stages.items(), reverse=True)}
    dense_too, few = {0.0: teacher} | students, list(calibration(spans, 8))
    for what in args.variants:
        for sparsity, model in students.items() if what in ("float", "one_shot") else dense_too.items():
            name = "one_shot" if what == "one_shot" else "distilled" if sparsity else "int8"
            record(VARIANTS[what](model, args, teacher, spans, few, sparsity), name, sparsity, **CASES[what])


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "float": lambda model, *_: model,
    "int8": lambda model, *_: emulate(copy.deepcopy(model)),
    "native": lambda model, args, *_: convert(model, BertTokenizerFast(str(args.carry / "model/vocab.txt"))),
    "one_shot": lambda _, args, teacher, spans, few, sparsity: one_shot(copy.deepcopy(teacher), spans, sparsity),
    "static": lambda model, args, teacher, spans, few, sparsity: emulate(copy.deepcopy(model), calibrate(model, few)),
}
CASES: dict[str, dict] = {"float": {}, "int8": {"int8": True}, "one_shot": {}}
CASES |= {"static": {"int8": True, "activations": "static"}, "native": {"int8": True, "engine": "native"}}
USUAL = ("float", "int8", "one_shot", "static")


def evaluate(args: argparse.Namespace) -> None:
    teacher = load(args.carry / "model", args.device)
    spans = spans_of(args.carry, args.tokens, args.device)
    found = {s: args.out / f"distilled_{round(100 * s)}.safetensors" for s in args.sparsities}
    judge_all(args, teacher, spans, {s: f for s, f in found.items() if f.exists()})


def pack(args: argparse.Namespace) -> None:
    out = args.carry / "model"
    out.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_pretrained(args.model, add_pooling_layer=False)
    if args.int8:
        model.config.save_pretrained(out)
        encoder_text.write_model(out / INT8, model)
    else:
        model.half().save_pretrained(out)
    shutil.copy(args.model / "vocab.txt", out)
    judged = {name: read(args.data).judged for name, read in ir_data.COLLECTIONS.items()}
    (args.carry / "judged.json").write_text(json.dumps(judged))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("model", type=Path)
    packing.add_argument("data", type=Path)
    packing.add_argument("carry", type=Path)
    packing.add_argument("--int8", action="store_true", help="half the bytes; the teacher is then rounded")
    for verb in ("run", "evaluate"):
        sub = verbs.add_parser(verb)
        sub.add_argument("carry", type=Path)
        sub.add_argument("out", type=Path)
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--tokens", type=int, default=16_384, help="per step")
        sub.add_argument("--sparsities", type=float, nargs="*", default=list(STAGES))
        sub.add_argument("--variants", nargs="*", default=USUAL, choices=list(VARIANTS))
        sub.add_argument("--dense", type=Path, help="results with the dense model's line, which takes minutes on a CPU")
        sub.add_argument("--collections", nargs="*", default=list(ir_data.COLLECTIONS))
        if verb == "run":
            sub.add_argument("--seconds", type=float, default=200, help="of training")
            sub.add_argument("--start", type=Path, help="a file of an earlier run to go on from")
            sub.add_argument("--lr", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4], help="tried for a moment")
            sub.add_argument("--rise", type=float, default=0.3, help="share of a stage in which sparsity rises")
            sub.add_argument("--rises", type=int, default=8, help="choices of masks per stage")
            sub.add_argument("--weights", type=float, nargs=3, default=[1, 1, 1], help="hidden, embedding, similarity")
            sub.add_argument("--noise", type=float, default=0.2, help="share of spans with other words in them")
            sub.add_argument("--compiled", action="store_true", help="through torch.compile")
            sub.add_argument("--least", type=int, default=150, help="steps of a trial, and of a stage at least")
    args = parser.parse_args()
    {"pack": pack, "run": run, "evaluate": evaluate}[args.verb](args)


if __name__ == "__main__":
    main()
