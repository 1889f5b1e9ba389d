"""What is fine-tuned: a module that holds the new parameters alone, and the new knowledge of one task.

The frozen backbone stands outside the module, so checkpoints are small.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.heads import Head
from slm.backbone.prompts import Batch
from slm.backbone.reparameterize import LearningBinding
from slm.config import IncrementConfig, LearningConfig
from slm.errors import LearningError
from slm.increments.increment import Increment, LowRankPair
from slm.learning.objectives import Outcome, answer_objective, label_objective


class Trainable(nn.Module, abc.ABC):
    """What :func:`slm.learning.trainer.fit` fine-tunes; its forward pass gives the loss of a batch.

    Args:
        backbone: what it changes; no part of the module.
        config: of the training.
    """

    def __init__(self, backbone: Backbone, config: LearningConfig) -> None:
        super().__init__()
        self._backbone = (backbone,)  # in a tuple, so that torch does not count it among the parameters
        self.settings = config  # not `config`: Trainer would take it for a transformers model's

    @property
    def backbone(self) -> Backbone:
        """What is changed."""
        return self._backbone[0]

    @abc.abstractmethod
    def bind(self) -> None:
        """Take effect on the backbone, until it is released."""

    @abc.abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates, as optimizers take them."""

    @abc.abstractmethod
    def loss(self, batch: Batch, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss of a batch, (); labels (B,) int64, weights (B, U) float32 over the task's increments."""

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        content: Tensor,
        positions: Tensor,
        targets: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of a batch, its columns named as in :class:`slm.backbone.prompts.Batch`.

        Raises:
            LearningError: it is not finite.
        """
        home = self.backbone.device
        batch = Batch(ids, mask, content, positions, targets).to(home)
        loss = self.loss(batch, labels.to(home), weights.to(home))
        if not torch.isfinite(loss):
            raise LearningError(
                f"the loss became {float(loss.detach())} while learning, so nothing was stored: lower "
                f"learning_rate ({self.settings.learning_rate:g}) or look for odd texts"
            )
        return {"loss": loss}


class Learnable(Trainable):
    """The new knowledge of one task: increments and, for an encoder, a head (method section 4, step 2).

    Args:
        backbone: frozen; the increments are bound to its layers while this module is in use.
        targets: names of the layers they change.
        shape: rank and scale.
        config: dropout and seed.
        num_labels: labels of the task, 0 for free text.
        num_increments: U, increments of the task.
    """

    def __init__(
        self,
        backbone: Backbone,
        targets: Sequence[str],
        shape: IncrementConfig,
        config: LearningConfig,
        num_labels: int,
        num_increments: int = 1,
    ) -> None:
        super().__init__(backbone, config)
        self._shape = shape
        seed = torch.Generator().manual_seed(config.seed)
        layers = backbone.reparameterizer.layers
        self.names = tuple(targets)
        scale = shape.alpha / shape.rank
        self.num_increments = num_increments
        self.bindings = nn.ModuleList(
            LearningBinding(layers[name].base, shape.rank, scale, config.dropout, seed, num_increments)
            for name in self.names
        )
        has_head = backbone.kind is BackboneKind.ENCODER
        self.head = Head(backbone.num_channels, num_labels) if has_head else None
        self.is_head_fitted = False
        self.to(backbone.device)

    def bind(self) -> None:
        """Bend the backbone with this module's parameters."""
        self.backbone.reparameterizer.bind_each(dict(zip(self.names, self.bindings, strict=True)))  # type: ignore[arg-type]

    def outcome(self, batch: Batch, labels: Tensor, weights: Tensor) -> Outcome:
        """Loss and right answers of a batch; row b mixes the increments by its weights, (B, U) float32."""
        for binding in self.bindings:
            binding.weigh(weights if self.num_increments > 1 else None)  # type: ignore[operator]
        if self.head is None:
            return answer_objective(self.backbone, batch)
        return label_objective(self.backbone, self.head, batch, labels)

    def loss(self, batch: Batch, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss of :meth:`outcome`."""
        return self.outcome(batch, labels, weights).loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Increments and head with their own learning rates."""
        config = self.settings
        groups = [{"params": list(self.bindings.parameters()), "lr": config.learning_rate}]
        if self.head is not None:
            rate = config.learning_rate if self.is_head_fitted else config.head_learning_rate
            groups.append({"params": list(self.head.parameters()), "lr": rate})
        return [{**group, "weight_decay": config.weight_decay} for group in groups]

    def increments(self) -> tuple[Increment, ...]:
        """The learned increments, detached, in float32 on the CPU."""
        learned = [binding.pairs() for binding in self.bindings]  # type: ignore[operator]
        return tuple(
            Increment(
                {name: LowRankPair(*own[i]) for name, own in zip(self.names, learned, strict=True)},
                self._shape.rank,
                self._shape.alpha,
            )
            for i in range(self.num_increments)
        )

    def head_tensors(self) -> dict[str, Tensor] | None:
        """The learned head, detached, in float32 on the CPU; None for a backbone that writes."""
        if self.head is None:
            return None
        return {name: tensor.detach().float().cpu() for name, tensor in self.head.state_dict().items()}
