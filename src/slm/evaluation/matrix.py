"""The whole accuracy matrix of a stream, computed after the fact from one model.

Knowledge is isolated per task and its statistics subtract exactly, so the state after learning task i *is*
the model restricted to its first i tasks: nothing is learned here, and no snapshot needs to be kept. A
question is answered anew only where a state decides otherwise for it (:mod:`slm.evaluation.answer_cache`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, final

from tqdm.auto import tqdm

from slm.errors import ConfigError, DataError, TaskError
from slm.evaluation import metrics
from slm.evaluation.scorers import scorer_for
from slm.tasks import Example, Stream

if TYPE_CHECKING:
    from slm.backbone.prompts import Prompt
    from slm.model import ScalableLM


@final
@dataclass(frozen=True)
class Evaluation:
    """Everything method section 5 measures; scores and shares run from 0 to 1.

    Attributes:
        tasks: t names in learning order; whatever is "per task" below follows it.
        metrics: name of the metric per task.
        num_rows: test rows asked per task.
        seed: that chose the test rows and their order.
        scores: a[i][j] on task j after learning task i, lower triangle: row i has i + 1 scores.
        average: (1/t) Σ_j a[t][j].
        forgetting: mean drop from each earlier task's best score; None for one task.
        backward_transfer: mean change of each earlier task's first score; None for one task.
        forward_transfer: mean lead of a[j][j] over learning task j alone; None for one task. Increments are
            learned in isolation, so here it shows what retrieving among earlier tasks costs.
        oracle: score per task with its true task-ID given.
        oracle_average: mean of the oracle.
        oracle_gap: oracle_average − average.
        misrouting: share of test rows whose nearest key, refused or not, is another task's.
        task_misrouting: the same per task.
        false_refusal_rate: share of test rows that abstained.
        confusion: rows of task i whose nearest key is task j's, counts.
        abstention_auroc: of the nearest key's distance, outsiders against test rows; None without outsiders.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    num_rows: tuple[int, ...]
    seed: int
    scores: tuple[tuple[float, ...], ...]
    average: float
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    oracle: tuple[float, ...]
    oracle_average: float
    oracle_gap: float
    misrouting: float
    task_misrouting: tuple[float, ...]
    false_refusal_rate: float
    confusion: tuple[tuple[int, ...], ...]
    abstention_auroc: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values: lists, not tuples, so that reading them back gives the same."""
        return {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def rows(self) -> list[dict[str, Any]]:
        """One line of a report per task: its first and last score, the oracle's, and how it was routed."""
        return [
            {
                "task": name,
                "metric": self.metrics[j],
                "num_rows": self.num_rows[j],
                "first": self.scores[j][j],
                "last": self.scores[-1][j],
                "oracle": self.oracle[j],
                "misrouting": self.task_misrouting[j],
            }
            for j, name in enumerate(self.tasks)
        ]


def evaluate_stream(
    model: ScalableLM,
    stream: Stream,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    is_truncating: bool = False,
    has_progress: bool = True,
    outsiders: Sequence[str] = (),
) -> Evaluation:
    """Measure a model on the tasks of a stream, as after each of them and as it is now (method section 5).

    The order is the one in which the model learned them, whatever the stream's is; other tasks that the model
    knows are left out. Test rows are shuffled over tasks, and no question says which task it is of.

    Args:
        model: has learned every task of the stream.
        stream: tasks with test examples.
        limit: most test rows of each task; None asks all.
        seed: chooses the test rows and their order.
        batch_size: rows computed together.
        max_new_tokens: longest generated answer; None is 128, or what the window leaves behind the longest
            question.
        is_truncating: cut the middle out of an over-long question instead of refusing it.
        has_progress: show a bar on standard error.
        outsiders: texts that belong to no task, for the AUROC of abstention.

    Raises:
        TaskError: the stream is empty, or a task was never learned or has no test examples.
        ConfigError: limit, batch_size or max_new_tokens is below 1.
        DataError: a question is empty or too long.
    """
    _check_numbers(limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if isinstance(outsiders, str):
        raise DataError(f"outsiders must be several texts, got one, {outsiders!r}: put it into a list")
    names = _learning_order([record.name for record in model.tasks], stream.names)
    ordered = stream.order(names)
    largest = limit if limit is not None else max(1, *(len(task.test) for task in ordered))
    test = ordered.mixed_test(largest, seed)
    if max_new_tokens is None:
        prompts = [prompt_of(example) for _, example in test]
        rows = model.backbone.question_rows(prompts, is_truncating=is_truncating)
        max_new_tokens = max(1, min(128, model.backbone.room_behind(rows)))
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "is_truncating": is_truncating}
    run = _Run(model, ordered, test, options)
    with tqdm(total=len(run.test), desc="evaluating", unit="row", disable=not has_progress) as bar:
        return run.measure(bar, list(outsiders), seed)


