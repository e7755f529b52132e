"""Sparse heads on MiniLM without labels: what they keep of the dense ranking, and what a search over them costs.

    python benchmarks/ir_embed.py --data DATA --cache CACHE        # once: dense embeddings, some ten minutes
    python benchmarks/bench_retrieval.py train --cache CACHE       # every head of HEADS, 1-2 minutes each; resumes
    python benchmarks/bench_retrieval.py report --data DATA --cache CACHE
    python benchmarks/bench_retrieval.py codes --cache CACHE --out FOLDER    # codes of 100k passages for bench_index

No judgement is read but by `report`. Heads see the documents of the collections and sentences of them, novels and
Wikipedia leads. Search is exact, by brute force; "kept" is a share of the nDCG@10 of the dense model.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import ir_data
import ir_embed
from gossamer.retrieval import flops as cost
from gossamer.retrieval.controller import FlopsRegularizer, QuadraticRamp
from gossamer.retrieval.fit import fit_head
from gossamer.retrieval.head import SparseHead
from results import append, environment

RESULTS = Path(__file__).parent / "results" / "retrieval.jsonl"


@dataclass(frozen=True)
class Head:
    """One head to train: a penalty by target FLOPs, or by a fixed weight (of F~ or of l1)."""

    name: str
    activation: str = "topk"
    options: dict = field(default_factory=dict)
    dim: int = 4096
    flops: float | None = None
    weight: float | None = None
    l1: float | None = None
    steps: int = 1500
    train: tuple[str, ...] = ()

    def penalty(self):
        if self.flops is not None:
            return FlopsRegularizer(flops=self.flops, steps=self.steps)
        if self.weight is not None:
            return FlopsRegularizer(schedule=QuadraticRamp(self.weight, self.steps // 2))
        if self.l1 is not None:
            ramp = QuadraticRamp(self.l1, self.steps // 2)
            return lambda codes: _ramped_l1(codes, ramp)
        return None


def _ramped_l1(codes: Tensor, ramp: QuadraticRamp) -> Tensor:
    ramp.update(math.nan)
    return ramp.weight * cost.l1_penalty(codes)


PASSAGES = ("passages", "wikipedia.sentences")
BEST = "topk+flops-48"  # the head that the bars of quality are about
HEADS = [
    Head("wide-32", options={"k": 32}, weight=3.0),
    Head("codes-F1", options={"k": 32}, dim=1024, weight=10.0, steps=1000, train=PASSAGES),
    Head("codes-F5", "relu", dim=2048, flops=5.0, train=PASSAGES),
    *(Head(f"flops-{f}", "relu", dim=2048, flops=f, steps=1000) for f in (2, 4, 8)),
    *(Head(f"l1-{w}", "relu", dim=2048, l1=w, steps=1000) for w in (0.05, 0.1, 0.2)),
    *(Head(f"topk-{k}", options={"k": k}, dim=2048, steps=2000) for k in (24, 32, 48)),
    *(Head(f"topk+flops-{k}", options={"k": k}, dim=2048, weight=10.0, steps=2000) for k in (32, 40, 48)),
]


def training_sets(cache: Path, head: Head) -> list[Tensor]:
    """One per collection: documents and their sentences; the last is passages of everything else."""
    if head.train:
        return [torch.cat([ir_embed.load(cache, part) for part in head.train])]
    own = [torch.cat([ir_embed.load(cache, f"{c}.{p}") for p in ("docs", "sentences")]) for c in ir_data.COLLECTIONS]
    return [*own, torch.cat([ir_embed.load(cache, part) for part in PASSAGES])]


def trained(cache: Path, head: Head) -> SparseHead:
    """The head from the cache, trained first where it is not there."""
    file = cache / f"head.{head.name}.pt"
    model = SparseHead(384, head.dim, head.activation, **head.options)
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model.eval()
    torch.manual_seed(0)
    model.reset()
    penalty, start = head.penalty(), time.monotonic()
    fit_head(model, training_sets(cache, head), penalty, head.steps, notify=lambda s, l: _tell(head, penalty, s, l))
    torch.save(model.state_dict(), file)
    print(f"{head.name}: {time.monotonic() - start:.0f} s", flush=True)
    return model


def _tell(head: Head, penalty, step: int, loss: float) -> None:
    if step % 250 == 0 or step == head.steps - 1:
        asked = (
            f", F {penalty.measured:.2f}, weight {penalty.schedule.weight:.3g}"
            if isinstance(penalty, FlopsRegularizer)
            else ""
        )
        print(f"{head.name} {step}/{head.steps}: loss {loss:.3f}{asked}", flush=True)


def codes(cache: Path, out: Path) -> None:
    """real_F1.npz (top-k 32 + F~), real_F5.npz (F~ alone): passages; *_q.npz: held-out sentences as queries."""
    out.mkdir(parents=True, exist_ok=True)
    rows, queries = ir_embed.load(cache, "passages"), ir_embed.load(cache, "passages.queries")
    for head in (h for h in HEADS if h.name.startswith("codes-")):
        model, name = trained(cache, head), head.name.removeprefix("codes-")
        found, asked = to_csr(model, rows), to_csr(model, queries)
        scipy.sparse.save_npz(out / f"real_{name}.npz", found)
        scipy.sparse.save_npz(out / f"real_{name}_q.npz", asked)
        sizes = f"{found.nnz / found.shape[0]:.1f} and {asked.nnz / asked.shape[0]:.1f} non-zeros"
        uneven = cost.unevenness(found, asked)
        print(
            f"real_{name}: {found.shape}, {asked.shape[0]} queries, {sizes}, F {cost.flops(found, asked):.3f}, "
            f"R_sub {uneven:.2f}"
        )


@torch.inference_mode()
def to_csr(model: SparseHead, dense: Tensor) -> scipy.sparse.csr_matrix:
    parts = [scipy.sparse.csr_matrix(model(x).numpy()) for x in dense.split(4096)]
    return scipy.sparse.vstack(parts, format="csr", dtype=np.float32)


@dataclass(frozen=True)
class Measured:
    """One head on one collection: nDCG@10 alone and after a dense re-rank of 100, as shares of dense; its cost."""

    flops: float
    uneven: float
    nonzeros: float
    sparse: float
    reranked: float
    dense: float  # nDCG@10 itself


def ndcg(scores: Tensor, judged: ir_data.Judgements, k: int = 10) -> float:
    """Mean over queries; gains 2^grade - 1, ties by the order of topk."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    found = []
    for best, grades in zip(scores.topk(k, dim=1).indices.tolist(), judged, strict=True):
        ideal = sorted(grades.values(), reverse=True)[:k]
        gains = [2 ** grades.get(doc, 0) - 1 for doc in best]
        found.append(np.dot(gains, discount) / np.dot([2**g - 1 for g in ideal], discount[: len(ideal)]))
    return float(np.mean(found))


