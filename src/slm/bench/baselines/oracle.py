"""The oracle: slm's own increments and every question's true task. What routing could give at best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slm.answer import Answer
from slm.backbone.prompts import Prompt
from slm.bench.baselines.isolated import IsolatedRival, options_of
from slm.bench.baselines.rows import size_of
from slm.errors import TaskError
from slm.model import ScalableLM


class Oracle(IsolatedRival):
    """Every question is answered with the knowledge of its own task."""

    name = "oracle"
    title = "slm with task-ID (oracle)"
    needs_task_id = True

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answers of the model restricted to the question's task, never abstaining."""
        return self._ask_each(questions, tasks, lambda alone, own: alone.ask(own, **options_of(self.setup)))

    def ask_again(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The same, each question computed once."""
        return self._ask_each(questions, tasks, self.cache.ask)

    def _ask_each(
        self,
        questions: Sequence[Prompt],
        tasks: Sequence[str] | None,
        ask: Callable[[ScalableLM, Sequence[Prompt]], list[Answer]],
    ) -> list[Answer]:
        if tasks is None:
            raise TaskError(f"{self.name} has to be told the task of every question: give tasks")
        answers: dict[int, Answer] = {}
        for name in dict.fromkeys(tasks):
            own = [i for i, task in enumerate(tasks) if task == name]
            alone = self.model.restricted([name], is_abstaining=False)
            answers.update(zip(own, ask(alone, [questions[i] for i in own]), strict=True))
        return [answers[i] for i in range(len(questions))]

    def nearest(self, questions: Sequence[Prompt]) -> list[str] | None:
        """None: the oracle is told."""
        return None

    @property
    def size_bytes(self) -> int:
        """Bytes of increments and heads; being told the task, it needs no keys."""
        store, total = self.model.store, 0
        for record in store.tasks():
            total += sum(store.increment(record, i).size_bytes for i in range(record.num_increments))
            total += size_of(store.head(record) or {})
        return total
