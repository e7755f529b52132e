"""Retrieval collections and unlabelled text for bench_retrieval.py: SciFact, Cranfield, NPL, passages to index.

Each reader takes the data folder whose README lists the sources and licences.
"""

from __future__ import annotations

import ast
import csv
import io
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Judgements = list[dict[int, int]]  # per query: document index -> gain


@dataclass(frozen=True)
class Collection:
    docs: list[str]
    queries: list[str]
    judged: Judgements


def _text(path: Path) -> str:
    return lzma.open(path, "rt", encoding="utf-8", errors="replace").read()


def scifact(data: Path) -> Collection:
    """BEIR's SciFact: claims of its test split against 5,183 abstracts (title and abstract joined)."""
    rows = list(csv.DictReader(io.StringIO(_text(data / "ir/scifact.corpus.csv.xz"))))
    at = {int(row["doc_id"]): i for i, row in enumerate(rows)}
    splits = ("train", "validation", "test")
    files = [_text(data / f"ir/scifact.claims_{split}.csv.xz") for split in splits]
    claims = {int(row["id"]): row["claim"] for file in files for row in csv.DictReader(io.StringIO(file))}
    wanted: dict[int, dict[int, int]] = {}
    for line in _text(data / "ir/scifact.qrels_test.tsv.xz").splitlines()[1:]:
        query, doc, gain = map(int, line.split())
        wanted.setdefault(query, {})[at[doc]] = gain
    docs = [f"{row['title']} {' '.join(_sentences(row['abstract']))}" for row in rows]
    return Collection(docs, [claims[q] for q in wanted], list(wanted.values()))


def _sentences(stored: str) -> list[str]:
    """The abstract is the repr of a numpy array of strings: adjacent literals without commas, one a line."""
    literals = re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", stored)
    return [ast.literal_eval(literal) for literal in literals]


def cranfield(data: Path) -> Collection:
    """1,400 abstracts, 225 queries; the judgements name a query by its ordinal, not by its id."""
    docs = [" ".join(record.split()) for record in _records(_text(data / "ir/cran.all.1400.xz"))]
    queries = [" ".join(record.split()) for record in _records(_text(data / "ir/cran.qry.xz"))]
    judged: Judgements = [{} for _ in queries]
    for line in _text(data / "ir/cranqrel.correct.xz").splitlines():
        query, _, doc, grade = line.split()[:4]
        if int(grade) > 0 and int(doc) <= len(docs):
            judged[int(query) - 1][int(doc) - 1] = 1
    return Collection(docs, queries, judged)


def _records(text: str) -> Iterator[str]:
    """The .W field (the text; in documents it starts with the title) of each SMART record."""
    for record in re.split(r"^\.I ", text, flags=re.M)[1:]:
        yield record.split("\n.W\n", 1)[1]


def npl(data: Path) -> Collection:
    """11,426 short abstracts, 93 queries."""
    docs = _numbered(_text(data / "ir/npl.doc-text.xz"))
    at = {number: i for i, number in enumerate(docs)}  # three numbers were never given
    queries = [body.lower() for body in _numbered(_text(data / "ir/npl.query-text.xz")).values()]
    found = _numbered(_text(data / "ir/npl.rlv-ass.xz")).values()
    return Collection(list(docs.values()), queries, [{at[int(d)]: 1 for d in body.split()} for body in found])


def _numbered(text: str) -> dict[int, str]:
    """Records of a number, lines of text and a slash."""
    records = [r.split(None, 1) for r in re.split(r"^\s*/\s*$", text, flags=re.M) if r.split()]
    return {int(number): " ".join(body.split()) for number, body in records}


COLLECTIONS: dict[str, Callable[[Path], Collection]] = {"scifact": scifact, "cranfield": cranfield, "npl": npl}


def wikipedia(data: Path) -> list[str]:
    """Lead paragraphs of English Wikipedia, the title first."""
    leads = _text(data / "wiki_leads/wiki.train.txt.xz").split("<|endoftext|>")
    return [" ".join(lead.split()) for lead in leads if lead.strip()]


def novels(data: Path, words: int = 45) -> Iterator[str]:
    """Passages of about `words` words cut from the novels at ends of sentences."""
    for paragraph in _text(data / "novels/novels.train.txt.xz").split("\n"):
        held: list[str] = []
        for sentence in re.split(r"(?<=[.!?])[\"'”’]?\s+", paragraph):
            held += sentence.split()
            if len(held) >= words:
                yield " ".join(held[: 2 * words])
                held = []
        if len(held) >= words // 2:
            yield " ".join(held[: 2 * words])


def passages(data: Path, count: int) -> list[str]:
    """`count` texts: every Wikipedia lead, then passages spread evenly over the novels."""
    leads, cut = wikipedia(data), list(novels(data))
    want = min(max(count - len(leads), 0), len(cut))
    return (leads + [cut[i * len(cut) // want] for i in range(want)])[:count]


def sentences(texts: list[str], per_text: int = 2) -> list[str]:
    """Short texts like queries, without labels: up to `per_text` sentences of each document, spread over it."""
    found = []
    for text in texts:
        parts = [s for s in re.split(r"(?<=[.!?])\s+", text) if 4 <= len(s.split()) <= 40]
        found += parts[:: max(1, len(parts) // per_text)][:per_text]
    return found


def heldout_queries(data: Path, count: int = 1000) -> list[str]:
    """Sentences of Wikipedia leads and novels that `passages` does not hold: queries for speed, without judgements."""
    files = ("wiki_leads/wiki.test.txt.xz", "novels/novels.valid.txt.xz")
    halves = [sentences(re.split(r"\n+", _text(data / file)), 1) for file in files]
    return [half[i * len(half) // (count // 2)] for half in halves for i in range(count // 2)]
