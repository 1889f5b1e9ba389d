"""Answers to questions that are asked again and again while a store grows or is restricted.

What a row is answered depends on the row and on its mixture alone: the backbone is frozen, so is every
increment, and neighbours in a batch change nothing. As a store grows, few decisions change. Each question is
therefore read once, decided for anew by every model, and answered anew only where its mixture is another one.
A matrix over t tasks then costs about as much as its last row, not t/2 times as much.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
from torch import Tensor

from slm.answer import Answer
from slm.backbone.prompts import Prompt
from slm.retrieval.retriever import Retrieved

if TYPE_CHECKING:
    from slm.model import ScalableLM

K = TypeVar("K")
V = TypeVar("V")

Decision = tuple[tuple[str, int, float], ...]
"""A row's mixture: commit id, increment and weight of each part; empty where the row is refused."""


@final
class AnswerCache:
    """Asks models of one backbone that read queries alike, and answers from memory what cannot have changed.

    The models may be restricted to some tasks, abstain or not, or know more tasks than before.

    Args:
        **options: of :meth:`slm.model.ScalableLM.ask`, the same for every question.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._queries: dict[str, Tensor] = {}
        self._answers: dict[tuple[str, Decision], Answer] = {}

    def ask(self, model: ScalableLM, questions: Sequence[Prompt]) -> list[Answer]:
        """What ``model.ask`` answers, of a model that knows a task.

        Raises:
            DataError: a question is empty or too long.
        """
        decisions = decisions_of(self.retrieve(model, questions), [task.commit_id for task in model.tasks])
        keys = [(json.dumps(question), own) for question, own in zip(questions, decisions, strict=True)]
        return recall(self._answers, keys, questions, lambda new: model.ask(new, **self._options))

    def retrieve(self, model: ScalableLM, questions: Sequence[Prompt]) -> Retrieved:
        """What ``model.retrieve`` decides, of a model that knows a task.

        Raises:
            DataError: a question is empty or too long.
        """
        is_truncating = self._options.get("is_truncating", False)
        size = self._options.get("batch_size", 32)

        def read(new: list[Prompt]) -> Tensor:
            return model.queries(new, is_truncating=is_truncating, batch_size=size)

        queries = torch.stack(recall(self._queries, [json.dumps(q) for q in questions], questions, read))
        retrieved = model.retrieve(questions, queries=queries, is_truncating=is_truncating)
        assert retrieved is not None, "a task is learned before anything is asked"
        return retrieved


def recall(
    known: dict[K, V],
    keys: Sequence[K],
    questions: Sequence[Prompt],
    compute: Callable[[list[Prompt]], Iterable[V]],
) -> list[V]:
    """What is known of each question, after computing what is not.

    Args:
        known: by key; grows.
        keys: of the questions.
        questions: what to compute from.
        compute: is given the questions of unknown keys, each key's once, and gives one value for each.
    """
    new = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
    if new:
        known.update(zip(new, compute(list(new.values())), strict=True))
    return [known[key] for key in keys]


def decisions_of(retrieved: Retrieved, commit_ids: Sequence[str]) -> list[Decision]:
    """The mixture of every row, by commit id instead of by number.

    Args:
        retrieved: for B rows.
        commit_ids: of the tasks by number.
    """
    columns = (retrieved.tasks.tolist(), retrieved.increments.tolist(), retrieved.weights.tolist())
    return [
        tuple((commit_ids[n], i, w) for n, i, w in zip(*parts, strict=True) if w > 0)
        for parts in zip(*columns, strict=True)
    ]
