"""Sparse heads: in plain torch, as a sentence-transformers module, in its trainer, on disk."""

import copy
import json
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from gossamer.retrieval.activations import SThresh, TopK
from gossamer.retrieval.controller import FlopsRegularizer, QuadraticRamp
from gossamer.retrieval.fit import fit_head
from gossamer.retrieval.flops import batch_nonzeros, flops
from gossamer.retrieval.head import SparseHead
from gossamer.retrieval.losses import ArcFace, contrastive, listwise_kl, reconstruction, triplet


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small gain nothing from more, and lose much where a core is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HEADS = [("relu", {}), ("sthresh", {"threshold": 0.1}), ("topk", {"k": 4, "start": 9})]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "by", "tree"]
WORDS += ["red", "blue", "old", "new", "big", "small", "is", "was", "in", "out"]
TEXTS = [f"{WORDS[i % 20]} {WORDS[i * 7 % 20]} {WORDS[i * 3 % 20]} {WORDS[i * i % 20]}" for i in range(64)]


@pytest.mark.parametrize(("activation", "options"), HEADS)
def test_codes_are_unit_rows_with_exact_zeros(activation, options):
    head = SparseHead(16, 64, activation, **options).eval()
    codes = head(nn.functional.normalize(torch.randn(50, 16), dim=1))
    assert torch.allclose(codes.norm(dim=1), torch.ones(50), atol=1e-5)
    assert 0 < codes.count_nonzero() < 0.9 * codes.numel()
    assert (codes.min() < 0) == (activation == "sthresh")
    assert (head(codes.new_zeros(2, 16), max_active_dims=3) != 0).sum(1).max() <= 3
    again = SparseHead(**head.config()).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(torch.ones(1, 16)), head(torch.ones(1, 16)))


def test_a_code_of_zeros_has_no_nan():
    head = SparseHead(4, 8, "sthresh")
    head.activation.threshold = 1e3
    codes = head(torch.randn(3, 4))
    codes.sum().backward()
    assert codes.count_nonzero() == 0
    assert head.linear.weight.grad.isfinite().all()


def test_sthresh_is_the_formula_of_the_paper():
    x = torch.linspace(-2, 2, 41)
    assert torch.allclose(SThresh(0.5)(x), (x - 0.5).relu() - (-x - 0.5).relu())


def test_topk_anneals_while_training_only():
    topk, x, sizes = TopK(2, start=8), torch.rand(5, 20) + 0.1, []
    for progress in (0.0, 0.5, 1.0, 3.0):
        topk.anneal(progress)
        sizes.append(int(topk(x).count_nonzero(dim=1).max()))
    assert sizes == [8, 5, 2, 2]
    topk.anneal(0.0)
    assert (topk.eval()(x) == x * (x >= x.topk(2).values[:, 1:])).all()


def test_wrong_activations_are_refused():
    with pytest.raises(ValueError, match="fix: one of relu, sthresh, topk"):
        SparseHead(4, 8, "gelu")
    with pytest.raises(ValueError, match="1 <= k <= start"):
        TopK(8, start=2)
    with pytest.raises(ValueError, match="negative"):
        SThresh(-1.0)


def test_losses_are_zero_where_nothing_is_lost():
    x = nn.functional.normalize(torch.randn(3, 10, 6), dim=-1)
    assert listwise_kl(x, x).item() == pytest.approx(0.0, abs=1e-6)
    assert listwise_kl(x.roll(1, 1), x) > 0.1
    assert reconstruction(3 * x, x).item() == pytest.approx(0.0, abs=1e-6)
    eye = torch.eye(6)
    assert contrastive(eye, eye).item() < 1e-6 < contrastive(eye, eye.roll(1, 0))
    assert triplet(eye, eye, eye.roll(1, 0)) == 0
    assert triplet(eye, eye.roll(1, 0), eye).item() == pytest.approx(1.2)


def test_extra_rows_are_negatives():
    eye = torch.eye(4)
    assert contrastive(eye[:2], torch.cat([eye[:2], eye[:2]])).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_arcface_asks_for_a_margin_at_the_true_class():
    loss, codes, labels = ArcFace(3, 3, scale=8.0, margin=0.5), torch.eye(3), torch.arange(3)
    loss.weight.data = torch.eye(3)
    with_margin = loss(codes, labels)
    own = 8 * torch.cos(torch.tensor(0.5) + torch.acos(torch.tensor(1 - 1e-6)))
    assert with_margin.item() == pytest.approx((own.exp() + 2).log().item() - own.item(), rel=1e-3)
    loss.margin = 0.0
    assert loss(codes, labels) < with_margin


