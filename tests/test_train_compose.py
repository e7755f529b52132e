"""2:4 layers under compilation, recomputation, autocast, the Trainer of transformers and Lightning's hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gossamer import patterns
from gossamer.train import FST, SSTE, STE, Dense, Fp8Products, Products, Sparse24Linear, sparsify
from gossamer.train.lightning import Lightning24

METHODS = [STE(), FST(mvue=False, dense_tail=0), SSTE(), SSTE(beta="dynamic"), SSTE(fp8=True)]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))})["mlp"]


def run(f, net, x):
    net.zero_grad()
    y = f(x)
    y.square().mean().backward()
    return y.detach(), [p.grad.clone() for p in net.parameters()]


def close(a, b):
    torch.testing.assert_close(a[0], b[0])
    for one, other in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(one, other)


@every_method
def test_compiles_as_one_graph_and_follows_new_state_without_another(method):
    net, x = model(), torch.randn(8, 16)
    sparse = sparsify(net, method, filter="*")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=count)
    close(run(compiled, net, x), run(net, net, x))
    for layer in sparse.layers:
        with torch.no_grad():
            layer.weight.normal_()
        layer.renew()
    close(run(compiled, net, x), run(net, net, x))
    assert len(graphs) == 1


class Block(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.mlp = model(seed)

    def forward(self, x):
        return x + self.mlp(x)


def test_blocks_compiled_one_by_one_share_their_graph():
    net, x, graphs = nn.Sequential(*map(Block, range(3))), torch.randn(8, 16, requires_grad=True), []
    sparsify(net, FST(dense_tail=0))
    expected = net(x)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for block in net:
        block.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(net(x), expected)
    assert len(graphs) == 1


def test_compiles_with_gradients_of_its_own_through_aot():
    """MVUE has a backward of ours and randomness in it."""
    net, x = model(), torch.randn(8, 16)
    sparsify(net, FST(dense_tail=0), filter="*")
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y, grads = run(compiled, net, x)
    expected, exact = run(net, net, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads[3], exact[3])  # the last bias is not sampled
    assert grads[0].isfinite().all() and not torch.equal(grads[0], exact[0])


def test_a_change_of_phase_compiles_once_more():
    net, x = model(), torch.randn(8, 16)
    sparse = sparsify(net, SSTE(dense_tail=0.5), steps=2, filter="*")
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    first = compiled(x)
    sparse.after_step()
    assert sparse.phase == "dense"
    torch.testing.assert_close(compiled(x), net(x))
    assert not torch.allclose(compiled(x), first)


@every_method
def test_activation_checkpointing_changes_nothing(method):
    net, x = model(), torch.randn(8, 16, requires_grad=True)
    sparsify(net, method, filter="*")
    close(run(lambda x: checkpoint(net, x, use_reentrant=False), net, x), run(net, net, x))


@pytest.mark.parametrize("method", [*METHODS, FST(dense_tail=0)], ids=repr)
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(method):
    net, x = model(), torch.randn(8, 16)
    sparsify(net, method, filter="*")
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x), rtol=0.1, atol=0.05)
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_train_and_end_2_of_4(kind):
    net = model().to(kind)
    sparse = sparsify(net, SSTE(), filter="*")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparse.attach(optimizer)
    net(torch.randn(4, 16, dtype=kind)).square().mean().backward()
    optimizer.step()
    sparse.finalize()
    assert net[0].weight.dtype == kind and patterns.is_24(net[0].weight)


def test_to_another_dtype_or_a_copy_takes_the_state_along():
    net = model()
    sparsify(net, FST(dense_tail=0), filter="*")
    copied = copy.deepcopy(net).double()
    assert isinstance(copied[0], Sparse24Linear)
    torch.testing.assert_close(copied[0].projected(), net[0].projected().double())
    x = torch.randn(3, 16)
    torch.testing.assert_close(copied(x.double()), net(x).double())


def test_gradients_accumulate_over_micro_batches():
    data = torch.randn(8, 16)
    nets = [model(), model()]
    for net in nets:
        sparsify(net, SSTE(), filter="*")
    nets[0](data).square().mean().backward()
    for half in data.split(4):
        (nets[1](half).square().mean() / 2).backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_kernels_may_be_custom_ops_under_compilation():
    """What a GPU kernel will be: an op with a fake, called from products of its own."""

    @torch.library.custom_op("gossamer_test::product24", mutates_args=())
    def product24(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w.mT

    product24.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[0]))

    class Kernel(Products):
        def forward(self, x, w):
            return product24(x, w)

    nets = [model(), model()]
    sparsify(nets[0], SSTE(), filter="*")
    sparsify(nets[1], SSTE(), filter="*", products=Kernel())
    x = torch.randn(8, 16)
    torch._dynamo.reset()
    compiled = torch.compile(nets[1], fullgraph=True, backend="aot_eager")
    close(run(compiled, nets[1], x), run(nets[0], nets[0], x))
    assert Kernel() != Products() and Fp8Products() != Products()


@pytest.fixture(scope="module")
def causal_lm():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )

    def build():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    return build


def hf_trainer(build, method, out, steps=6, planned=6, dense_flips=None, callback=True):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gossamer.train import Sparse24Callback

    net = build()
    sparse = sparsify(net, method, steps=planned, every=2)
    seen: list[dict] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs or {}))

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 64, (32, 8), generator=generator)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(net, arguments, train_dataset=data, callbacks=[Reporter()])  # type: ignore[arg-type]
    if callback:
        Sparse24Callback(sparse, dense_flips).install(trainer)
    return trainer, sparse, seen


@pytest.mark.parametrize("method", [SSTE(), FST(refresh=2, decay=0.01)], ids=lambda m: m.name)
def test_the_trainer_of_transformers_trains_logs_and_resumes_to_the_bit(causal_lm, method, tmp_path):
    trainer, sparse, seen = hf_trainer(causal_lm, method, tmp_path, dense_flips={4: 0.01})
    trainer.train()
    assert sparse.step == 6
    logs = [entry for entry in trainer.state.log_history if "flip_rate" in entry]
    assert [entry["step"] for entry in logs][:3] == [2, 4, 6]
    assert [entry.get("flip_rate") for entry in seen[:3]] == [entry["flip_rate"] for entry in logs[:3]]
    assert "mu" in logs[1] and "mu" not in logs[0] and 0 <= logs[1]["three_zeros"] < 1

    resumed, again, _ = hf_trainer(causal_lm, method, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.step == 6
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    keep = "dense" if method.dense_tail else "sparse"
    again.finalize(keep=keep)
    resumed.model.save_pretrained(tmp_path / "final")
    loaded = type(resumed.model).from_pretrained(tmp_path / "final")
    mlp = loaded.model.layers[0].mlp
    assert type(mlp.up_proj) is nn.Linear and patterns.is_24(mlp.up_proj.weight) == (keep == "sparse")


def test_the_callback_refuses_other_steps_and_checkpoints_without_state(causal_lm, tmp_path):
    trainer, _, _ = hf_trainer(causal_lm, FST(), tmp_path, planned=60)
    with pytest.raises(ValueError, match=r"planned for 60 steps, the trainer takes 6; fix: .*steps=6"):
        trainer.train()
    hf_trainer(causal_lm, SSTE(), tmp_path, callback=False)[0].train()
    trainer, _, _ = hf_trainer(causal_lm, SSTE(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gossamer_24.pt is missing.*fix: resume from a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class LightningModule(nn.Module):
    """The hooks of Lightning's own that the mixin overrides, called in the order in which Lightning calls them."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_dict(self, values):
        self.logged.append(values)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)

    def on_save_checkpoint(self, checkpoint): ...

    def on_load_checkpoint(self, checkpoint): ...

    def on_train_start(self): ...


