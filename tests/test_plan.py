import json

import pytest
import torch

from gossamer import methods
from gossamer.methods import RatioError
from gossamer.plan import LayerPlan, Plan, PlanError, Rule, plan

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def by_name(p):
    return {l.name.removeprefix("model.layers."): l for l in p.layers}


def test_sizes_are_those_of_the_methods(model):
    made = plan(model, "sparsegpt", 0.3)
    assert len(made.layers) == 14
    for l in made.layers:
        assert l.stored_bytes == methods.create("sparsegpt").size([l.shape], 0.3)[0]
        assert l.dense_bytes == 2 * l.shape[0] * l.shape[1]
    assert made.ratio == pytest.approx(0.3, abs=0.01)
    assert made.stored_bytes == sum(l.stored_bytes for l in made.layers)


def test_a_shared_dictionary_counts_for_the_first_of_its_group(model):
    layers = by_name(plan(model, "cospadi", 0.3))
    group = [layers[f"0.self_attn.{n}_proj"] for n in "qkv"]
    sizes = methods.create("cospadi").size([l.shape for l in group], 0.3)
    assert [l.stored_bytes for l in group] == sizes and sizes[1] == sizes[2] < sizes[0]
    # A layer that is treated otherwise leaves the group; the other two share among themselves.
    layers = by_name(plan(model, "cospadi", 0.3, [Rule("*.0.*.k_proj", ratio=0.4)]))
    sizes = methods.create("cospadi").size([(64, 64), (32, 64)], 0.3)
    assert [layers[f"0.self_attn.{n}_proj"].stored_bytes for n in "qv"] == sizes


def test_jobs_are_fitted_together_only_when_alike(model):
    made = plan(model, "svd", 0.3, [Rule("*.1.*.up_proj", "dense"), Rule("*.0.*.k_proj", knobs={"dtype": "float32"})])
    names = [[l.name.rpartition(".")[2][0] for l in job] for job in made.jobs()]
    assert names == [["q", "v"], ["k"], ["o"], ["g", "u"], ["d"], ["q", "k", "v"], ["o"], ["g"], ["d"]]


def test_later_rules_win_and_knobs_follow_the_method(model):
    rules = [
        Rule("*.mlp.*", "cospadi", 0.4, {"rho": 2.0}),
        Rule("*.down_proj", ratio=0.2, knobs={"iterations": 3}),
        Rule("*.1.mlp.up_proj", "magnitude"),
        Rule("*.0.self_attn.o_proj", "dense"),
    ]
    layers = by_name(plan(model, "sparsegpt", 0.3, rules, damp=0.02))
    assert layers["0.self_attn.q_proj"].knobs == {"damp": 0.02}
    down, up = layers["0.mlp.down_proj"], layers["1.mlp.up_proj"]
    assert (down.method, down.ratio, down.knobs) == ("cospadi", 0.2, {"rho": 2.0, "iterations": 3})
    assert (up.method, up.ratio, up.knobs) == ("magnitude", 0.4, {})
    dense = layers["0.self_attn.o_proj"]
    assert (dense.method, dense.ratio, dense.stored_bytes) == ("dense", 0.0, dense.dense_bytes)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"ratio": 0.0}, RatioError, "ratio 0.0"),
        ({"ratio": 1.0}, RatioError, "ratio 1.0"),
        ({"rules": [Rule("*.up_proj", ratio=1.5)]}, RatioError, r"ratio 1.5 for '\*.up_proj'"),
        ({"method": "svd", "ratio": 0.999}, RatioError, r"^model\.layers\.0\.self_attn\.q_proj: svd: ratio 0.999"),
        ({"method": "wand"}, KeyError, "unknown method 'wand'.*wanda"),
        ({"method": "svd", "rank": 3}, TypeError, "'svd' has no knob rank"),
        ({"rank": 3}, PlanError, "name the method"),
        ({"rules": [Rule("*.qproj", "dense")]}, PlanError, r"'\*\.qproj' matches no layer"),
    ],
)
def test_errors_come_before_any_work(model, arguments, error, match):
    with pytest.raises(error, match=match):
        plan(model, **arguments)


