"""What the benchmarks of cuda_lscd say of what they measured, and the decoder that one of them runs alone."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gossamer import nvrtc
from gossamer.kernels._lscd_pack import head_bytes


@pytest.fixture
def bench_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    kept = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - kept:  # other files of tests have a `results` of their own
        if "benchmarks" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def cell(shape: tuple[int, int], sparsity: float, tokens: int, ratio: float, commit: str) -> dict:
    case = {"shape": shape, "sparsity": sparsity, "tokens": tokens, "variant": "dispatched"}
    return {"case": case, "ratio": ratio, "machine": "M", "versions": {}, "commit": commit, "date": commit}


def test_the_worst_cell_is_that_of_the_newest_lines(bench_of: Any, tmp_path: Path) -> None:
    bench, file = bench_of("bench_lscd"), tmp_path / "lscd.jsonl"
    cells = [(shape, s, n) for shape in bench.SHAPES for s in bench.MUST for n in bench.TOKENS]
    lines = [cell(*c, 1.5, "a") for c in cells] + [cell(*cells[0], 0.5, "b"), cell(*cells[0], 0.99, "c")]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    bench.summarise(file)
    found = json.loads(file.read_text().splitlines()[-1])
    assert (found["value"], found["n"], found["case"], found["commits"]) == (0.99, 210, {}, ["a", "c"])
    file.write_text("".join(json.dumps(x) + "\n" for x in lines[1:-2]))
    with pytest.raises(ValueError, match=r"209 of 210 cells on \['M'\]; fix: run --dispatched"):
        bench.summarise(file)


def test_a_part_of_the_cells_says_so(bench_of: Any, tmp_path: Path) -> None:
    bench = bench_of("bench_lscd").Bench(tmp_path / "lscd.jsonl", [16])
    bench.dispatched, bench.ratios = {(0.7, 16): [1.5, 1.25]}, {(0.7, 16): [2.0] * 7, (0.8, 16): [2.0] * 6}
    bench._summary = lambda name, case, value, must, n: seen.append((name, case, value, n))
    seen: list[tuple] = []
    bench.summaries()
    assert seen == [
        ("geomean_vs_cublaslt", {"sparsity": 0.7, "tokens": 16}, pytest.approx(2.0), 7),
        ("worst_dispatched", {"sparsities": [0.7], "tokens": [16], "cells": 2}, 1.25, 2),
    ]


def test_what_is_wrong_or_fails_is_no_baseline(bench_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four proposals one is not supported, one computes something else and one fails."""
    lt = bench_of("cublaslt")
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    y, names = torch.zeros(4, 32).bfloat16(), []

    class Library:
        def __getattr__(self, name: str) -> Any:
            def entry(*args: Any) -> int:
                if name == "cublasLtMatmulAlgoGetHeuristic":
                    args[8][1].status, args[9]._obj.value = 15, 4
                if name == "cublasLtMatmul":
                    names.append(name)
                    y.copy_(x @ w.t() * len(names))
                return 7 * (len(names) == 3)

            return entry

    monkeypatch.setattr(lt, "library", Library)
    monkeypatch.setattr(lt, "handle", lambda: None)
    monkeypatch.setattr(lt, "workspace", lambda: torch.empty(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    product = lt.Product(32, 4, 64)
    assert len(product.proposals) == 3
    found = product.calls(x, [w, w], y)
    assert list(found) == ["cublaslt, proposal 0"] and len(found["cublaslt, proposal 0"]) == 2


@pytest.mark.parametrize("words", [False, True], ids=["halves", "words"])
def test_the_decoder_alone_compiles_and_its_sum_is_that_of_the_stage(bench_of: Any, words: bool) -> None:
    pytest.importorskip("cuda.core")
    bench = bench_of("bench_lscd_decode")
    for arch in ("sm_80", "sm_90a"):
        assert nvrtc.compile_all([bench.function(words, summed) for summed in (False, True)], [arch]) == 2
    for density in (0.0, 0.1, 0.5, 1.0):
        stage, values = bench.stage_of(density, words)
        assert bench.folded(stage[head_bytes(words) // 4 :].tolist()) == bench.checksum(values)


@pytest.mark.gpu
@pytest.mark.parametrize("words", [False, True], ids=["halves", "words"])
def test_the_decoder_alone(bench_of: Any, words: bool) -> None:
    bench = bench_of("bench_lscd_decode")
    for density in (0.0, 0.3, 1.0):
        stage, values = bench.stage_of(density, words)
        bench.checked(stage.cuda(), values, words)
    rate, clock = bench.measured(stage.cuda(), words, 8)
    assert rate > 0 and clock > 0
    with pytest.raises(ArithmeticError, match="not those of the stage"):
        bench.checked(stage.cuda(), values + 1, words)
