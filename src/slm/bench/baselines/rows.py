"""Rows into a rival and answers out of it: what methods with one list of labels for all tasks have in common.

Such a method knows no task when it is asked. An encoder names the best of all labels seen so far. A backbone
that writes cannot be told that a question is a classification, nor of which labels, without being told the
task: it writes its answer freely, greedily, and the text is compared with the target.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from slm.answer import Answer
from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import Prefill
from slm.backbone.generate import generate
from slm.backbone.heads import Head
from slm.backbone.prompts import Batch, Prompt
from slm.bench.rival import Setup
from slm.config import LearningConfig
from slm.errors import ConfigError, LearningError, TaskError
from slm.evaluation.matrix import prompt_of
from slm.learning.trainer import TrainingRow
from slm.tasks import Example, Task, TaskKind

BATCH_SIZE = 32
"""Questions answered together; it changes the speed, not the answers."""


def learning_of(setup: Setup, learning_rate: float = 0.0) -> LearningConfig:
    """How a rival is trained: as slm is, with the cell's seed; a learning rate of 0 is slm's."""
    config = dataclasses.replace(setup.config.learning, seed=setup.seed)
    return dataclasses.replace(config, learning_rate=learning_rate) if learning_rate else config


def training_rows(
    backbone: Backbone, task: Task, labels: Sequence[str], config: LearningConfig
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Rows of a task to train on, and those slm too would keep for early stopping; labels by number.

    Raises:
        TaskError: the task asks for free text, which an encoder cannot write.
        DataError: a row is empty or too long.
    """
    if backbone.kind is BackboneKind.ENCODER and task.kind is TaskKind.GENERATION:
        raise TaskError(f"task {task.name!r} asks for free text, which {backbone.source!r} cannot write")
    train, validation = task.split(config.validation_share, config.seed)
    return (
        label_rows(backbone, train, labels, config.is_truncating, task.name),
        label_rows(backbone, validation, labels, config.is_truncating, task.name),
    )


def label_rows(
    backbone: Backbone, examples: Sequence[Example], labels: Sequence[str], is_truncating: bool, name: str
) -> list[TrainingRow]:
    """Examples in tokens, each with the number of its label; 0 where the backbone writes.

    Raises:
        DataError: an example is empty or too long.
    """
    is_encoder = backbone.kind is BackboneKind.ENCODER
    numbers = {label: number for number, label in enumerate(labels)}
    rows = []
    for i, example in enumerate(examples, start=1):
        row = backbone.row(
            prompt_of(example),
            None if is_encoder else example.target,
            is_truncating=is_truncating,
            where=f"example {i} of task {name!r}",
        )
        rows.append(TrainingRow(row, numbers[example.target or ""] if is_encoder else 0))
    return rows


def answer_all(
    backbone: Backbone,
    questions: Sequence[Prompt],
    answer: Callable[[Batch], list[Answer]],
    batch_size: int = BATCH_SIZE,
) -> list[Answer]:
    """Answers of many questions, computed in batches of rows of about one length."""
    rows = [
        backbone.row(question, is_truncating=True, where=f"question {i}")
        for i, question in enumerate(questions, start=1)
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    found: dict[int, Answer] = {}
    with backbone.lock, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found.update(zip(chosen, answer(backbone.batch([rows[i] for i in chosen])), strict=True))
    return [found[i] for i in range(len(rows))]


def name_labels(logits: Tensor, labels: Sequence[str]) -> list[Answer]:
    """The best label of each row of logits (B, Y)."""
    chances = logits.float().softmax(-1)
    return [
        Answer(labels[int(row.argmax())], "classification", float(row.max()), (), False) for row in chances
    ]


def write_freely(backbone: Backbone, start: Prefill, max_new_tokens: int) -> list[Answer]:
    """The greedy text of each row of a prefill, with whatever is bound."""
    written = generate(backbone, start, range(len(start.batch.ids)), max_new_tokens)
    return [Answer(texts[0].text, "generation", texts[0].confidence, (), False) for texts in written]


class GrowingHead(Head):
    """One head over every label seen so far; a new label starts at zero, the others keep their weights.

    Attributes:
        open_labels: (Y,) bool, the labels a row being learned may have; None is all. The labels of earlier
            tasks, which no row has any more, are then not pushed down ("labels trick", Zeno et al. 2018).
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, 0)
        self.open_labels: Tensor | None = None

    def grow(self, num_labels: int) -> None:
        """Add labels until there are ``num_labels``."""
        missing = num_labels - len(self.bias)
        if missing:
            with torch.no_grad():
                new_weight, new_bias = self.weight.new_zeros(missing, self.weight.shape[1]), self.bias
                self.weight = nn.Parameter(torch.cat([self.weight, new_weight]))
                self.bias = nn.Parameter(torch.cat([new_bias, self.bias.new_zeros(missing)]))

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (B, Y) of the labels; −∞ for those that are not open."""
        logits: Tensor = super().forward(pooled)
        return logits if self.open_labels is None else logits.masked_fill(~self.open_labels, -math.inf)


def mask_of(labels: Sequence[str], chosen: Sequence[str]) -> Tensor:
    """(Y,) bool, which of all labels are among the chosen ones."""
    return torch.tensor([label in chosen for label in labels])


def size_of(tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> int:
    """Bytes of tensors kept as float32."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(4 * tensor.numel() for tensor in values)


def expect_finite(module: nn.Module, name: str, learning_rate: float) -> None:
    """Refuse a method whose training went astray in its very last step.

    Raises:
        LearningError: a parameter is no finite number.
    """
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        raise LearningError(
            f"learning {name!r} left parameters that are not finite: lower learning_rate ({learning_rate:g})"
        )


def expect_room(backbone: Backbone, num_prompts: int) -> None:
    """Refuse prompts that leave no room for the longest row.

    Raises:
        ConfigError: prompts and row together do not fit into the backbone's window.
    """
    longest = backbone.renderer.max_tokens
    if num_prompts + longest > backbone.window:
        raise ConfigError(
            f"{num_prompts} prompt tokens before rows of up to {longest} tokens do not fit into the "
            f"window of {backbone.window}: lower the prompts' length or max_tokens"
        )
