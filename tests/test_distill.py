"""What a sparse encoder learns from its dense self."""

import copy
import math

import pytest
import torch

from gossamer.train.distill import Distiller, embed, fit, hidden_loss, one_cycle
from gossamer.train.gradual import BlockPruner, Cubic, callback


def batch(step: int = 0, count: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(5, 60, (count, length), generator=generator)}


def noisy(bert):
    """A student that is not its teacher."""
    other = copy.deepcopy(bert)
    with torch.no_grad():
        for p in other.encoder.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return other


def test_a_copy_has_nothing_to_learn(bert) -> None:
    losses = Distiller(copy.deepcopy(bert), bert)(**batch())
    assert set(losses) == {"loss", "hidden", "embedding", "similarity"}
    assert all(abs(v.item()) < 1e-5 for v in losses.values())


def test_the_loss_is_the_weighted_sum_of_its_parts(bert) -> None:
    parts = {"hidden": 0.5, "embedding": 2.0, "similarity": 3.0}
    found = Distiller(noisy(bert), bert, **parts)(**batch())
    assert found["loss"].item() == pytest.approx(sum(w * found[n].item() for n, w in parts.items()), rel=1e-5)
    assert all(float(found[n]) > 1e-3 for n in parts)
    assert set(Distiller(noisy(bert), bert, similarity=0)(**batch())) == {"loss", "hidden", "embedding"}


def test_padding_teaches_nothing(bert) -> None:
    distiller, ids = Distiller(noisy(bert), bert), batch()["input_ids"]
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, torch.zeros(8, 5, dtype=torch.long)], 1)
    wide = torch.cat([mask, torch.zeros(8, 5, dtype=torch.long)], 1)
    plain, with_padding = distiller(ids), distiller(padded, wide)
    for name, value in plain.items():
        assert float(with_padding[name]) == pytest.approx(float(value), rel=1e-3)


def test_embeddings_are_those_of_sentence_transformers() -> None:
    hidden, mask = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = embed(hidden, mask)
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 0]])
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(embed(hidden, mask, "cls"), hidden[:, 0] / hidden[:, 0].norm(dim=1, keepdim=True))


def test_hidden_states_are_compared_by_the_teachers_variance() -> None:
    taught, mask = torch.randn(4, 6, 8) * 3 + 5, torch.ones(4, 6, dtype=torch.long)
    mean = taught.mean((0, 1)).expand_as(taught)
    assert float(hidden_loss((mean,), (taught,), mask)) == pytest.approx(1)
    assert float(hidden_loss((taught, mean), (taught, taught), mask)) == pytest.approx(0.5)


def test_only_the_student_is_trained_and_saved(bert) -> None:
    distiller = Distiller(copy.deepcopy(bert), bert)
    assert len(list(distiller.parameters())) == len(list(bert.parameters()))
    assert all(name.startswith("student.") for name in distiller.state_dict())
    distiller(**batch())["loss"].backward()
    assert all(p.grad is None for p in bert.parameters())
    distiller.train()
    assert not distiller.student.training, "no dropout"


def test_a_student_of_another_depth_is_refused(bert) -> None:
    from transformers import BertModel

    config = copy.deepcopy(bert.config)
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="has 1 layers, the teacher 2; fix"):
        Distiller(BertModel(config), bert)
    with pytest.raises(ValueError, match="the same module; fix"):
        Distiller(bert, bert)
    with pytest.raises(ValueError, match="weights of the losses"):
        Distiller(copy.deepcopy(bert), bert, hidden=0, embedding=0, similarity=0)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [one_cycle(s, 100, 0.1) for s in range(100)]
    assert rates[:10] == [pytest.approx((s + 1) / 10) for s in range(10)]
    assert max(rates) == 1 and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert [one_cycle(0, 1), one_cycle(0, 2)] == [1, 1]


def test_learning_brings_a_pruned_model_back(bert) -> None:
    student = copy.deepcopy(bert)
    distiller = Distiller(student, bert)
    pruner = BlockPruner(student, Cubic(0.5, 2, 20, 6))
    seen: list[tuple[int, float]] = []
    fit(distiller, batch, 60, 3e-3, pruner, log=lambda step, losses: seen.append((step, losses["loss"])), log_every=10)
    assert [step for step, _ in seen] == [10, 20, 30, 40, 50, 60]
    assert seen[-1][1] < 0.8 * max(loss for _, loss in seen)
    assert pruner.sparsity() == pytest.approx(0.5, abs=0.02)