class Lit(Lightning24, LightningModule):
    def __init__(self, method, seed=0):
        super().__init__()
        self.mlp = model(seed)
        self.sparsifier = sparsify(self, method, steps=6, every=2)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def take(self, steps):
        for i, x in steps:
            # Lightning runs the backward pass and the clipping in the closure.
            def closure(x=x):
                self.optimizer.zero_grad()
                loss = (self.mlp(x) - x).square().mean()
                loss.backward()
                self.configure_gradient_clipping(self.optimizer, gradient_clip_val=1.0)
                return loss

            self.optimizer_step(0, i, self.optimizer, closure)


def test_the_mixin_steps_in_lightnings_order_and_resumes_after_the_weights():
    data = list(enumerate(torch.randn(6, 8, 16)))
    method = FST(refresh=2, decay=0.1, mvue=False)
    lit = Lit(method)
    lit.take(data[:3])
    saved: dict = {
        "state_dict": copy.deepcopy(lit.state_dict()),
        "optimizer": copy.deepcopy(lit.optimizer.state_dict()),
    }
    lit.on_save_checkpoint(saved)
    lit.take(data[3:])
    assert lit.sparsifier.step == 6 and len(lit.logged) == 3 and {"flip_rate", "three_zeros"} == lit.logged[0].keys()

    again = Lit(method, seed=4)
    again.on_load_checkpoint(saved)
    again.load_state_dict(saved["state_dict"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.on_train_start()
    again.take(data[3:])
    assert all(torch.equal(a, b) for a, b in zip(lit.parameters(), again.parameters(), strict=True))
    assert again.sparsifier.metrics() == lit.sparsifier.metrics()
    with pytest.raises(KeyError, match="no state of 2:4 training; fix"):
        again.on_load_checkpoint({})


def test_dense_is_a_method_that_only_measures():
    nets = [model(), model()]
    sparse = sparsify(nets[1], Dense(), filter="*", every=1)
    x = torch.randn(4, 16)
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        if net is nets[1]:
            sparse.attach(optimizer)
        net(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert sparse.metrics()["flip_rate"] > 0
