"""nDCG@10 of sentence encoders on the collections, as a share of the dense model's; for bench_encoder_quality.py."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import encoder_text
from gossamer.train.distill import embed
from results import append, environment

NAME = "all-MiniLM-L6-v2"
KINDS = ("docs", "queries")
UNIT = "share of dense nDCG@10"
BARS = {("distilled", 0.7, False): 0.95, ("distilled", 0.8, False): 0.9, ("int8", 0.0, True): 0.99}
BARS |= {("distilled", 0.7, True): 0.95, ("distilled", 0.8, True): 0.9}


class Judge:
    """nDCG@10 of a model on the collections, in float32."""

    def __init__(self, folder: Path, device: str, names: list[str]) -> None:
        self.device, self.tokens = device, 65_536 if device != "cpu" else 8192
        judged = json.loads((folder / "judged.json").read_text())
        self.parts = {}
        for name in names:
            docs, queries = (encoder_text.split(encoder_text.read(folder / f"{name}.{kind}.xz")) for kind in KINDS)
            self.parts[name] = docs, queries, judged[name]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        model = model.eval().to(self.device)
        found = {}
        for name, (docs, queries, judged) in self.parts.items():
            scores = self.embed(model, queries) @ self.embed(model, docs).T
            found[name] = ndcg(scores.cpu(), judged)
        return found

    @torch.inference_mode()
    def embed(self, model: nn.Module, inputs: list[Tensor]) -> Tensor:
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        found = torch.empty(len(inputs), model.config.hidden_size, device=self.device)
        while order:
            longest = len(inputs[order[-1]])
            batch, order = order[-max(1, self.tokens // longest) :], order[: -max(1, self.tokens // longest)]
            ids = nn.utils.rnn.pad_sequence([inputs[i] for i in batch], batch_first=True).long().to(self.device)
            mask = (ids != 0).long()
            found[batch] = embed(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        return found


def ndcg(scores: Tensor, judged: list[dict[str, int]], k: int = 10) -> float:
    """Mean over queries; gains 2^grade - 1."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    found = []
    for best, grades in zip(scores.topk(k, dim=1).indices.tolist(), judged, strict=True):
        ideal = np.array(sorted((2**g - 1 for g in grades.values()), reverse=True)[:k])
        gains = [2 ** grades.get(str(doc), 0) - 1 for doc in best]
        found.append(np.dot(gains, discount) / np.dot(ideal, discount[: len(ideal)]))
    return float(np.mean(found))


class Record:
    """Judges variants and appends what they keep of the dense model's nDCG@10."""

    def __init__(self, judge: Judge, out: Path, device: str, dense: Mapping[str, float]) -> None:
        self.judge, self.out, self.device, self.dense = judge, out, device, dict(dense)

    def __call__(
        self, model: nn.Module, variant: str, sparsity: float = 0.0, int8: bool = False, **more: object
    ) -> None:
        start = time.perf_counter()
        found = self.judge(model)
        self.dense = self.dense or found
        kept = sum(found.values()) / sum(self.dense.values())
        case = {"model": NAME, "sparsity": sparsity, "variant": variant, "int8": int8, "pattern": "4x1"} | more
        must = BARS.get((variant, sparsity, int8)) if set(more) <= {"engine"} else None
        bar = {"sense": ">=", "must": must, "unit": UNIT}
        detail = {key: {n: round(v, 5) for n, v in of.items()} for key, of in (("ndcg", found), ("dense", self.dense))}
        line = {"bench": "quality", "summary": "ndcg_kept", "case": case, "value": round(kept, 5)} | bar
        append(self.out / "quality.jsonl", line | {"n": len(found)} | detail | environment(self.device))
        seconds = time.perf_counter() - start
        print(f"{case} kept {kept:.4f} {detail['ndcg']} ({seconds:.1f} s)", flush=True)


def dense_of(file: Path, names: list[str]) -> dict[str, float]:
    """nDCG@10 of the dense model in the newest line of a file that has it for all collections."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = [line["ndcg"] for line in lines if line.get("case", {}).get("variant") == "dense" and "ndcg" in line]
    fits = [ndcg for ndcg in found if set(names) == set(ndcg)]
    if not fits:
        raise SystemExit(f"{file} has no line of the dense model on {', '.join(names)}; fix: leave --dense out")
    return fits[-1]
