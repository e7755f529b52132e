"""Spans of text to learn from."""

import pytest
import torch

from gossamer.train.spans import Spans, inner

TEXT = ["The cat sat on a mat.", "Heat flows from hot to cold! Does it?", "Wings lift in a stream of air."] * 12
LENGTHS = {8: 1, 24: 1}


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bert_folder)


def test_inputs_are_framed_and_of_one_length(tokenizer) -> None:
    spans = Spans.of(TEXT, tokenizer, longest=48, tokens=480)
    lengths = set()
    for step in range(40):
        ids = spans(step)["input_ids"]
        assert ids.dtype == torch.int64 and ids.numel() <= 480 + 48
        assert (ids[:, 0] == tokenizer.cls_token_id).all() and (ids[:, -1] == tokenizer.sep_token_id).all()
        assert (ids[:, 1:-1] >= 5).all(), "nothing is padding"
        lengths.add(ids.shape[1])
    assert lengths == {8, 12, 16, 24, 32, 48}


def test_a_step_is_the_same_again_and_others_differ(tokenizer) -> None:
    one, two = (Spans.of(TEXT, tokenizer, longest=48, tokens=480, seed=seed) for seed in (0, 1))
    assert torch.equal(one(7)["input_ids"], Spans.of(TEXT, tokenizer, longest=48, tokens=480)(7)["input_ids"])
    assert not any(torch.equal(one(s)["input_ids"], two(s)["input_ids"]) for s in range(5))


def test_short_spans_begin_at_words_and_long_ones_at_sentences(tokenizer) -> None:
    spans, pieces = Spans.of(TEXT, tokenizer, longest=48, tokens=480), inner(tokenizer)
    sentences = set(tokenizer.convert_tokens_to_ids(["t", "h", "d", "w"]))
    firsts: dict[bool, set[int]] = {True: set(), False: set()}
    for step in range(60):
        ids = spans(step)["input_ids"]
        firsts[ids.shape[1] <= 16] |= set(ids[:, 1].tolist())
    assert not pieces[list(firsts[True])].any() and len(firsts[True]) > 8
    assert firsts[False] == sentences


def test_sources_are_mixed_by_their_shares() -> None:
    streams = [torch.full((100,), 7), torch.full((50,), 9)]
    spans = Spans(streams, 2, 3, torch.zeros(20, dtype=torch.bool), [], 800, [3, 1], LENGTHS)
    ids = spans(0)["input_ids"][:, 1]
    assert float((ids == 7).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_noise_puts_other_words_of_the_text_into_some_spans() -> None:
    streams = [torch.full((400,), 7), torch.tensor([9, 11] * 20)]
    plain, noisy = (
        Spans(streams, 2, 3, torch.zeros(20, dtype=torch.bool), [], 4800, [1, 0], {24: 1}, noise=noise)(0)["input_ids"]
        for noise in (0.0, 0.5)
    )
    assert (plain[:-1, 1:-1] == 7).all()
    body = noisy[:-1, 1:-1]
    changed = (body != 7).float().mean(1)  # a third of what is put in is 7, too
    assert float((changed > 0).float().mean()) == pytest.approx(0.5, abs=0.12)
    assert float(changed[changed > 0].mean()) == pytest.approx(0.2 * 2 / 3, abs=0.05)
    assert set(body.unique().tolist()) == {7, 9, 11} and (noisy[:, 0] == 2).all() and (noisy[:, -1] == 3).all()


def test_too_little_text_and_other_tokenizers_are_refused(tokenizer, tiny_folder) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="a text has 6 tokens, spans have up to 48; fix: give more text"):
        Spans.of(["A."] * 3, tokenizer, longest=48)
    with pytest.raises(ValueError, match=r"no \[CLS\] and \[SEP\]; fix: use an encoder's"):
        Spans.of(TEXT, AutoTokenizer.from_pretrained(tiny_folder))


def test_inner_tokens_of_byte_level_vocabularies() -> None:
    class Bytes:
        names = ("<s>", "Ġcat", "s", "Ġa")

        def __len__(self) -> int:
            return 4

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.names[i] for i in ids]

    assert inner(Bytes()).tolist() == [True, False, True, False]