def test_fit_head_keeps_the_similarities_at_the_cost_asked_for():
    centres = torch.randn(30, 24)
    dense = nn.functional.normalize(centres[torch.arange(900) % 30] + 0.6 * torch.randn(900, 24), dim=1)
    head = SparseHead(24, 128, "topk", k=8)
    before, seen = listwise_kl(head.eval()(dense), dense), []
    regularizer = FlopsRegularizer(flops=0.7, steps=150)
    fit_head(head, [dense[:450], dense[450:]], regularizer, 150, 128, 3e-3, notify=lambda step, loss: seen.append(step))
    assert listwise_kl(head(dense), dense) < 0.6 * before
    assert batch_nonzeros(head(dense)) <= 8
    assert seen == list(range(150))
    assert regularizer.progress == 1


def test_fit_head_says_what_does_not_fit():
    with pytest.raises(ValueError, match="fix: the head's"):
        fit_head(SparseHead(8, 16), torch.randn(10, 9), None)
    with pytest.raises(ValueError, match="batch >= 8"):
        fit_head(SparseHead(8, 16), [torch.randn(10, 8)] * 2, None, batch=4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A BERT of width 16 with random weights: a sentence-transformers encoder like any other."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=25, **sizes)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    body = Transformer(str(folder))
    return sentence_transformers.SentenceTransformer(modules=[body, Pooling(16, "mean")], device="cpu")


class Logged(TrainerCallback):
    keys: ClassVar[set] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.keys.update(logs)


def train(model, loss, columns, steps, folder, callbacks=(), **options):
    from datasets import Dataset
    from sentence_transformers.sparse_encoder import SparseEncoderTrainer, SparseEncoderTrainingArguments

    settings = {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 5, "report_to": "none"}
    settings |= {"max_steps": steps, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True} | options
    model.model_card_data.generate_widget_examples = False
    args = SparseEncoderTrainingArguments(str(folder), **settings)
    data = Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), columns, strict=False)))
    trainer = SparseEncoderTrainer(model, args, data, loss=loss, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer.state.log_history


RELOAD = """
import json, sys, torch
from gossamer.retrieval.encoder import load_encoder
model = load_encoder(sys.argv[1], device="cpu")
print(json.dumps(model.encode(["the cat sat"], convert_to_sparse_tensor=False)[0].tolist()))
"""


def test_trained_without_labels_then_read_by_another_process(dense, tmp_path):
    from gossamer.retrieval.encoder import sparse_encoder
    from gossamer.retrieval.trainer import FlopsCallback, SparseLoss

    model = sparse_encoder(dense, dim=64, k=6)
    body = copy.deepcopy(model[0].state_dict())
    loss = SparseLoss(model, FlopsRegularizer(flops=1.0, steps=20))
    logged = Logged()
    logs = train(model, loss, [TEXTS], 20, tmp_path / "run", [FlopsCallback(loss), logged])
    assert {"similarities", "reconstruction", "penalty", "flops", "flops_weight"} <= set(logs[0])
    assert {"flops", "flops_weight"} <= logged.keys
    assert all(torch.equal(v, body[k]) for k, v in model[0].state_dict().items())  # only the head has learnt
    model.save_pretrained(str(tmp_path / "sparse"))
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "- gossamer" in card and "SparseLoss" in card and "SentenceSparseHead" in card
    assert ", trust_remote_code=True)" in card
    again = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "sparse")], capture_output=True, text=True, check=True
    )
    mine = model.encode(["the cat sat"], convert_to_sparse_tensor=False)[0]
    assert torch.allclose(torch.tensor(json.loads(again.stdout)), mine, atol=1e-6)
    assert 0 < mine.count_nonzero() <= 6


def test_portable_needs_no_gossamer(dense, tmp_path):
    from sentence_transformers import SparseEncoder

    from gossamer.retrieval.encoder import portable, sparse_encoder

    for activation, options in (("topk", {"k": 5}), ("relu", {})):
        model = sparse_encoder(dense, 64, activation, **options)
        model[-1].head.linear.bias.data.normal_(std=0.1)
        model[-1].head.offset.data.normal_(std=0.1)
        portable(model).save_pretrained(str(tmp_path / activation))
        assert "gossamer" not in (tmp_path / activation / "modules.json").read_text()
        same = SparseEncoder(str(tmp_path / activation), device="cpu")
        wanted = model.encode(TEXTS[:8], convert_to_sparse_tensor=False)
        assert torch.allclose(same.encode(TEXTS[:8], convert_to_sparse_tensor=False), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="relu or topk"):
        portable(sparse_encoder(dense, 64, "sthresh"))