@torch.inference_mode()
def measure(model: SparseHead, docs: Tensor, queries: Tensor, judged: ir_data.Judgements) -> Measured:
    rows, asked, dense = model(docs), model(queries), queries @ docs.T
    scores = asked @ rows.T
    survivors = scores.topk(100, dim=1).indices
    again = torch.full_like(scores, -math.inf).scatter(1, survivors, dense.gather(1, survivors))
    base = ndcg(dense, judged)
    return Measured(
        cost.flops(rows, asked),
        cost.unevenness(rows, asked),
        cost.batch_nonzeros(rows),
        ndcg(scores, judged) / base,
        ndcg(again, judged) / base,
        base,
    )


def ratio_at_equal_quality(ours: list[Measured], theirs: list[Measured]) -> float:
    """Geometric mean of our FLOPs over theirs at equal nDCG@10, at 5 qualities spread over what both families cover.

    nDCG on some hundred queries is noisy: each family is the least-squares line of nDCG over log FLOPs.
    """
    low = max(min(m.sparse for m in family) for family in (ours, theirs))
    high = min(max(m.sparse for m in family) for family in (ours, theirs))
    if high <= low:
        raise ValueError("the families share no quality; fix: train heads of theirs with more FLOPs, or fewer")
    (our_slope, our_start), (their_slope, their_start) = (
        np.polyfit([math.log(m.flops) for m in family], [m.sparse for m in family], 1) for family in (ours, theirs)
    )
    at = np.linspace(low, high, 5)
    return math.exp(float(np.mean((at - our_start) / our_slope - (at - their_start) / their_slope)))


def report(data: Path, cache: Path, results: Path) -> None:
    """Every head that is there on every collection, then one summary line per bar."""
    found: dict[str, dict[str, Measured]] = {}
    sets = {name: read(data) for name, read in ir_data.COLLECTIONS.items()}
    for head in (h for h in HEADS if (cache / f"head.{h.name}.pt").exists()):
        model = trained(cache, head)
        for name, collection in sets.items():
            docs, queries = (ir_embed.load(cache, f"{name}.{part}") for part in ("docs", "queries"))
            found.setdefault(head.name, {})[name] = m = measure(model, docs, queries, collection.judged)
            print(
                f"{head.name:16} {name:10} {m.nonzeros:6.1f} non-zeros, F {m.flops:6.2f}, uneven {m.uneven:5.2f}: "
                f"{m.sparse:.3f} of dense {m.dense:.4f} alone, {m.reranked:.3f} re-ranked",
                flush=True,
            )
            for line in _cells(head, name, m):
                append(results, line | environment())
    for line in [*_quality(found), *_evenness(found), *_controller(cache)]:
        print(line["summary"], line["case"], round(line["value"], 4), line["sense"], line["must"])
        append(results, {"bench": "retrieval"} | line | environment())


