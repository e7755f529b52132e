"""Quality against FLOPs for four families of heads, from the lines of bench_retrieval.py, and what a search costs.

The lines have nDCG@10 on three collections, all too small to time a search of. That is timed on 100k passages under the
same heads, where the judgement is the dense model's: the share of its 10 best that the codes' 10 best hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from gossamer.retrieval.index import SparseIndex
from gossamer.retrieval.tuning import recall
from index_report import K, Report, batches, least

SOURCE = Path(__file__).parent / "results" / "retrieval.jsonl"
FAMILIES = {"flops-": "F~", "l1-": "l1", "topk-": "top-k", "topk+flops-": "top-k + F~"}


def family(head: str) -> str | None:
    """None for a head of none of the four."""
    return next((name for prefix, name in FAMILIES.items() if head.startswith(prefix)), None)


def collections(report: Report, source: Path = SOURCE) -> None:
    """A line per head and collection; of several measurements the last, of those without `variant`."""
    points: dict[tuple[str, str], dict] = {}
    for line in map(json.loads, source.read_text().splitlines()):
        case = line["case"]
        if "summary" in line or "variant" in case or not family(case["head"]) or case.get("stage") == "reranked":
            continue
        point = points.setdefault((case["head"], case["collection"]), {"nonzeros": case["nonzeros"]})
        point |= {"kept": line["ratio"]} if "stage" in case else {"flops": round(line["ours"], 4)}
        point["source"] = f"{source.name}, {line['commit']}, {line['date']}"
    if not points:
        raise SystemExit(f"{source} has no heads; fix: run bench_retrieval.py report first")
    for (head, collection), point in sorted(points.items(), key=lambda p: (p[0][1], family(p[0][0]), p[1]["flops"])):
        kept, case = point.pop("kept"), {"family": family(head), "head": head, "collection": collection}
        report.line("flops_front", case | point, kept, "share of dense nDCG@10", ">=")


def prepare(cache: Path, folder: Path) -> None:
    """Codes of the passages under every trained head of the families, and the dense model's best."""
    import ir_embed
    from bench_retrieval import HEADS, to_csr, trained

    docs, queries = ir_embed.load(cache, "passages"), ir_embed.load(cache, "passages.queries")
    folder.mkdir(parents=True, exist_ok=True)
    best = [(part @ docs.T).topk(K, dim=1).indices.numpy() for part in queries.split(100)]
    np.save(folder / "front-dense.npy", np.concatenate(best))
    for head in (h for h in HEADS if family(h.name) and (cache / f"head.{h.name}.pt").exists()):
        model = trained(cache, head)
        sp.save_npz(folder / f"front-{head.name}.npz", to_csr(model, docs), compressed=False)
        sp.save_npz(folder / f"front-{head.name}_q.npz", to_csr(model, queries), compressed=False)
        print(f"{head.name}: codes of {len(docs):,} passages", flush=True)


def passages(report: Report, folder: Path, queries: int) -> None:
    """Exact searches, one thread, of what `prepare` made; nothing where it made nothing."""
    for file in sorted(folder.glob("front-*[0-9].npz")):
        head = file.stem.removeprefix("front-")
        docs, asked = sp.load_npz(file), sp.load_npz(file.with_name(f"{file.stem}_q.npz"))[:queries]
        index = SparseIndex.build(docs)
        dense = np.load(folder / "front-dense.npy")[: asked.shape[0]]
        kept, spent = recall(index.search(asked, K).ids, dense), index.postings(asked).mean() / docs.shape[0]
        case = {"family": family(head), "head": head, "collection": "passages"}
        case |= {"nonzeros": round(docs.nnz / docs.shape[0], 1), "flops": round(float(spent), 4)}
        report.line("flops_front", case, kept, "share of the dense 10 best", ">=")
        seconds = least([lambda p=p, i=index: i.search(p, K, threads=1) for p in batches(asked)])
        report.us("exact", 1, seconds / asked.shape[0] * 1e6, **case)
