"""From a prompt to token ids: one rendering for a whole store, so that it can never give a task away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from jinja2.exceptions import TemplateError
from torch import Tensor

from slm.checked import check_characters
from slm.errors import BackboneError, DataError

Prompt = str | Sequence[Mapping[str, str]]
"""A plain text, or the messages (role, content) of a conversation up to the answer."""


class Turn(Protocol):
    """A message of a conversation as an object, as :class:`slm.tasks.Message` is."""

    @property
    def role(self) -> str:
        """Who speaks."""

    @property
    def content(self) -> str:
        """What is said."""


Question = Prompt | Sequence[Turn]
"""What a model may be asked: a prompt, or a conversation of objects."""

IGNORED = -100
"""The target of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenized row.

    Attributes:
        prompt: token ids of the rendered prompt.
        content: first and last-but-one position that hold the user's own words; the query is their mean.
        target: token ids of the answer, end token included; empty where only a prompt is given.
    """

    prompt: tuple[int, ...]
    content: tuple[int, int]
    target: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded to one length, ready for the backbone.

    Attributes:
        ids: (B, T) int64 token ids.
        mask: (B, T) bool, false on padding.
        content: (B, T) bool, true where the user's own words are.
        positions: (B, T) int64, position of each token in its row.
        targets: (B, T') int64, token ids to predict *at* each position (method section 4), else IGNORED.
            T' is T, but for a sequence-to-sequence backbone the length of the answers, 0 without any.
    """

    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    content: Bool[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    targets: Int[Tensor, "B _"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))

    def alone(self, row: int) -> Batch:
        """The prompt of one row by itself, (1, T) with no padding and no targets."""
        own, kept = slice(row, row + 1), self.mask[row]
        return Batch(
            self.ids[own, kept],
            self.mask[own, kept],
            self.content[own, kept],
            self.positions[own, kept],
            self.targets[own, :0],
        )


