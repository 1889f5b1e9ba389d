"""What passes between the routes and an engine: a request as an engine sees it, and what it tells of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from slm.serving.refusals import Refused

AUTO = "auto"
"""The model that is routed: every request gets the knowledge it needs."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How an answer is to be written.

    Attributes:
        max_tokens: longest answer; None is the server's default, as far as the window reaches.
        temperature: divides the logits before a token is sampled; 0 takes the likeliest.
        top_p: samples only from the likeliest tokens that together reach this probability.
        seed: of the samples; None is another one each time.
        num_answers: answers to the same prompt.
        stops: texts that end an answer and are not part of it.
        num_logprobs: alternatives to tell of every token; None tells nothing, 0 only the token itself.
        is_streaming: text is wanted as it comes.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_answers: int = 1
    stops: tuple[str, ...] = ()
    num_logprobs: int | None = None
    is_streaming: bool = False


@dataclass(frozen=True, slots=True)
class TokenChance:
    """How likely a token was.

    Attributes:
        token: its text.
        logprob: its log-probability.
        others: (text, log-probability) of the likeliest ones at this place.
    """

    token: str
    logprob: float
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Decided:
    """The first thing told of every request: what knowledge it got.

    Attributes:
        mixture: (task, weight), largest first; empty when abstained or not wanted.
        is_abstained: whether the store was asked and had nothing.
        store_version: of the knowledge it was decided on.
        num_prompt_tokens: of the prompt.
    """

    mixture: tuple[tuple[str, float], ...]
    is_abstained: bool
    store_version: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """More of one answer.

    Attributes:
        index: which of the answers.
        text: what comes next; may be empty.
        chances: of the tokens it consists of, where they were asked for.
    """

    index: int
    text: str
    chances: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one answer.

    Attributes:
        index: which of the answers.
        reason: ``stop`` or ``length``.
        kind: ``classification``, ``generation`` or ``frozen``, as the library names it.
        confidence: of the whole answer, as the library computes it.
        num_tokens: written.
        labels: (label, probability) of a classification, the likeliest first.
    """

    index: int
    reason: str
    kind: str
    confidence: float
    num_tokens: int
    labels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more of this request."""

    refusal: Refused


Event = Decided | Piece | Finished | Failed


@dataclass(slots=True)
class Asked:
    """One prompt on its way through an engine.

    Attributes:
        prompt: text or conversation, as the library takes it.
        model: ``auto``, the backbone's name, or ``backbone:task``.
        task: the forced task; None with ``auto`` and with the frozen backbone.
        wish: how the answer is to be written.
        tell: is called from the engine's thread with every event.
        deadline_s: longest time to the end of the answer.
        row: the tokenized prompt.
        is_labelling: only the probabilities of labels are wanted.
        is_cancelled: set when nobody waits any more.
        most_rows: it is read while fewer rows than this are written, as beside them it did not fit.
    """

    prompt: Any
    model: str
    task: str | None
    wish: Wish
    tell: Callable[[Event], None]
    deadline_s: float
    row: Any = None
    is_labelling: bool = False
    is_cancelled: bool = False
    most_rows: int = sys.maxsize
    begun: float = field(default_factory=time.monotonic)

    @property
    def is_routed(self) -> bool:
        """Whether DTKR decides."""
        return self.model == AUTO

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() - self.begun > self.deadline_s