def test_load_refuses_code_of_others(dense, tmp_path):
    from gossamer.retrieval.encoder import load_encoder, sparse_encoder

    sparse_encoder(dense, dim=32).save_pretrained(str(tmp_path / "a"), create_model_card=False)
    listed = json.loads((tmp_path / "a" / "modules.json").read_text())
    listed[0]["type"] = "evil.Module"
    (tmp_path / "a" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"(?s)evil.Module.*trust_remote_code"):
        load_encoder(tmp_path / "a")


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_encoder_learns_too(dense, tmp_path, tune):
    if tune == "lora":
        pytest.importorskip("peft")
    from gossamer.retrieval.encoder import load_encoder, sparse_encoder
    from gossamer.retrieval.trainer import SparseLoss

    model = sparse_encoder(dense, 64, "relu", tune=tune)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="teacher=dense_encoder"):
        SparseLoss(model, None)
    untouched = copy.deepcopy(dense.state_dict())
    loss = SparseLoss(model, FlopsRegularizer(nonzeros=12.0, steps=6), teacher=copy.deepcopy(dense))
    train(model, loss, [TEXTS, TEXTS[::-1]], 6, tmp_path)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("head." in k for k in changed)
    assert all("lora_" in k or "head." in k for k in changed) == (tune == "lora")
    assert any("lora_" in k or "attention" in k for k in changed)
    assert all(torch.equal(v, untouched[k]) for k, v in dense.state_dict().items())
    model.save_pretrained(str(tmp_path / "saved"))
    again = load_encoder(tmp_path / "saved", device="cpu")
    wanted = model.encode(TEXTS[:4], convert_to_sparse_tensor=False)
    assert torch.allclose(again.encode(TEXTS[:4], convert_to_sparse_tensor=False), wanted, atol=1e-5)


@pytest.mark.parametrize("keep", ["pairs", "triplets"])
def test_pairs_and_triplets(dense, tmp_path, keep):
    from gossamer.retrieval.encoder import sparse_encoder
    from gossamer.retrieval.trainer import SparseLoss

    model = sparse_encoder(dense, dim=64, k=6, tune="full")
    schedule = QuadraticRamp(1.0, 10)
    loss = SparseLoss(model, FlopsRegularizer(schedule=schedule), keep=keep, two_encoders=True)
    columns = [TEXTS, [t.split(" ", 1)[1] for t in TEXTS], TEXTS[7:] + TEXTS[:7]]
    logs = train(model, loss, columns[: 2 if keep == "pairs" else 3], 10, tmp_path)
    assert logs[1][keep] < logs[0][keep]
    assert schedule.step == 10


def test_the_regularizer_serves_splade_loss(dense, tmp_path):
    from sentence_transformers.sparse_encoder import losses

    from gossamer.retrieval.encoder import sparse_encoder

    model, regularizer = sparse_encoder(dense, dim=64, activation="sthresh"), FlopsRegularizer(flops=1.0, steps=10)
    ranking = losses.SparseMultipleNegativesRankingLoss(model)
    loss = losses.SpladeLoss(model, ranking, 1.0, document_regularizer=regularizer, use_document_regularizer_only=True)
    logs = train(model, loss, [TEXTS, TEXTS], 4, tmp_path)
    assert regularizer.schedule.step == 4
    assert logs[-1]["train_loss"] > 0


def test_a_resumed_run_keeps_its_controller(dense, tmp_path):
    from gossamer.retrieval.encoder import sparse_encoder
    from gossamer.retrieval.trainer import FlopsCallback, SparseLoss

    steps = []
    for resume in (None, True):
        model = sparse_encoder(dense, dim=32, k=4)
        loss = SparseLoss(model, FlopsRegularizer(flops=0.6, steps=8))
        options = {"save_strategy": "steps", "save_steps": 4, "resume_from_checkpoint": resume}
        train(model, loss, [TEXTS], 8 if resume else 4, tmp_path, [FlopsCallback(loss)], **options)
        steps.append(loss.regularizer.schedule.step)
    assert steps == [4, 8]


def test_codes_cost_what_flops_says(dense):
    from gossamer.retrieval.encoder import sparse_encoder

    codes = sparse_encoder(dense, dim=64, k=6).encode(TEXTS)  # a torch COO tensor, as the library gives it
    assert flops(codes) == pytest.approx(flops(codes.to_dense()))