def test_auto_is_sized_now_and_resolved_later(model):
    made = plan(model, rules=[Rule("*.down_proj", "svd")])
    assert made.automatic and made.ratio == pytest.approx(0.3, abs=0.02)
    chosen = made.resolve("cospadi")
    assert not chosen.automatic
    expected = plan(model, "cospadi", 0.3, [Rule("*.down_proj", "svd")])
    assert chosen == expected


def test_json_round_trip(model, tmp_path):
    made = plan(model, "cospadi", 0.3, [Rule("*.up_proj", "dense")], rho=2.0)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    data = json.loads((tmp_path / "plan.json").read_text())
    with pytest.raises(PlanError, match="version 99 is newer"):
        Plan.from_json(data | {"gossamer_plan": 99})
    with pytest.raises(PlanError, match="no Gossamer plan"):
        Plan.from_json({})
    del data["layers"][0]["ratio"]
    with pytest.raises(PlanError, match="damaged plan"):
        Plan.from_json(data)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_a_folder_gives_the_plan_of_its_model(tmp_path, model):
    live = transformers.AutoModelForCausalLM.from_config(model.config).to(torch.bfloat16)
    live.save_pretrained(tmp_path)
    ours, theirs = plan(tmp_path, "svd", 0.3), plan(live, "svd", 0.3)
    assert ours.layers == theirs.layers
    assert ours.meta == theirs.meta | {"model": str(tmp_path)}


def test_rows_merge_blocks(model):
    rows = plan(model, "svd", 0.3, [Rule("*.1.*.up_proj", "dense")]).rows()
    row = next(r for r in rows if r["layer"] == "model.layers.*.self_attn.q_proj")
    assert (row["count"], row["shape"], row["dense_bytes"]) == (2, (64, 64), 2 * 2 * 64 * 64)
    assert sorted(r["method"] for r in rows if r["layer"].endswith("up_proj")) == ["dense", "svd"]


def test_peak_memory_and_time_grow_with_the_model(model):
    made = plan(model, "svd", 0.3)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size + 8 * 96**2 < made.peak_memory(tokens=128) < made.peak_memory(tokens=4096)
    assert plan(model, "magnitude", 0.3).peak_memory(1) < made.peak_memory(1)
    assert 0 < made.seconds(1000, rate=1e9) < made.seconds(9000, rate=1e9)
    slow = plan(model, "cospadi", 0.3, rules=[Rule("*.0.*", method="dense")])
    assert made.seconds(1000, rate=1e9) < slow.seconds(1000, rate=1e9)


def test_check_refuses_another_model(model):
    made = plan(model, "svd", 0.3)
    made.check(model)
    l = made.layers[0]
    other = LayerPlan(l.name, (1, 2), l.group, l.method, l.ratio, l.knobs, 4, 4)
    with pytest.raises(PlanError, match="q_proj is not a dense linear layer of shape"):
        Plan((other,), {}).check(model)
    lost = LayerPlan("model.layers.9.x", (1, 2), "", l.method, l.ratio, l.knobs, 4, 4)
    with pytest.raises(PlanError, match=r"model\.layers\.9\.x is in the plan, not in the model"):
        Plan((lost,), {}).check(model)


def test_an_edited_plan_is_checked_and_sized_again(model):
    data = plan(model, "svd", 0.3).to_json()
    data["layers"][0]["ratio"] = 0.5
    assert Plan.from_json(data).layers[0].stored_bytes < data["layers"][0]["stored_bytes"]
    for change, error, match in (
        ({"ratio": 0.999}, RatioError, "out of reach"),
        ({"ratio": 1.5}, RatioError, "not between 0 and 1"),
        ({"method": "prune"}, KeyError, "unknown method 'prune'"),
        ({"knobs": {"wibble": 1}}, TypeError, "no knob wibble"),
    ):
        edited = json.loads(json.dumps(data))
        edited["layers"][0] |= change
        with pytest.raises(error, match=match):
            Plan.from_json(edited)
    with pytest.raises(PlanError, match="no Gossamer plan"):
        Plan.from_json([])
