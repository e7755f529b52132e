"""prepare() and explain(): the fastest way per size, a bound on copies, the lock file."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer import dispatch, lock, timing
from gossamer.formats import Format
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.dense import Dense
from gossamer.formats.nm24 import NM
from gossamer.formats.product import Product
from gossamer.kernels import KernelError, registry
from gossamer.kernels.cpu_dense import CpuDense
from gossamer.nn import SparseLinear
from gossamer.once import say
from gossamer.prepare import run_dense

SIZES = (1, 4, 32)


def sparse(m: int, k: int) -> Bitmask:
    """Exactly half zeros, so that all of one shape have one density."""
    mask = torch.randperm(m * k).view(m, k) < m * k // 2
    return Bitmask.encode(((torch.rand(m, k) + 1) * mask).bfloat16())


def kinds() -> dict[str, Format]:
    dictionary = Dense.encode(torch.randn(12, 40).bfloat16())
    halves = torch.randn(24, 40).bfloat16()
    halves[:, 0::4], halves[:, 3::4] = 0, 0
    return {"bitmask": sparse(24, 40), "product": Product.of(sparse(24, 12), dictionary), "nm24": NM.encode(halves)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    say.cache_clear()


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({f"{n}{i}": SparseLinear.from_format(a) for i in range(3) for n, a in kinds().items()})


def fixed(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> list[str]:
    """Let every kernel take what `times` says (1 where it says nothing); the names that were timed."""
    seen: list[str] = []

    def race(runners, device, seconds=0.0):
        for calls in runners.values():
            calls[0]()
        seen.extend(runners)
        return {name: times.get(name, 1.0) for name in runners}

    monkeypatch.setattr(timing, "race", race)
    return seen


def ways(layer: nn.Module) -> list[list[str]]:
    return [[s.kernel for s in way] for _, way in dispatch.route(layer.layout).ways]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_answers_stay_the_same(model: nn.Module, dtype: torch.dtype) -> None:
    before = {(n, t): m(torch.ones(t, 40, dtype=dtype) / 8) for n, m in model.items() for t in (0, 1, 3, 33)}
    gossamer.prepare(model, tokens=SIZES, dtype=dtype)
    assert all(layer.prepared for layer in model.values())
    for (name, tokens), expected in before.items():
        found = model[name](torch.ones(tokens, 40, dtype=dtype) / 8)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=2e-2)


def test_the_fastest_is_taken(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(
        monkeypatch, {"cpu_bitmask": 3.0, "cpu_bitmask_many": 3.5, "cpu_dense": 5.0, "vendor": 4.0, "reference": 50.0}
    )
    found = gossamer.prepare(model, tokens=SIZES)
    assert ways(model["bitmask0"]) == [["cpu_bitmask"]]
    assert ways(model["nm240"]) == [["vendor"]], "no sparse kernel beats the copy"
    assert ways(model["product0"]) == [["vendor"]], "4 whole against 4 + 3"
    assert found.copies == sum(m.packed_bytes for m in model.values()) >= 6 * 24 * 40 * 4
    assert found.worst is not None and found.worst >= 1
    rows = {row.layers[0]: row for row in found.rows}
    assert rows["bitmask0"].cells[0].speedup == 4.0 / 3.0
    assert "bitmask0, bitmask1, bitmask2 (3 layers)  bitmask 24x40 density 0.50" in str(found)


def test_one_kernel_for_both_is_timed_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = SparseLinear.from_format(sparse(24, 40)), []
    monkeypatch.setattr(CpuDense, "formats", ("dense", "bitmask"))

    def race(runners, *_):
        seen.append(set(runners))
        return {name: {"cpu_dense": 2.0, "cpu_dense again": 1.0}.get(name, 5.0) for name in runners}

    monkeypatch.setattr(timing, "race", race)
    gossamer.prepare(nn.ModuleDict({"a": layer}), tokens=[1])
    assert seen == [{"cpu_bitmask", "cpu_dense", "cpu_dense again", "reference", "vendor"}]
    times = {place.split(":")[0]: found[1]["cpu_dense"] for place, found in lock.load(layer.device).times.items()}
    assert times == {"bitmask": 2.0, "dense": 1.0}


def test_copies_stay_within_their_memory(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"vendor": 0.5, "cpu_dense": 2.0, "cpu_bitmask": 3.0, "cpu_bitmask_many": 3.5, "reference": 4.0}
    fixed(monkeypatch, times)
    one = 24 * 40 * 4
    gossamer.prepare(model, tokens=SIZES, dense_memory=4 * one)
    copied = [n for n, m in model.items() if ways(m) == [["vendor"]]]
    assert len(copied) == 4
    gossamer.prepare(model, tokens=SIZES, dense_memory=0)
    assert not [n for n, m in model.items() if ["vendor"] in ways(m)]
    assert ways(model["bitmask0"]) == [["cpu_bitmask"]]


def test_a_kernel_without_memory_is_done_without(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, the others are tried as ever; with the memory there the next prepare tries it."""
    kernel = registry["cpu_bitmask"]
    say.cache_clear()
    seen = fixed(monkeypatch, {"cpu_bitmask_many": 9.0, "vendor": 9.0, "cpu_dense": 9.0, "reference": 2.0})
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):

        def full(cls, a, dtype):
            raise torch.OutOfMemoryError("full")

        patch.setattr(kernel, "pack", classmethod(full))
        gossamer.prepare(model, tokens=SIZES)
    text = "no memory to try out cpu_bitmask; layers run without it; fix: make room and run gossamer.prepare again"
    assert [r.message for r in caplog.records].count(text) == 1
    assert "cpu_bitmask" not in seen and ways(model["bitmask0"]) == [["reference"]] and model["nm240"].prepared
    gossamer.prepare(model, tokens=SIZES)
    assert "cpu_bitmask" in seen and ways(model["bitmask0"]) == [["cpu_bitmask"]]