class Renderer:
    """Renders and tokenizes prompts for one backbone.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_format: ``plain`` (text, newline, answer), ``chat`` (the tokenizer's template) or ``raw``
            (the text alone with the tokenizer's special tokens, for encoders).
        max_tokens: longest row, answer included; where prompt and answer are apart, longest of either.
        is_apart: the answer is a sequence of its own, as in sequence-to-sequence backbones, and not the
            continuation of the prompt.
        num_embeddings: rows of the backbone's table of tokens; a tokenizer may know more tokens, and pads
            with none of those. None takes the tokenizer's word.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: str,
        max_tokens: int,
        *,
        is_apart: bool = False,
        num_embeddings: int | None = None,
    ) -> None:
        if prompt_format == "chat" and not tokenizer.chat_template:
            raise BackboneError(
                "prompt_format 'chat' needs a tokenizer with a chat template, this one has none: use 'plain'"
            )
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.max_tokens = max_tokens
        self.is_apart = is_apart
        self.pad_id = next(
            int(i)
            for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
            if i is not None and (num_embeddings is None or i < num_embeddings)
        )
        self._frame: tuple[date, list[int], list[int]] | None = None

    def render(self, prompt: Prompt) -> str:
        """The prompt as the exact text the backbone sees (without special tokens the tokenizer adds)."""
        if not isinstance(prompt, str):
            messages = [dict(message) for message in prompt]
            if self.prompt_format != "chat":
                return "\n".join(m["content"].strip() for m in messages) + self._separator
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        if self.prompt_format == "chat":
            return self.render([{"role": "user", "content": prompt}])
        return prompt if self.prompt_format == "raw" else prompt.rstrip() + self._separator

    @property
    def _separator(self) -> str:
        return "" if self.prompt_format == "raw" else "\n"

    def _ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt; a chat template brings its own special tokens."""
        special = self.prompt_format != "chat"
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _common_frame(self) -> tuple[list[int], list[int]]:
        """Tokens around the user's words that every plain prompt of today shares: they tell tasks nothing.

        Some chat templates name the date.
        """
        if self.prompt_format == "raw" and not self.is_apart:
            return [], []
        today = date.today()
        if self._frame is None or self._frame[0] != today:
            self._frame = (today, *self._read_frame())
        return self._frame[1:]

    def _read_frame(self) -> tuple[list[int], list[int]]:
        one, two = self._ids(self.render("one")), self._ids(self.render("Zwei 2"))
        before, after = _num_shared(one, two), _num_shared(one[::-1], two[::-1])
        return one[:before], one[len(one) - after :]

    def _content(self, ids: list[int]) -> tuple[int, int]:
        """The span of a prompt's own words: all but what it really shares with the frame.

        A conversation with a system message of its own has another beginning than the template's default.
        """
        head, tail = self._common_frame()
        before, after = _num_shared(ids, head), _num_shared(ids[::-1], tail[::-1])
        return (before, len(ids) - after) if before + after < len(ids) else (0, len(ids))

    def row(
        self,
        prompt: Prompt,
        target: str | None = None,
        *,
        is_truncating: bool,
        where: str,
        most_tokens: int | None = None,
    ) -> Row:
        """Tokenize one prompt, and its answer when given.

        Args:
            prompt: what is asked.
            target: the answer to learn.
            is_truncating: cut the middle out of an over-long prompt and the end off an over-long answer
                instead of refusing the row.
            where: how to call the row in an error ("row 17").
            most_tokens: of a row that may be cut, where fewer than ``max_tokens`` shall be left of it.

        Raises:
            DataError: the row is empty or longer than the window, neither text nor a conversation, or a
                conversation that the chat template refuses.
        """
        texts = _texts(prompt, where)
        if not any(text.strip() for text in texts):
            raise DataError(f"{where} is empty: give it some text")
        for text in texts:
            check_characters(text, where)
        try:
            ids = self._ids(self.render(prompt))
        except TemplateError as error:
            told = " ".join(str(error).split())[:200]
            raise DataError(
                f"{where} does not fit the backbone's chat template ({told}): correct it"
            ) from error
        answer = [] if target is None else self.answer_ids(target)
        longest = max(len(ids), len(answer)) if self.is_apart else len(ids) + len(answer)
        most = min(self.max_tokens, most_tokens or self.max_tokens) if is_truncating else self.max_tokens
        if longest > most:
            if not is_truncating:
                raise DataError(
                    f"{where} has {longest} tokens, the window holds {self.max_tokens}: "
                    "shorten it, or allow cutting its middle out (--truncate, is_truncating=True)"
                )
            ids, answer = self._cut(ids, answer, most)
        return Row(tuple(ids), self._content(ids), tuple(answer))

    def answer_ids(self, target: str) -> list[int]:
        """Token ids of an answer, end token included.

        An answer that is a sequence of its own gets the special tokens the tokenizer gives a target.
        """
        if self.is_apart:
            ids = list(self.tokenizer(text_target=target, verbose=False)["input_ids"])
        else:
            ids = list(self.tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"])
        eos = int(self.tokenizer.eos_token_id)
        return ids if self.is_apart and ids[-1:] == [eos] else [*ids, eos]

    def _cut(self, ids: list[int], answer: list[int], most: int) -> tuple[list[int], list[int]]:
        """An answer keeps its beginning, and at least half of a shared window; a prompt keeps both ends."""
        if self.is_apart:
            answer, longest = answer[:most], most
        else:
            answer = answer[: most - min(len(ids), most // 2)]
            longest = most - len(answer)
        if len(ids) > longest:
            ids = ids[: longest - longest // 2] + ids[len(ids) - longest // 2 :]
        return ids, answer

    def batch(self, rows: Sequence[Row], side: str) -> Batch:
        """Pad rows to their longest, on the ``left`` (causal) or ``right`` (others) side."""
        sequences = [row.prompt if self.is_apart else row.prompt + row.target for row in rows]
        shape = (len(rows), max(len(tokens) for tokens in sequences))
        ids = torch.full(shape, self.pad_id)
        mask, content = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        positions = torch.zeros(shape, dtype=torch.long)
        num_targets = max(len(row.target) for row in rows) if self.is_apart else shape[1]
        targets = torch.full((len(rows), num_targets), IGNORED)
        for i, (row, tokens) in enumerate(zip(rows, sequences, strict=True)):
            start = shape[1] - len(tokens) if side == "left" else 0
            ids[i, start : start + len(tokens)] = torch.tensor(tokens)
            mask[i, start : start + len(tokens)] = True
            content[i, start + row.content[0] : start + row.content[1]] = True
            positions[i, start : start + len(tokens)] = torch.arange(len(tokens))
            # The last prompt token predicts the first of an answer that continues it.
            first = 0 if self.is_apart else start + len(row.prompt) - 1
            targets[i, first : first + len(row.target)] = torch.tensor(row.target, dtype=torch.long)
        return Batch(ids, mask, content, positions, targets)


def _num_shared(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def _texts(prompt: Prompt, where: str) -> list[str]:
    """The text of a prompt, or those of its messages.

    Raises:
        DataError: it is neither text nor a conversation.
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Mapping):
        raise DataError(f"{where} is one message: put those of a conversation into a list of its own")
    if not isinstance(prompt, Sequence):
        raise DataError(f"{where} is neither text nor a conversation, got {type(prompt).__name__}: give one")
    messages: Sequence[Any] = prompt
    for message in messages:
        is_message = isinstance(message, Mapping)
        if not is_message or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise DataError(f'{where} has a message that is no {{"role": "...", "content": "..."}}: mend it')
    return [message["content"] for message in messages]


def prompts_of(questions: str | Sequence[Question]) -> list[Prompt]:
    """Questions as prompts: one text is one question, and messages that are objects become mappings."""
    return [questions] if isinstance(questions, str) else [_prompt(question) for question in questions]


def _prompt(question: Any) -> Any:
    """One question as a prompt; what is neither text nor a conversation is left for a row to refuse."""
    if isinstance(question, (str, Mapping)):
        return question
    if isinstance(question, Sequence):
        return [_prompt(message) for message in question]
    if hasattr(question, "role") and hasattr(question, "content"):
        return {"role": question.role, "content": question.content}
    return question