def test_compiled_blocks_learn_the_same(bert, monkeypatch) -> None:
    """Inputs are observed in compiled runs, too; the backend leaves the arithmetic to torch, so that it is quick."""
    compiled, graphs = torch.compile, []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=count, **options))
    found = []
    for way in (False, True):
        student, losses = noisy(bert), []
        pruner = BlockPruner(student, Cubic(0.5, 4, 8, 4))
        fit(
            Distiller(student, bert), lambda step: batch(step, length=12 + 4 * (step % 3)), 10, 1e-3, pruner,
            compiled=way, log=lambda _, seen, losses=losses: losses.append(seen["loss"]), log_every=1,
        )  # fmt: skip
        found.append(losses)
        assert pruner.sparsity() == pytest.approx(0.5, abs=0.02)
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert 3 <= len(graphs) <= 5, "teacher, first block, other blocks, loss: not one for each length and block"
    assert all("forward" not in vars(m) for model in (student, bert) for m in model.modules())


class Killed(Exception):
    pass


def test_a_resumed_run_is_the_run_to_the_bit(bert, tmp_path) -> None:
    def run(file, killed_at: int | None = None) -> dict[str, torch.Tensor]:
        student = copy.deepcopy(bert)
        pruner = BlockPruner(student, Cubic(0.5, 2, 12, 4))

        def read(step: int) -> dict[str, torch.Tensor]:
            if step == killed_at:
                raise Killed
            return batch(step)

        fit(Distiller(student, bert), read, 20, 3e-3, pruner, checkpoint=file, every=4)
        return student.state_dict()

    whole = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "c.pt", killed_at=10)
    resumed = run(tmp_path / "c.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    plain = Distiller(copy.deepcopy(bert), bert)
    fit(plain, batch, 4, checkpoint=tmp_path / "c3.pt", every=4)
    with pytest.raises(KeyError, match="holds no masks; fix"):
        fit(plain, batch, 8, pruner=BlockPruner(plain.student, Cubic(0.5, 2, 4)), checkpoint=tmp_path / "c3.pt")


def test_a_loss_that_is_not_finite_stops_the_run(bert) -> None:
    student = copy.deepcopy(bert)
    with torch.no_grad():
        student.encoder.layer[0].output.dense.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; fix: a smaller lr"):
        fit(Distiller(student, bert), batch, 4, log_every=1)


def test_a_frozen_student_is_refused(bert) -> None:
    with pytest.raises(ValueError, match="requires a gradient; fix"):
        fit(Distiller(copy.deepcopy(bert).requires_grad_(False), bert), batch, 2)


def test_autocast_learns_the_same(bert) -> None:
    found = {}
    for dtype in (None, torch.bfloat16):
        distiller = Distiller(noisy(bert), bert)
        fit(distiller, batch, 5, 1e-3, dtype=dtype)
        found[dtype] = float(distiller(**batch(99))["loss"])
    assert found[torch.bfloat16] == pytest.approx(found[None], rel=0.1)


def test_the_trainer_of_transformers_trains_it_and_resumes(bert, tmp_path, capsys) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row} for row in batch(count=32)["input_ids"]]

    def trainer(steps: int):
        student = copy.deepcopy(bert)
        pruner = BlockPruner(student, Cubic(0.5, 2, 6, 2))
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_steps=4,
            logging_steps=4,
            report_to=[],
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        run = Trainer(Distiller(student, bert), arguments, train_dataset=rows, callbacks=[callback(pruner)])
        return run, pruner

    run, pruner = trainer(4)
    run.train()
    assert (tmp_path / "checkpoint-4" / "gossamer_masks.pt").is_file()
    assert f"'sparsity': '{pruner.sparsity():.4g}'" in capsys.readouterr().out
    again, resumed = trainer(8)
    again.train(resume_from_checkpoint=True)
    assert resumed.sparsity() == pytest.approx(0.5, abs=0.02)
    zero_before = {n: m == 0 for n, m in pruner.masks.items()}
    assert all((resumed.masks[n][zero] == 0).all() for n, zero in zero_before.items()), "what was gone stays gone"
