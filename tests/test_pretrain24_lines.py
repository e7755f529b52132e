"""The lines of benchmarks/bench_pretrain24.py from outcomes made up for it."""

import runpy
from pathlib import Path

import pytest
from torch import nn

from gossamer.train import FST, SSTE, sparsify

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LINES = runpy.run_path(str(BENCHMARKS / "pretrain24_lines.py"))
ABOUT = {"machine": "M", "commit": "c", "date": "d"}


def outcome(method, seed, loss, flip, tokens=1300, **more):
    curve = [{"step": step, "flip_rate": 0.5 if step < 100 else flip} for step in range(10, 110, 10)]
    shared = {"model": "m", "steps": 100, "batch": 2, "warmup": 20, "tokens": tokens, "parameters": 100}
    found = {"finished_loss": loss, "train_bytes": 650, "valid_bytes": 9, "train_seconds": 9.0, "decay": None}
    return {"method": method, "seed": seed, "curve": curve, "environment": ABOUT} | shared | found | more


def runs(seeds, **more):
    dense = [outcome("dense", s, 1.0, 0.1, one_shot_loss=1.25, **more) for s in range(seeds)]
    ours = [outcome("s_ste", s, 1.0 + 0.01 * (s + 1), 0.2, **more) for s in range(seeds)]
    return dense + ours


def test_summaries_are_means_over_the_seeds_held_to_the_bars():
    found = {(x["summary"], x["case"]["method"]): x for x in LINES["summaries"](runs(3))}
    gap = found["val_loss_gap", "s_ste"]
    assert gap["value"] == pytest.approx(0.02) and gap["range"] == pytest.approx([0.01, 0.03]) and gap["n"] == 3
    assert (gap["must"], gap["sense"]) == (0.03, "<=")
    assert gap["case"] == {"method": "s_ste", "model": "m", "variant": "deployable"}
    assert found["late_flip_rate_vs_dense", "s_ste"]["value"] == pytest.approx(2)
    gain = found["gain_over_one_shot", "s_ste"]
    assert gain["value"] == pytest.approx(0.23) and (gain["must"], gain["sense"]) == (0.05, ">=")
    assert found["val_loss_gap", "dense"]["value"] == 0.25
    assert found["val_loss_gap", "dense"]["case"]["variant"] == "one_shot"


@pytest.mark.parametrize(("seeds", "tokens"), [(1, 1300), (3, 1299)])
def test_too_few_seeds_or_tokens_are_a_pilot_and_meet_no_bar(seeds, tokens):
    for line in LINES["summaries"](runs(seeds, tokens=tokens)):
        assert line["must"] is None and line["case"]["tokens_a_parameter"] == round(tokens / 100, 2)


def test_a_run_has_a_line_for_each_way_to_evaluate_it():
    dense, ours = runs(1)
    first, second = LINES["measured"](dense, dense)
    assert [line["case"]["variant"] for line in (first, second)] == ["dense_eval", "one_shot"]
    assert second["ratio"] == pytest.approx(0.8) and first["about"]["epochs"] == 2
    (line,) = LINES["measured"](ours, dense)
    assert line["ours"] == 1.01 and line["baseline_value"] == 1.0 and line["about"]["mu"] == pytest.approx(4.2 / 4.1)


def timed(method, *seconds, graphs=True):
    shared = {"model": "m", "batch": 2, "graphs": graphs, "environment": ABOUT}
    return {"method": method, "step_seconds": list(seconds), **shared}


def test_step_times_are_compared_at_their_best_captured_alone():
    found = [timed("dense", 2.0, 3.0), timed("s_ste", 5.0, 4.0), timed("s_ste", 0.1, graphs=False), timed("fst")]
    (line,) = LINES["speeds"](found)
    assert line["case"] == {"method": "s_ste", "model": "m"} and line["n"] == 2
    assert line["value"] == 0.5 and line["range"] == [0.4, 0.75]


def test_sparse_products_are_timed_beside_the_dense_ones_of_their_method():
    found = [timed("dense", 2.0), timed("fst", 4.0) | {"products": "dense"}, timed("fst", 2.5) | {"products": "sparse"}]
    dense, sparse = LINES["speeds"](found)
    assert dense["value"] == 0.5 and sparse["value"] == 0.8
    assert "variant" not in dense["case"] and sparse["case"]["variant"] == "sparse products"
    assert sparse["step_seconds"] == {"dense": 2.0, "fst": 2.5, "fst, dense products": 4.0}


def test_sparse_products_are_held_against_the_same_run_with_dense_ones():
    def run(products, loss, steps=10):
        curve = [{"step": 5, "loss": loss + 0.5}, {"step": 10, "loss": loss}]
        return outcome("fst", 0, loss, 0.1, products=products, step_seconds=[1.0]) | {"steps": steps, "curve": curve}

    (line,) = LINES["same_loss"]([run("dense", 2.0), run("sparse", 2.25), run("dense", 9.0, steps=20)])
    assert line["value"] == 0.25 and line["largest_gap_of_the_curves"] == 0.25
    assert line["losses"] == {"sparse": 2.25, "dense": 2.0}
    with pytest.raises(SystemExit, match="ran with sparse products only; fix"):
        list(LINES["same_loss"]([run("sparse", 2.0)]))


def test_several_gpus_are_held_against_one_of_the_same_steps():
    def scaled(wrap, ranks, speed, loss, steps=8):
        case = {"model": "m", "method": "s_ste", "ranks": ranks, "wrap": wrap, "steps": steps}
        return case | {"tokens_a_second": speed, "loss": loss, "masks": {"same": True}, "environment": ABOUT}

    found = [
        scaled("alone", 1, 1.0, 9.0, steps=4),
        scaled("in two parts", 1, 90.0, 2.01),
        scaled("alone", 1, 100.0, 2.0),
    ]
    lines = list(LINES["scaling"]([*found, scaled("fsdp", 2, 150.0, 1.98)]))
    named = {(line["summary"], line["case"]["wrap"]): line["value"] for line in lines}
    expected = {("loss_difference", "in two parts"): 0.01, ("loss_difference", "fsdp"): 0.02}
    assert named == pytest.approx(expected | {("scaling_efficiency", "fsdp"): 0.75})


def test_runs_of_other_data_or_without_dense_are_refused():
    dense, ours = runs(1)
    with pytest.raises(SystemExit, match="saw other data; fix"):
        LINES["check_equal"](ours | {"steps": 99}, dense)
    with pytest.raises(SystemExit, match="has no dense run; fix"):
        LINES["dense_of"](ours | {"seed": 7}, [dense, ours])


def test_masks_that_differ_or_cut_tiles_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    masks = runpy.run_path(str(BENCHMARKS / "pretrain24_scale.py"))["masks"]
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparse = sparsify(net, FST(dense_tail=0), filter="*")
    assert masks(sparse) == {"same_on_all_ranks": True, "whole_tiles": True}
    mask = sparse.layers[1].state()["mask"]
    mask.copy_(mask.roll(1, 0))
    assert masks(sparse) == {"same_on_all_ranks": True, "whole_tiles": False}
    assert masks(sparsify(nn.Linear(8, 8), SSTE(), filter="*")) == {"same_on_all_ranks": True}
