"""Running a stream: teach, then ask everything learned so far, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from slm.answer import Answer
from slm.bench.rival import Rival
from slm.evaluation.matrix import prompt_of
from slm.evaluation.scorers import scorer_for
from slm.tasks import Example, Stream, Task


class Learner(Protocol):
    """What a learner has to offer."""

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
        answers = learner.ask([prompt_of(example) for _, example in rows], **options)
        line: list[float | None] = list(score_answers(known, rows, answers))
        scores.append(line + [None] * (len(stream) - len(line)))
        if on_learned is not None:
            on_learned(task)
    return scores


def score_answers(
    stream: Stream,
    rows: Sequence[tuple[str, Example]],
    answers: Sequence[Answer],
    metrics: Mapping[str, str] | None = None,
) -> list[float]:
    """Score of each task on its own rows of one shuffled list, by the named metrics or the tasks' usual."""
    line = []
    for task in stream:
        own = [(a.text, e.target) for a, (name, e) in zip(answers, rows, strict=True) if name == task.name]
        scorer = scorer_for(task, (metrics or {}).get(task.name))
        line.append(scorer([a for a, _ in own], [t or "" for _, t in own]))
    return line


@dataclass(slots=True)
class StreamRun:
    """What a rival did on one stream; times in seconds.

    Attributes:
        scores: a[i][j], lower triangle; a joint method has its last row alone.
        learn_s: time to learn each task; of a joint method, of all of them at once.
        size_bytes: bytes kept after each task.
        ask_s: time of the last round of questions.
        num_asked: questions of the last round.
        retrieve_s: time of routing alone, for the same questions; None for a method that routes nothing.
        confusion: rows of task i routed to task j, counts; None for a method that routes nothing.
        num_refused: rows of the last round that abstained, per task.
    """

    scores: list[list[float]] = field(default_factory=list)
    learn_s: list[float] = field(default_factory=list)
    size_bytes: list[int] = field(default_factory=list)
    ask_s: float = 0.0
    num_asked: int = 0
    retrieve_s: float | None = None
    confusion: list[list[int]] | None = None
    num_refused: list[int] = field(default_factory=list)


def run_rival(
    rival: Rival, stream: Stream, *, limit: int, seed: int = 0, metrics: Mapping[str, str] | None = None
) -> StreamRun:
    """Live through a stream with one method.

    Args:
        rival: fresh.
        stream: tasks with test examples, in the order of learning.
        limit: most test rows of each task; after every task all of the tasks so far are asked in one shuffled
            list.
        seed: chooses and shuffles the test rows.
        metrics: task -> name of its scorer; None takes the tasks' usual ones.
    """
    run = StreamRun()
    steps = [stream] if rival.is_joint else [Stream((task,)) for task in stream]
    known: tuple[str, ...] = ()
    rows: list[tuple[str, Example]] = []
    for step in steps:
        begun = time.perf_counter() + rival.borrowed_s
        rival.learn_all(step)
        run.learn_s.append(time.perf_counter() - begun + rival.borrowed_s)
        run.size_bytes.append(rival.size_bytes)
        known += step.names
        rows = stream.order(known).mixed_test(limit, seed)
        _ask(rival, stream.order(known), rows, metrics, run, is_last=len(known) == len(stream))
    _route(rival, stream.names, rows, run)
    return run


def _ask(
    rival: Rival,
    known: Stream,
    rows: Sequence[tuple[str, Example]],
    metrics: Mapping[str, str] | None,
    run: StreamRun,
    *,
    is_last: bool,
) -> None:
    """Ask one round; in the last one, whose time counts, nothing is answered from memory."""
    questions = [prompt_of(example) for _, example in rows]
    owners = [name for name, _ in rows]
    ask = rival.ask if is_last else rival.ask_again
    begun = time.perf_counter()
    answers = ask(questions, owners if rival.needs_task_id else None)
    run.ask_s, run.num_asked = time.perf_counter() - begun, len(rows)
    run.scores.append(score_answers(known, rows, answers, metrics))
    refused = [name for name, answer in zip(owners, answers, strict=True) if answer.is_abstained]
    run.num_refused = [refused.count(name) for name in known.names]


def _route(rival: Rival, names: Sequence[str], rows: Sequence[tuple[str, Example]], run: StreamRun) -> None:
    begun = time.perf_counter()
    nearest = rival.nearest([prompt_of(example) for _, example in rows])
    if nearest is None:
        return
    run.retrieve_s = time.perf_counter() - begun
    pairs = [(name, found) for (name, _), found in zip(rows, nearest, strict=True)]
    run.confusion = [[pairs.count((a, b)) for b in names] for a in names]
