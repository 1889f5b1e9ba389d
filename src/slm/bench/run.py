"""Running a stream: teach, then ask everything learned so far, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slm.answer import Answer
from slm.evaluation.scorers import scorer_for
from slm.tasks import Stream, Task


class Learner(Protocol):
    """What a rival has to offer."""

    def learn(self, task: Task) -> Any:
        """Learn one task."""
        ...

    def ask(self, questions: Sequence[Any], **options: Any) -> list[Answer]:
        """Answer questions of any task learned so far."""
        ...


def run_stream(
    learner: Learner,
    stream: Stream,
    *,
    limit: int,
    seed: int = 0,
    on_learned: Callable[[Task], None] | None = None,
    **options: Any,
) -> list[list[float | None]]:
    """Accuracy matrix a[i][j] of method section 5, by really asking after each task.

    Args:
        learner: learns and answers.
        stream: tasks with test examples, in the order of learning.
        limit: most test rows per task; they are asked in one shuffled list.
        seed: chooses and shuffles them.
        on_learned: called after each task.
        **options: handed to ``ask``.
    """
    scores: list[list[float | None]] = []
    for i, task in enumerate(stream):
        learner.learn(task)
        known = stream.order(stream.names[: i + 1])
        rows = known.mixed_test(limit, seed)
        answers = learner.ask([example.prompt for _, example in rows], **options)
        line: list[float | None] = []
        for other in known:
            own = [
                (a.text, e.target) for a, (name, e) in zip(answers, rows, strict=True) if name == other.name
            ]
            line.append(scorer_for(other)([a for a, _ in own], [t or "" for _, t in own]))
        scores.append(line + [None] * (len(stream) - len(line)))
        if on_learned is not None:
            on_learned(task)
    return scores