@final
class _Run:
    """One evaluation under way.

    Args:
        model: with all its tasks.
        stream: tasks in learning order.
        test: pairs of task name and test example, shuffled over tasks.
        options: of ``model.ask``.
    """

    def __init__(
        self,
        model: ScalableLM,
        stream: Stream,
        test: Sequence[tuple[str, Example]],
        options: dict[str, Any],
    ) -> None:
        from slm.evaluation.answer_cache import AnswerCache  # here, so that this room loads without torch

        self.model = model
        self.names = stream.names
        self.test = test
        self.cache = AnswerCache(**options)
        self.scorers = {task.name: scorer_for(task) for task in stream}
        owners = [name for name, _ in test]
        self.num_rows = [owners.count(name) for name in self.names]

    def measure(self, bar: Any, outsiders: Sequence[str], seed: int) -> Evaluation:
        """Ask, retrieve and put everything together."""
        names, model = self.names, self.model
        scores = []
        for i, num_new in enumerate(self.num_rows):
            known = names[: i + 1]
            scores.append(self._ask(model.restricted(known), known))
            bar.update(num_new)  # rows of earlier tasks were answered in the states before, nearly all
        oracle = [self._ask(model.restricted([n], is_abstaining=False), [n])[0] for n in names]
        alone = [None, *(self._ask(model.restricted([n]), [n])[0] for n in names[1:])]
        whole = model.restricted(names)
        routed = self._retrieve(whole, [prompt_of(example) for _, example in self.test])
        strange = self._retrieve(whole, outsiders).distances if outsiders else []
        owners = [names.index(name) for name, _ in self.test]
        own = [[k for j, k in zip(owners, routed.tasks, strict=True) if j == i] for i in range(len(names))]
        return Evaluation(
            tasks=names,
            metrics=tuple(self.scorers[name].name for name in names),
            num_rows=tuple(self.num_rows),
            seed=seed,
            scores=tuple(map(tuple, scores)),
            average=metrics.average(scores),
            forgetting=metrics.forgetting(scores),
            backward_transfer=metrics.backward_transfer(scores),
            forward_transfer=metrics.forward_transfer(scores, alone),
            oracle=tuple(oracle),
            oracle_average=fmean(oracle),
            oracle_gap=metrics.oracle_gap(scores, oracle),
            misrouting=metrics.misrouting(owners, routed.tasks),
            task_misrouting=tuple(metrics.misrouting([i] * len(own[i]), own[i]) for i in range(len(names))),
            false_refusal_rate=metrics.false_refusal_rate(routed.is_abstained),
            confusion=tuple(tuple(map(nearest.count, range(len(names)))) for nearest in own),
            abstention_auroc=metrics.auroc(strange, routed.distances) if outsiders else None,
        )

    def _ask(self, model: ScalableLM, names: Sequence[str]) -> list[float]:
        """Scores of a model on the shuffled rows of some tasks, asked in one go."""
        rows = [(name, example) for name, example in self.test if name in names]
        answers = self.cache.ask(model, [prompt_of(example) for _, example in rows])
        own: dict[str, tuple[list[str | None], list[str]]] = {name: ([], []) for name in names}
        for (name, example), answer in zip(rows, answers, strict=True):
            own[name][0].append(answer.text)
            own[name][1].append(example.target or "")  # a task refuses blank targets
        return [self.scorers[name](*own[name]) for name in names]

    def _retrieve(self, model: ScalableLM, questions: Sequence[Prompt]) -> _Routed:
        """Nearest key of each question, as the model retrieves it."""
        retrieved = self.cache.retrieve(model, questions)
        return _Routed(
            tasks=retrieved.owners[retrieved.nearest].tolist(),
            distances=retrieved.distances[:, 0].tolist(),
            is_abstained=retrieved.is_abstained.tolist(),
        )


@final
@dataclass(frozen=True, slots=True)
class _Routed:
    """What was retrieved for some rows: task and distance of the nearest key, and whether it was refused."""

    tasks: list[int]
    distances: list[float]
    is_abstained: list[bool]


def prompt_of(example: Example) -> Prompt:
    """The prompt as a model takes it: a text, or the messages of a conversation as mappings."""
    if isinstance(example.prompt, str):
        return example.prompt
    return [{"role": message.role, "content": message.content} for message in example.prompt]


def _learning_order(learned: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted tasks in the order in which they were learned."""
    if not wanted:
        raise TaskError("the stream has no tasks, at least 1 is needed: add one that was learned")
    missing = [name for name in wanted if name not in learned]
    if missing:
        known = f"learned are {', '.join(learned)}" if learned else "nothing was learned yet"
        listed = ", ".join(_with_nearest(name, learned) for name in missing)
        left = ",".join(name for name in learned if name in wanted)
        hint = f" (--tasks {left})" if left else ""
        raise TaskError(
            f"the model never learned {listed} of the stream, {known}: learn it first or leave it out{hint}"
        )
    return tuple(name for name in learned if name in wanted)


def _with_nearest(name: str, learned: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, learned, n=1)
    return f'{name!r} (did you mean "{near[0]}"?)' if near else repr(name)


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}: raise it")


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
