"""Sequential fine-tuning: all weights, one task after another, nothing done against forgetting.

The usual lower bound of continual learning. The whole backbone, a copy of its own in float32, and, for an
encoder, one head over every label seen so far are trained on each task in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slm.answer import Answer
from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import prefill
from slm.backbone.load import has_fast_bfloat16, load_backbone
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
from slm.config import LearningConfig
from slm.learning.learnable import Trainable
from slm.learning.objectives import answer_objective, label_objective
from slm.learning.trainer import fit
from slm.tasks import Task


class WholeModel(Trainable):
    """Backbone and head, all of it trained; computed in bfloat16 where that is faster.

    Args:
        backbone: a copy in float32 that nobody else uses.
        config: of the training.
    """

    def __init__(self, backbone: Backbone, config: LearningConfig) -> None:
        super().__init__(backbone, config)
        self.network = backbone.model.requires_grad_(True)
        is_encoder = backbone.kind is BackboneKind.ENCODER
        self.head = GrowingHead(backbone.num_channels).to(backbone.device) if is_encoder else None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parameters, each once: what a checkpoint cannot hold is one tensor under two names."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Take such a checkpoint; a second name of a tensor follows the first."""
        return super().load_state_dict({**super().state_dict(), **state_dict}, *args, **kwargs)

    def bind(self) -> None:
        """Nothing is bound: the weights themselves change."""

    def mixed_precision(self) -> Any:
        """Products in bfloat16, parameters in float32, within the block."""
        device = self.backbone.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or has_fast_bfloat16())

    def loss(self, batch: Batch, labels: Tensor, weights: Tensor) -> Tensor:
        """The task's loss."""
        with self.mixed_precision():
            if self.head is None:
                return answer_objective(self.backbone, batch).loss
            return label_objective(self.backbone, self.head, batch, labels).loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone and head with their own learning rates."""
        config = self.settings
        groups = [{"params": list(self.network.parameters()), "lr": config.learning_rate}]
        if self.head is not None:
            groups.append({"params": list(self.head.parameters()), "lr": config.head_learning_rate})
        return [{**group, "weight_decay": config.weight_decay} for group in groups]


class SequentialFineTuning(Rival):
    """Every weight, on one task after another."""

    name = "sequential"
    title = "sequential fine-tuning"
    defaults = {"learning_rate": 5e-5, "masks_labels": 0.0}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = learning_of(setup, self.settings["learning_rate"])
        plain = dataclasses.replace(setup.config.backbone, dtype="float32")
        self.whole = WholeModel(load_backbone(setup.backbone.source, plain), self.config)
        self.labels: list[str] = []

    def learn(self, task: Task) -> None:
        """Train everything on this task alone."""
        backbone, head = self.whole.backbone, self.whole.head
        self.labels += [label for label in task.labels if label not in self.labels]
        if head is not None:
            head.grow(len(self.labels))
            if self.settings["masks_labels"]:
                head.open_labels = mask_of(self.labels, task.labels).to(backbone.device)
        train, validation = training_rows(backbone, task, self.labels, self.config)
        fit(self.whole, backbone, train, validation, self.config, f"{self.name} learning {task.name}")
        if head is not None:
            head.open_labels = None
        expect_finite(self.whole, task.name, self.config.learning_rate)

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The best of all labels seen so far, or a freely written text."""
        self.whole.eval()
        return answer_all(self.whole.backbone, questions, self._answer)

    def _answer(self, batch: Batch) -> list[Answer]:
        backbone, head = self.whole.backbone, self.whole.head
        with self.whole.mixed_precision():
            if head is not None:
                return name_labels(head(backbone.pooled(batch)), self.labels)
            return write_freely(backbone, prefill(backbone, batch), self.setup.max_new_tokens)

    def losses(self, texts: Sequence[str]) -> list[float] | None:
        """Losses of the changed model."""
        self.whole.eval()
        return text_losses(self.whole.backbone, texts, lambda _: self.whole.mixed_precision())

    @property
    def size_bytes(self) -> int:
        """Bytes of the changed model and the head: nothing of the frozen backbone is left to share."""
        return size_of(list(self.whole.parameters()))
