"""Unlabelled text as training inputs for encoders: spans of many lengths, cut anywhere, without padding."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

LENGTHS = {8: 6, 12: 8, 16: 10, 24: 10, 32: 10, 48: 10, 64: 10, 96: 10, 128: 10, 192: 8, 256: 8}  # tokens: weight
SHORT = 16  # spans up to here begin at any word, as queries and titles do; longer ones where a sentence begins
NOISE = 0.2  # of the tokens of a noisy span are others
CHUNK = 1000  # texts per call of the tokenizer


class Spans:
    """`spans(step)`: {"input_ids": [batch, length]}, one length per step, about `tokens` tokens in all.

    `streams`: 1-D token ids of one or several sources, mixed by `shares`. `first` and `last` frame an input ([CLS] and
    [SEP]). `inner` [vocabulary]: which tokens continue a word; `stops`: which end a sentence. `noise`: share of the
    spans in which a fifth of the tokens are replaced, by any that the streams have, all alike: a teacher knows what
    rare words mean that texts hardly have. What a step gives depends on its number and `seed` alone. ValueError for
    streams that are shorter than the longest span.
    """

    def __init__(
        self,
        streams: Sequence[Tensor],
        first: int,
        last: int,
        inner: Tensor,
        stops: Sequence[int],
        tokens: int = 16_384,
        shares: Sequence[float] | None = None,
        lengths: Mapping[int, int] = LENGTHS,
        device: torch.device | str = "cpu",
        seed: int = 0,
        noise: float = 0.0,
    ) -> None:
        self.first, self.last, self.tokens, self.device, self.seed = first, last, tokens, torch.device(device), seed
        self.noise = noise
        self.lengths = dict(lengths)
        if (least := min(len(s) for s in streams)) < max(lengths):
            raise ValueError(f"a text has {least} tokens, spans have up to {max(lengths)}; fix: give more text")
        total = sum(shares or [len(s) for s in streams])
        self.shares = [s / total for s in shares or [len(s) for s in streams]]
        self._ids = [s.to(self.device, torch.int32) for s in streams]
        self._known = torch.unique(torch.cat(self._ids)).long()
        self._starts: dict[tuple[int, int], Tensor] = {}  # of spans of a length in a stream
        for i, stream in enumerate(streams):
            words = _where(~inner[stream.long()]).to(self.device)
            sentences = _where(torch.isin(stream.long(), torch.tensor([*stops])).roll(1)).to(self.device)
            for length in lengths:
                fits = words if length <= SHORT else sentences
                fits = fits[fits <= len(stream) - (length - 2)]
                self._starts[i, length] = fits if len(fits) else words[:1]

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: Any, longest: int = 256, tokens: int = 16_384, **more: Any) -> Self:
        """One stream of texts; `longest`: tokens that the model reads at most. ValueError if the tokenizer has no
        tokens that frame an input.
        """
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        if first is None or last is None:
            raise ValueError(f"{type(tokenizer).__name__} has no [CLS] and [SEP]; fix: use an encoder's tokenizer")
        lengths = {n: weight for n, weight in LENGTHS.items() if n <= longest} or {longest: 1}
        stream = torch.tensor(list(_ids(texts, tokenizer)), dtype=torch.int32)
        stops = [i for i in tokenizer.convert_tokens_to_ids([".", "!", "?"]) if i not in (None, tokenizer.unk_token_id)]
        return cls([stream], first, last, inner(tokenizer), stops, tokens, lengths=lengths, **more)

    def __call__(self, step: int) -> dict[str, Tensor]:
        chance = random.Random(f"{self.seed}.{step}")
        length = chance.choices(list(self.lengths), list(self.lengths.values()))[0]
        generator = torch.Generator(self.device).manual_seed(chance.getrandbits(40))
        count = max(2, self.tokens // length)
        parts = [self.cut(i, max(1, round(count * s)), length, generator) for i, s in enumerate(self.shares)]
        return {"input_ids": torch.cat(parts)}

    def cut(self, source: int, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`count` spans of one stream, int64 [count, length]."""
        ids, starts = self._ids[source], self._starts[source, length]
        picked = starts[torch.randint(len(starts), (count,), generator=generator, device=self.device)]
        body = ids[picked[:, None] + torch.arange(length - 2, device=self.device)].long()
        if self.noise:
            chance = torch.rand(count, length - 1, generator=generator, device=self.device)
            others = torch.randint(len(self._known), body.shape, generator=generator, device=self.device)
            replaced = (chance[:, :1] < self.noise) & (chance[:, 1:] < NOISE)
            body = torch.where(replaced, self._known[others], body)
        return torch.cat([body.new_full((count, 1), self.first), body, body.new_full((count, 1), self.last)], 1)


def inner(tokenizer: Any) -> Tensor:
    """Bool [vocabulary]: the tokens that continue a word, in WordPiece (##) and byte-level BPE (no leading space)."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if any(name.startswith("##") for name in names):
        return torch.tensor([name.startswith("##") for name in names])
    return torch.tensor([not name.startswith(("Ġ", "▁")) for name in names])


def _where(mask: Tensor) -> Tensor:
    """Indices that are set; the first if none is."""
    found = mask.nonzero().flatten()
    return found if len(found) else torch.zeros(1, dtype=torch.int64)


def _ids(texts: Iterable[str], tokenizer: Any) -> Iterable[int]:
    texts = list(texts)
    for start in range(0, len(texts), CHUNK):
        for ids in tokenizer(texts[start : start + CHUNK], add_special_tokens=False, verbose=False)["input_ids"]:
            yield from ids
