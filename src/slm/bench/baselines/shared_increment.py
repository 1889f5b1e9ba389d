"""One increment and one head that all tasks share: what rivals without retrieval train on each task in turn.

The layers are those of every block, also of a deep backbone, where slm keeps the first ones frozen to read
its query from them: nothing holds a rival back from bending them too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from slm.answer import Answer
from slm.backbone.backbone import Backbone
from slm.backbone.decode import prefill
from slm.backbone.prompts import Batch, Prompt
from slm.bench.baselines.rows import (
    GrowingHead,
    answer_all,
    expect_finite,
    learning_of,
    mask_of,
    name_labels,
    size_of,
    training_rows,
    write_freely,
)
from slm.bench.baselines.text_losses import text_losses
from slm.bench.rival import Rival, Setup
from slm.config import IncrementConfig, LearningConfig
from slm.learning.learnable import Learnable
from slm.learning.objectives import Outcome
from slm.learning.trainer import TrainingRow, fit
from slm.tasks import Task


class SharedIncrement(Learnable):
    """An increment of every target layer and, for an encoder, a head that grows with the labels.

    Args:
        backbone: frozen.
        shape: rank, scale and layers, as for slm.
        config: of the training.

    Attributes:
        labels: every label seen so far, in order of arrival.
        penalty: added to the loss while learning, not to the validation loss.
    """

    def __init__(self, backbone: Backbone, shape: IncrementConfig, config: LearningConfig) -> None:
        super().__init__(backbone, backbone.targets(shape.targets, 0), shape, config, 0)
        if self.head is not None:
            self.head = GrowingHead(backbone.num_channels).to(backbone.device)
        self.labels: list[str] = []
        self.penalty: Callable[[], Tensor] | None = None

    def meet(self, labels: Sequence[str]) -> None:
        """Take in the labels of a task; those known already keep their place."""
        self.labels += [label for label in labels if label not in self.labels]
        if isinstance(self.head, GrowingHead):
            self.head.grow(len(self.labels))

    def limit(self, labels: Sequence[str] | None) -> None:
        """Learn with these labels as the only possible ones; None lifts the limit."""
        if isinstance(self.head, GrowingHead):
            mask = None if labels is None else mask_of(self.labels, labels)
            self.head.open_labels = None if mask is None else mask.to(self.backbone.device)

    def outcome(self, batch: Batch, labels: Tensor, weights: Tensor) -> Outcome:
        """Loss and right answers of a batch; while learning the penalty is part of the loss."""
        outcome = super().outcome(batch, labels, weights)
        if self.training and self.penalty is not None:
            return dataclasses.replace(outcome, loss=outcome.loss + self.penalty())
        return outcome

    @contextlib.contextmanager
    def bent(self) -> Iterator[None]:
        """Within the block the backbone has the increment."""
        self.eval()
        self.bind()
        try:
            yield
        finally:
            self.backbone.reparameterizer.release()

    def answer(self, batch: Batch, max_new_tokens: int) -> list[Answer]:
        """The best of all labels, or the greedy text, of each row."""
        with self.bent():
            if self.head is not None:
                return name_labels(self.head(self.backbone.pooled(batch)), self.labels)
            return write_freely(self.backbone, prefill(self.backbone, batch), max_new_tokens)


class SharedRival(Rival):
    """A method with a shared increment; by itself it does nothing against forgetting.

    Attributes:
        defaults: ``learning_rate`` 0 is that of slm; ``masks_labels`` 1 learns each task with no labels open
            but its own.
    """

    defaults = {"learning_rate": 0.0, "masks_labels": 0.0}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = learning_of(setup, self.settings["learning_rate"])
        self.knowledge = self.begin()

    def begin(self) -> SharedIncrement:
        """What is learned, before the first task."""
        return SharedIncrement(self.setup.backbone, self.setup.config.increments, self.config)

    def before(self, task: Task) -> None:
        """What the method does before a task is learned."""

    def mix(self, rows: list[TrainingRow]) -> Sequence[TrainingRow]:
        """The rows to learn from, given those of the new task."""
        return rows

    def after(self, task: Task, rows: Sequence[TrainingRow]) -> None:
        """What the method does once a task is learned, its rows still there, its labels still limited."""

    def learn(self, task: Task) -> None:
        """Train what is shared on this task."""
        self.learn_together([task])

    def learn_together(self, tasks: Sequence[Task]) -> None:
        """Train what is shared on the union of some tasks."""
        backbone, knowledge = self.setup.backbone, self.knowledge
        labels = sorted({label for task in tasks for label in task.labels})
        with backbone.lock:
            knowledge.meet(labels)
            parts = [training_rows(backbone, task, knowledge.labels, self.config) for task in tasks]
            train, validation = ([row for part in side for row in part] for side in zip(*parts, strict=True))
            for task in tasks:
                self.before(task)
            knowledge.limit(labels if self.settings["masks_labels"] else None)
            title = f"{self.name} learning {tasks[0].name}"
            fit(knowledge, backbone, self.mix(train), validation, self.config, title)
            expect_finite(knowledge, tasks[0].name, self.config.learning_rate)
            for task in tasks:
                self.after(task, train)
            knowledge.limit(None)

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The best of all labels seen so far, or a freely written text."""
        limit = self.setup.max_new_tokens
        return answer_all(self.setup.backbone, questions, lambda batch: self.knowledge.answer(batch, limit))

    def losses(self, texts: Sequence[str]) -> list[float] | None:
        """Losses with the increment, which every text gets."""
        return text_losses(self.setup.backbone, texts, lambda _: self.knowledge.bent())

    @property
    def size_bytes(self) -> int:
        """Bytes of increment and head."""
        return size_of(list(self.knowledge.parameters()))