def test_a_second_prepare_times_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fixed(monkeypatch, {})
    gossamer.prepare(model, tokens=SIZES)
    assert seen
    seen.clear()
    first = [m.layout for m in model.values()]
    gossamer.prepare(copy.deepcopy(model), tokens=SIZES)
    gossamer.prepare(model, tokens=SIZES)
    assert not seen
    assert [m.layout for m in model.values()] == first
    gossamer.prepare(model, tokens=[*SIZES, 2])
    assert seen, "a new number of tokens"
    seen.clear()
    gossamer.prepare(model, tokens=SIZES, again=True)
    assert seen


def test_a_kernel_by_name(model: nn.Module) -> None:
    gossamer.prepare(model, tokens=SIZES, kernel="cpu_bitmask")
    assert ways(model["bitmask0"]) == [["cpu_bitmask"]]
    assert ways(model["product0"])[0][1] == "cpu_bitmask"
    with pytest.raises(KernelError, match="cpu_bitmask"):
        gossamer.prepare(model, tokens=SIZES, kernel="cpu_bitmask", dtype=torch.float64)
    with pytest.raises(KeyError, match="unknown kernel 'nope'"):
        gossamer.prepare(model, tokens=SIZES, kernel="nope")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"no sparse layer; fix: gossamer\.compress"):
        gossamer.prepare(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="at least one"):
        gossamer.prepare(nn.ModuleDict({"a": SparseLinear.from_format(sparse(3, 5))}), tokens=[])


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"tokens": 16}, TypeError, r"numbers of tokens, not 16; fix: pass a list"),
        ({"tokens": "16"}, TypeError, r"numbers of tokens, not '16'; fix: pass a list"),
        ({"tokens": [1, 2.5]}, TypeError, r"whole numbers of tokens, not 2.5; fix"),
        ({"dtype": "bfloat16"}, TypeError, r"not 'bfloat16'; fix: dtype=torch.bfloat16"),
        ({"dtype": torch.int8}, TypeError, r"not torch.int8; fix"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, r"not torch.float8_e4m3fn; fix"),
        ({"dense_memory": "1GB"}, ValueError, r"'1GB', no number of bytes; fix"),
        ({"dense_memory": -1}, ValueError, r"-1, no number of bytes; fix"),
        ({"dense_memory": float("nan")}, ValueError, r"nan, no number of bytes; fix"),
    ],
)
def test_arguments_of_other_kinds(wrong: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        gossamer.prepare(nn.ModuleDict({"a": SparseLinear.from_format(sparse(3, 5))}), **wrong)


def test_memory_without_end(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, {"vendor": 0.5})
    gossamer.prepare(model, tokens=SIZES, dense_memory=float("inf"))
    assert all(ways(m) == [["vendor"]] for m in model.values())


def test_a_prepared_layer_compiles_saves_copies_and_moves(tmp_path: Path) -> None:
    layer = SparseLinear.from_format(sparse(24, 40), torch.randn(24))
    model = nn.ModuleDict({"a": layer})
    stored = {n: t.clone() for n, t in model.state_dict().items()}
    gossamer.prepare(model, tokens=SIZES)
    assert model.state_dict().keys() == stored.keys(), "what was packed is not saved"
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    x = torch.randn(2, 40, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.decode(torch.float32).sum(0).expand(2, -1))
    layer.bfloat16()
    assert layer.prepared and layer(torch.randn(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta")
    assert not layer.prepared, "packed for where it was"


def test_run_dense_is_dense(model: nn.Module) -> None:
    x = {(n, t): torch.randn(t, 40) for n in model for t in (2, 20)}
    expected = {(n, t): model[n](each) for (n, t), each in x.items()}
    for kernel, rest in (("vendor", []), ("cpu_dense", [["reference"]])):
        run_dense(model, kernel)
        assert all(ways(layer) == [[kernel], *rest] for layer in model.values())
        for (name, tokens), y in expected.items():
            torch.testing.assert_close(model[name](x[name, tokens]), y, rtol=1e-4, atol=1e-3)


def test_explain_without_prepare(model: nn.Module) -> None:
    found = gossamer.explain(model)
    assert found.worst is None and found.copies == 0
    assert "cpu_bitmask" in str(found) and "not timed here" in str(found)


@pytest.mark.parametrize("damage", ["{", "[]", '{"gossamer_lock": 1}', "\x00", '{"times": {"a": 3}}'])
def test_a_damaged_lock_file_is_ignored_and_replaced(
    model: nn.Module, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock.json"
    path.write_text(damage)
    with caplog.at_level(logging.WARNING, "gossamer"):
        gossamer.explain(model, lock=path)
        gossamer.explain(model, lock=path)
        gossamer.prepare(model, tokens=[1], lock=path)
    assert len([r for r in caplog.records if "ignoring the lock file" in r.message]) == 1
    assert json.loads(path.read_text())["gossamer_lock"] == lock.VERSION


@pytest.mark.parametrize("field", ["gossamer", "torch", "device", "isa"])
def test_a_lock_file_of_another_machine_is_ignored(
    model: nn.Module, tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, path = fixed(monkeypatch, {}), tmp_path / "lock.json"
    gossamer.prepare(model, tokens=[1], lock=path)
    found = json.loads(path.read_text())
    found["machine"][field] = "another"
    path.write_text(json.dumps(found))
    seen.clear()
    with caplog.at_level(logging.WARNING, "gossamer"):
        gossamer.prepare(model, tokens=[1], lock=path)
    assert seen, "timed again"
    assert f"{field} another ->" in caplog.text and "another machine or version" in caplog.text


def test_no_write_access_costs_only_the_memory(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file" / "cache"))
    fixed(monkeypatch, {"cpu_bitmask": 0.5})
    with caplog.at_level(logging.WARNING, "gossamer"):
        found = gossamer.prepare(model, tokens=SIZES)
    assert "fix: set GOSSAMER_CACHE" in caplog.text
    assert ways(model["bitmask0"]) == [["cpu_bitmask"]]
    assert found.rows[0].cells[0].speedup == 2.0


def test_threads_are_part_of_the_key() -> None:
    spec, threads = sparse(8, 8).spec(), torch.get_num_threads()
    one = lock.key(spec, torch.device("cpu"), torch.float32)
    torch.set_num_threads(threads + 1)
    try:
        assert lock.key(spec, torch.device("cpu"), torch.float32) != one
    finally:
        torch.set_num_threads(threads)


def test_the_clock_counts_every_runner() -> None:
    found = timing.race({"a": [lambda: None], "b": [lambda: sum(range(20000))]}, torch.device("cpu"), 0.001)
    assert 0 <= found["a"] < found["b"]


@pytest.mark.parametrize(
    ("lead", "few", "many"),
    [(0.97, "vendor", "vendor"), (0.93, "cpu_bitmask", "vendor"), (0.85, "cpu_bitmask", "cpu_bitmask")],
)
def test_panels_must_be_further_ahead(monkeypatch: pytest.MonkeyPatch, lead: float, few: str, many: str) -> None:
    fixed(monkeypatch, {"cpu_bitmask": lead, "cpu_dense": 2.0, "reference": 2.0})
    model = nn.ModuleDict({"a": SparseLinear.from_format(sparse(24, 40))})
    gossamer.prepare(model, tokens=[16, 17])
    route = dispatch.route(model["a"].layout)
    assert [route.way(n)[0].kernel for n in (16, 17)] == [few, many]


def test_more_tokens_than_a_layer_was_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, {"cpu_dense": 0.5})
    layer = SparseLinear.from_format(sparse(24, 40), torch.randn(24))
    gossamer.prepare(nn.ModuleDict({"a": layer}), tokens=[1])
    assert ways(layer) == [["cpu_dense"]]
    for x in (torch.randn(17, 40), torch.randn(2, 20, 40)):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.decode(torch.float32), layer.bias))
