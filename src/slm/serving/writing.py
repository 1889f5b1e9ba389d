"""One answer while it is written: sampling its tokens, its text as far as it is settled, where it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from slm.serving.work import Finished, Piece, TokenChance, Wish

BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no whole character yet."""
LEAST_LOGPROB = -9999.0
"""What is told of a token that cannot be written: JSON has no infinity."""


@final
class Answer:
    """One answer to one request.

    Args:
        index: which of the request's answers.
        wish: how it is to be written; where neither is_streaming nor stops ask for more, the text is decoded
            once, at the end.
        max_tokens: longest answer that fits.
        tokenizer: of the backbone.
        ends: tokens that end an answer.
        kind: ``generation`` or ``frozen``.
    """

    def __init__(
        self, index: int, wish: Wish, max_tokens: int, tokenizer: Any, ends: frozenset[int], kind: str
    ) -> None:
        self.index, self.kind = index, kind
        self._wish, self._max_tokens, self._tokenizer, self._ends = wish, max_tokens, tokenizer, ends
        self._ids: list[int] = []
        self._is_eager = wish.is_streaming or bool(wish.stops)
        self._sum_logprobs = 0.0
        self._chances: list[TokenChance] = []
        self._sent = 0  # characters told
        self._text = ""
        self._settled = 0  # tokens whose text cannot change any more
        self._prefix = 0  # token the text of which stands at the end of `_text` already
        self.reason: str | None = None
        self.generator: torch.Generator | None = None
        if wish.temperature > 0:
            self.generator = torch.Generator()
            if wish.seed is None:
                self.generator.seed()
            else:
                # Another stream of chance for each answer, whoever is computed beside it.
                self.generator.manual_seed((wish.seed * 1_000_003 + index) % (1 << 63))

    @property
    def last_token(self) -> int:
        """What was written last."""
        return self._ids[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens written."""
        return len(self._ids)

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token, (V,) float32 logits given: the likeliest, or one by chance."""
        largest = logits.max()
        if self.generator is None or not math.isfinite(largest):
            return likeliest
        # Below the largest, and in float64, so that no temperature makes a number that is none.
        chances = ((logits - largest).cpu().double() / self._wish.temperature).softmax(-1)
        if self._wish.top_p < 1:
            ranked, order = chances.sort(descending=True, stable=True)
            # The token that crosses top_p is kept.
            ranked[ranked.cumsum(0) - ranked >= self._wish.top_p] = 0.0
            return int(order[torch.multinomial(ranked, 1, generator=self.generator)])
        return int(torch.multinomial(chances, 1, generator=self.generator))

    def add(self, token: int, logits: Tensor, log_total: float) -> Piece | None:
        """Take in a token, and say what more of the text is settled.

        Args:
            token: the next one.
            logits: (V,) float32 it was chosen from.
            log_total: their logarithm of summed exponentials.
        """
        self._ids.append(token)
        self._sum_logprobs += float(logits[token]) - log_total
        if token in self._ends:
            self.reason = "stop"
        elif len(self._ids) >= self._max_tokens:
            self.reason = "length"
        if self._wish.num_logprobs is not None and token not in self._ends:
            self._chances.append(self._chance(token, logits, log_total))
        if self.reason is None and not self._is_eager:
            return None
        return self._settle()

    def finish(self) -> Finished:
        """The end of it."""
        confidence = math.exp(self._sum_logprobs / len(self._ids))
        return Finished(self.index, self.reason or "stop", self.kind, confidence, len(self._ids))

    def _settle(self) -> Piece | None:
        self._read()
        text = self._text
        found = [place for stop in self._wish.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.reason = text[: min(found)], "stop"
        if self.reason is not None:
            text = text.rstrip()
        else:
            text = text[: len(text) - _held_back(text, self._wish.stops)].rstrip().rstrip(BROKEN).rstrip()
        new = text[self._sent :]
        if not new and not (self.reason and self._chances):
            return None
        self._sent = max(self._sent, len(text))
        chances, self._chances = tuple(self._chances), []
        return Piece(self.index, new, chances)

    def _read(self) -> None:
        """Bring the text up to date; only the last tokens are decoded anew."""
        ids = self._ids[:-1] if self._ids and self._ids[-1] in self._ends else self._ids
        before = self._decode(ids[self._prefix : self._settled])
        after = self._decode(ids[self._prefix :])
        if after.endswith(BROKEN) and self.reason is None:
            return
        new = after[len(before) :]
        # As the library, which strips what it decodes.
        self._text = self._text + new if self._text else new.lstrip()
        self._prefix, self._settled = self._settled, len(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""

    def _chance(self, token: int, logits: Tensor, log_total: float) -> TokenChance:
        others: tuple[tuple[str, float], ...] = ()
        if self._wish.num_logprobs:
            values, tokens = logits.topk(self._wish.num_logprobs)
            pairs = zip(tokens.tolist(), values.tolist(), strict=True)
            others = tuple((self._word(t), max(v - log_total, LEAST_LOGPROB)) for t, v in pairs)
        logprob = max(float(logits[token]) - log_total, LEAST_LOGPROB)
        return TokenChance(self._word(token), logprob, others)

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may yet turn out to begin a stop text."""
    most = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), most, -1):
            if text.endswith(stop[:size]):
                most = size
                break
    return most
