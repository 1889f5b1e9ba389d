"""ProgressivePrompts (Razdaibiedina et al. 2023): a soft prompt per task on top of the frozen earlier ones.

Task t learns its prompt P_t with [P_t; P_{t−1}; ...; P_1] before the words, everything but P_t frozen, and
a head of its own. It has to be told the task of a question, so it is a bound and no rival; being told, a
backbone that writes scores the labels of that task, as the oracle does. The paper's residual network over
the prompts is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slm.answer import Answer
from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import score_labels
from slm.backbone.heads import Head
from slm.backbone.prompts import Batch, Prompt
from slm.bench.baselines.rows import (
    answer_all,
    expect_finite,
    expect_room,
    learning_of,
    name_labels,
    size_of,
    training_rows,
    write_freely,
)
from slm.bench.baselines.soft_prompt import Prompted, draw_prompts, prompted_pooled, prompted_prefill
from slm.bench.rival import Rival, Setup
from slm.config import LearningConfig
from slm.errors import TaskError
from slm.learning.trainer import fit
from slm.tasks import Task


class Progressive(Prompted):
    """The prompt of one task before the earlier ones.

    Args:
        backbone: frozen.
        config: of the training.
        length: vectors of the new prompt.
        earlier: (P, C), the prompts of earlier tasks, newest first; they stay as they are.
        num_labels: labels of the task, 0 for free text.
    """

    def __init__(
        self, backbone: Backbone, config: LearningConfig, length: int, earlier: Tensor, num_labels: int
    ) -> None:
        super().__init__(backbone, config)
        seed = config.seed + 1000 * len(earlier)
        self.own = nn.Parameter(draw_prompts(backbone, length, seed))
        self.earlier = earlier
        is_encoder = backbone.kind is BackboneKind.ENCODER
        self.head = Head(backbone.num_channels, num_labels) if is_encoder else None
        self.to(backbone.device)

    def prompts(self) -> Tensor:
        """[P_t; ...; P_1], (P, C)."""
        return torch.cat([self.own, self.earlier.to(self.own.device)])

    def choose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same prompts for every row."""
        prompts = self.prompts()
        return prompts.expand(len(batch.ids), *prompts.shape), prompts.new_zeros(())

    def prompt_parameters(self) -> list[nn.Parameter]:
        """The new prompt alone."""
        return [self.own]


@dataclass(frozen=True, slots=True)
class _Learned:
    """What is kept of a task: its prompts with the earlier ones, its head and its labels."""

    module: Progressive
    labels: tuple[str, ...]


class ProgressivePrompts(Rival):
    """A prompt per task; earlier ones help and never change."""

    name = "progressive-prompts"
    title = "ProgressivePrompts (task-ID)"
    needs_task_id = True
    defaults = {"learning_rate": 1e-2, "prompt_length": 10.0}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = learning_of(setup, self.settings["learning_rate"])
        self.learned: dict[str, _Learned] = {}

    def learn(self, task: Task) -> None:
        """Learn the task's prompt and head."""
        backbone, length = self.setup.backbone, int(self.settings["prompt_length"])
        expect_room(backbone, length * (1 + len(self.learned)))
        earlier = torch.zeros(0, backbone.model.get_input_embeddings().weight.shape[1])
        if self.learned:
            earlier = list(self.learned.values())[-1].module.prompts().detach().clone()
        with backbone.lock:
            module = Progressive(backbone, self.config, length, earlier, len(task.labels))
            train, validation = training_rows(backbone, task, task.labels, self.config)
            fit(module, backbone, train, validation, self.config, f"{self.name} learning {task.name}")
        expect_finite(module, task.name, self.config.learning_rate)
        self.learned[task.name] = _Learned(module.eval().requires_grad_(False), task.labels)

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answers with the prompts and the head of the task each question is of."""
        if tasks is None:
            raise TaskError(f"{self.name} has to be told the task of every question: give tasks")
        answers: dict[int, Answer] = {}
        for name in dict.fromkeys(tasks):
            own = [i for i, task in enumerate(tasks) if task == name]
            learned = self.learned[name]
            found = answer_all(
                self.setup.backbone,
                [questions[i] for i in own],
                lambda batch, learned=learned: self._answer(batch, learned),  # type: ignore[misc]
            )
            answers.update(zip(own, found, strict=True))
        return [answers[i] for i in range(len(questions))]

    def _answer(self, batch: Batch, learned: _Learned) -> list[Answer]:
        backbone, module, labels = self.setup.backbone, learned.module, learned.labels
        module.bind()
        prompts, _ = module.choose(batch)
        if module.head is not None:
            return name_labels(module.head(prompted_pooled(backbone, batch, prompts)), labels)
        start = prompted_prefill(backbone, batch, prompts)
        if not labels:
            return write_freely(backbone, start, self.setup.max_new_tokens)
        num_rows = len(batch.ids)
        return name_labels(
            torch.stack(score_labels(backbone, start, range(num_rows), [labels] * num_rows)), labels
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of every task's own prompt and head."""
        return sum(size_of(list(learned.module.parameters())) for learned in self.learned.values())
