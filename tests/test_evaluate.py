"""Perplexity against a direct computation, its errors, and decoding speed."""

import math

import pytest
import torch
from torch import nn

from gossamer import evaluate

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def _direct(model, ids, window, windows):
    with torch.inference_mode():
        pieces = ids[: window * windows].view(windows, window)
        logits = model(pieces).logits[:, :-1].double()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten()))


@pytest.mark.parametrize(("window", "windows"), [(2, 1), (130, 3), (257, 2), (300, None)])
def test_perplexity_is_the_mean_over_windows(model, window, windows):
    ids = torch.randint(0, 96, (1000,), generator=torch.Generator().manual_seed(1))
    found = evaluate.perplexity(model, ids, window=window, windows=windows)
    count = windows or 1000 // window
    assert found.tokens == count * (window - 1)
    assert found.nll == pytest.approx(_direct(model, ids, window, count), abs=1e-5)
    assert found.value == math.exp(found.nll)


def test_perplexity_takes_a_list_and_reports_progress(model):
    seen = []
    found = evaluate.perplexity(model, list(range(64)), window=16, progress=lambda *a: seen.append(a))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.tokens == 60


def test_perplexity_leaves_the_mode_of_the_model_alone(model):
    model.train()
    evaluate.perplexity(model, list(range(32)), window=16)
    assert model.training
    model.eval()


@pytest.mark.parametrize("windows", [None, 3])
def test_a_short_text_names_both_counts(model, windows):
    with pytest.raises(ValueError, match=r"has 10 tokens, (1,024|3,072) are needed.*fix"):
        evaluate.perplexity(model, list(range(10)), windows=windows)


@pytest.mark.parametrize(("window", "windows"), [(1, None), (16, 0)])
def test_senseless_windows_are_refused(model, window, windows):
    with pytest.raises(ValueError, match="fix"):
        evaluate.perplexity(model, list(range(64)), window=window, windows=windows)


def test_nan_logits_name_the_window(model):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, **kwargs):
            self.calls += 1
            out = self.inner(**kwargs)
            out.logits = out.logits * (math.nan if self.calls == 2 else 1)
            return out

    with pytest.raises(ValueError, match=r"window 2 of 4: the model's logits are NaN.*fix"):
        evaluate.perplexity(Broken(), list(range(64)), window=16)


def test_another_tokenizer_is_noticed(model):
    with pytest.raises(ValueError, match=r"token id 96 .* vocabulary of 96; fix"):
        evaluate.perplexity(model, [96] * 64, window=16)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty; fix"):
        evaluate.encode_text(None, " \n")


def test_encode_text_adds_no_special_tokens():
    class Tokenizer:
        def __call__(self, text, add_special_tokens, verbose):
            assert not add_special_tokens
            return {"input_ids": [len(w) for w in text.split()]}

    assert evaluate.encode_text(Tokenizer(), "a bb ccc").tolist() == [1, 2, 3]


def test_tokens_per_second_decodes_greedily_with_a_cache(model):
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    speed = evaluate.tokens_per_second(model, list(range(8)), new_tokens=4, repeats=2)
    hook.remove()
    assert lengths == 3 * [8, 1, 1, 1, 1]
    assert speed.tokens_per_second > 0
    assert speed.spread >= 0


def test_a_model_that_predicts_no_tokens(bert):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=61, **sizes))
    for found in (bert, classifier):
        with pytest.raises(ValueError, match="predicts no tokens; fix: .* --target cpu"):
            evaluate.perplexity(found, torch.arange(32), window=16)
        with pytest.raises(ValueError, match="predicts no tokens; fix"):
            evaluate.tokens_per_second(found, list(range(8)), new_tokens=1, repeats=1)


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"repeats": 0}])
def test_no_tokens_and_no_runs_have_no_speed(model, wrong):
    with pytest.raises(ValueError, match="fix: at least 1 of each"):
        evaluate.tokens_per_second(model, list(range(8)), **wrong)


def test_windows_longer_than_the_model_reads():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="reads at most 16; fix: a window of 16 or less"):
        evaluate.perplexity(transformers.GPT2LMHeadModel(config), torch.zeros(64, dtype=torch.long), window=32)