def _cells(head: Head, collection: str, m: Measured) -> list[dict]:
    case = {"collection": collection, "head": head.name, "dim": head.dim, "nonzeros": round(m.nonzeros, 1)}
    line = {"bench": "retrieval", "baseline": "dense MiniLM", "spread": None}
    kept = {"baseline_value": m.dense, "unit": "nDCG@10"}
    return [
        line | {"case": case | {"stage": "sparse"}, "ours": m.sparse * m.dense, "ratio": m.sparse} | kept,
        line | {"case": case | {"stage": "reranked"}, "ours": m.reranked * m.dense, "ratio": m.reranked} | kept,
        line
        | {"case": case | {"uneven": round(m.uneven, 3)}, "ours": m.flops, "baseline_value": 384.0}
        | {"unit": "multiplications a row", "ratio": 384 / m.flops},
    ]


def _quality(found: dict[str, dict[str, Measured]]) -> list[dict]:
    cells = found.get(BEST, {})
    if len(cells) < len(ir_data.COLLECTIONS):
        return []
    figures = [("reranked", ">=", 0.97), ("sparse", ">=", 0.80), ("flops", "<=", 2.5)]
    lines = []
    for stage, sense, must in figures:
        values = {name: getattr(m, stage) for name, m in cells.items()}
        values["mean"] = float(np.mean(list(values.values())))
        name, unit = ("flops", "multiplications a row") if stage == "flops" else ("ndcg_kept", "share of dense nDCG@10")
        for collection, value in values.items():
            case = {"collection": collection, "head": BEST} | ({} if stage == "flops" else {"stage": stage})
            bar = {"must": must if collection == "mean" else None, "n": 3 if collection == "mean" else 1}
            lines.append({"summary": name, "case": case, "value": value, "sense": sense, "unit": unit} | bar)
    return lines


def _evenness(found: dict[str, dict[str, Measured]]) -> list[dict]:
    """FLOPs against the family without our penalty, where each has at least two heads."""
    lines = []
    for summary, ours, theirs, must, where in (
        ("flops_vs_l1", "flops-", "l1-", 0.5, ("scifact", "npl", "cranfield")),
        ("flops_vs_topk", "topk+flops-", "topk-", 0.85, ("scifact", "npl", "cranfield")),
    ):
        families = [[found[h] for h in found if h.startswith(prefix)] for prefix in (ours, theirs)]
        if min(map(len, families)) < 2:
            continue
        for name in where:
            value = ratio_at_equal_quality(*[[m[name] for m in family] for family in families])
            line = {"summary": summary, "case": {"collection": name}, "value": value, "sense": "<="}
            lines.append(line | {"must": must if name != "cranfield" else None, "unit": "FLOPs ratio", "n": 5})
    return lines


@torch.inference_mode()
def _controller(cache: Path) -> list[dict]:
    """How far from the target a head's codes are, on sentences and passages drawn as in training, but 8,192 of each."""
    lines = []
    for head in (h for h in HEADS if h.flops is not None and (cache / f"head.{h.name}.pt").exists()):
        model, picks = trained(cache, head), torch.Generator().manual_seed(1)
        rows = [s[torch.randperm(len(s), generator=picks)[:8192]] for s in training_sets(cache, head)]
        value = abs(float(np.mean([cost.flops(model(r)) for r in rows])) / head.flops - 1)
        case = {"head": head.name, "target": head.flops}
        line = {"summary": "controller_error", "case": case, "value": value, "sense": "<=", "must": 0.15}
        lines.append(line | {"unit": "share of the target", "n": len(rows)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "report", "codes"])
    parser.add_argument("--data", type=Path, help="the data folder (ir/, novels/, wiki_leads/)")
    parser.add_argument("--cache", type=Path, required=True, help="embeddings of ir_embed.py; heads are kept there too")
    parser.add_argument("--out", type=Path, help="codes: the folder to write")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", help="train: this head alone")
    args = parser.parse_args()
    if args.what == "codes":
        codes(args.cache, args.out)
    elif args.what == "train":
        for head in HEADS:
            if args.only in (None, head.name):
                trained(args.cache, head)
    else:
        report(args.data, args.cache, args.results)


if __name__ == "__main__":
    main()
