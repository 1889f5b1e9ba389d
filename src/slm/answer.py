"""What ``ask`` and ``explain`` give back: plain values, no tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: the label or the generated text; None when an encoder abstains, which has nothing else to say.
        kind: ``classification``, ``generation``, or ``frozen`` when the frozen backbone answered.
        confidence: probability of the label, or geometric mean of the probabilities of the generated tokens;
            0 where there is no text.
        tasks: (task, weight) of the knowledge that was used, largest weight first; empty when abstaining.
        is_abstained: whether the row was found to belong to no task of the store.
        others: further generated texts, where several were asked for.
    """

    text: str | None
    kind: str
    confidence: float
    tasks: tuple[tuple[str, float], ...]
    is_abstained: bool
    others: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One task as DTKR saw it.

    Attributes:
        task: its name.
        weight: what it got of the row's mixture.
        probability: share of the task's keys in the softmax over all keys.
        distance: relative distance of its nearest key (method section 2d); smaller is nearer.
        threshold: largest distance of that key that is not refused.
    """

    task: str
    weight: float
    probability: float
    distance: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """DTKR's whole decision for one question.

    Attributes:
        question: the text.
        candidates: every task of the store, nearest first.
        is_abstained: whether the nearest was still too far.
        is_contested: whether two tasks both claimed it and settled it in a runoff (method section 2b).
    """

    question: str
    candidates: tuple[Candidate, ...]
    is_abstained: bool
    is_contested: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values; None stands for the threshold of a task that never refuses a row."""
        found = dataclasses.asdict(self)
        for candidate in found["candidates"]:
            for name in ("distance", "threshold"):
                if not math.isfinite(candidate[name]):
                    candidate[name] = None
        return found
