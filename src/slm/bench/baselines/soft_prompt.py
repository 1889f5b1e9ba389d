"""Soft prompts: learned vectors put before the words of a row, where a backbone's embeddings would be.

They go in through ``inputs_embeds``; increments play no part. Prompts start as embeddings of words drawn at
random, as in the release of ProgressivePrompts; that of L2P, whose rows are images, draws uniform numbers.
Answers are read as from any other pass.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import Prefill
from slm.backbone.heads import pool_mean
from slm.backbone.prompts import IGNORED, Batch
from slm.learning.learnable import Trainable


def widened(backbone: Backbone, batch: Batch, num_prompts: int) -> Batch:
    """The batch with P columns on the left for prompts; padding stays where it is, behind them."""
    num_rows, device = len(batch.ids), batch.ids.device
    places = torch.arange(num_prompts, device=device).expand(num_rows, -1)
    nothing = torch.zeros(num_rows, num_prompts, dtype=torch.bool, device=device)
    is_apart = backbone.renderer.is_apart
    no_target = places.new_full(places.shape, IGNORED)
    return Batch(
        ids=torch.cat([places.new_full(places.shape, backbone.renderer.pad_id), batch.ids], 1),
        mask=torch.cat([~nothing, batch.mask], 1),
        content=torch.cat([nothing, batch.content], 1),
        positions=torch.cat([places, num_prompts + batch.positions], 1),
        targets=batch.targets if is_apart else torch.cat([no_target, batch.targets], 1),
    )


def prompted_inputs(backbone: Backbone, wide: Batch, prompts: Tensor) -> dict[str, Any]:
    """The keyword arguments of the model's forward for a widened batch and its prompts (B, P, C)."""
    inputs: dict[str, Any] = backbone.inputs(wide)
    words = backbone.model.get_input_embeddings()(inputs.pop("input_ids")[:, prompts.shape[1] :])
    return {**inputs, "inputs_embeds": torch.cat([prompts.to(words.dtype), words], dim=1)}


def prompted_pooled(backbone: Backbone, batch: Batch, prompts: Tensor) -> Tensor:
    """Mean last hidden state of an encoder's rows, prompts included, (B, C) float32."""
    wide = widened(backbone, batch, prompts.shape[1])
    hidden = backbone.model(**prompted_inputs(backbone, wide, prompts)).last_hidden_state
    return pool_mean(hidden, wide.mask)


def prompted_loss(backbone: Backbone, batch: Batch, prompts: Tensor) -> Tensor:
    """Token cross-entropy on the answers of a backbone that writes (method section 4)."""
    wide = widened(backbone, batch, prompts.shape[1])
    targets, kept = wide.targets, {}
    if backbone.kind is BackboneKind.CAUSAL:
        first = int((targets != IGNORED).any(0).nonzero()[0])
        kept["logits_to_keep"] = torch.arange(first, targets.shape[1], device=targets.device)
        targets = targets[:, first:]
    logits = backbone.model(**prompted_inputs(backbone, wide, prompts), **kept, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def prompted_prefill(backbone: Backbone, batch: Batch, prompts: Tensor) -> Prefill:
    """One pass over prompts and questions, from which answers are written or labels scored."""
    wide = widened(backbone, batch, prompts.shape[1])
    inputs = prompted_inputs(backbone, wide, prompts)
    if backbone.kind is BackboneKind.CAUSAL:
        last = torch.tensor([-1], device=backbone.device)
        output = backbone.model(**inputs, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=last)
        return Prefill(wide, output.logits[:, -1], output.past_key_values)
    output = backbone.model(**inputs, use_cache=True)
    return Prefill(wide, output.logits[:, -1], output.past_key_values, output.encoder_last_hidden_state)


def draw_prompts(backbone: Backbone, num_prompts: int, seed: int) -> Tensor:
    """Embeddings of words drawn at random, (P, C) float32."""
    table: Tensor = backbone.model.get_input_embeddings().weight
    chosen = torch.randint(len(table), (num_prompts,), generator=torch.Generator().manual_seed(seed))
    return table.detach()[chosen.to(table.device)].float().clone()


class Prompted(Trainable):
    """Something trainable that chooses prompts for each row; an encoder's head goes with it.

    Args:
        backbone: frozen.
        config: of the training.
    """

    head: nn.Module | None

    @abc.abstractmethod
    def choose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompts (B, P, C) of each row, and what choosing adds to the loss, ()."""

    @abc.abstractmethod
    def prompt_parameters(self) -> list[nn.Parameter]:
        """What is learned beside the head."""

    def bind(self) -> None:
        """Leave the backbone's layers as they are."""
        self.backbone.reparameterizer.release()

    def loss(self, batch: Batch, labels: Tensor, weights: Tensor) -> Tensor:
        """The task's loss and, while learning, what choosing adds to it."""
        prompts, extra = self.choose(batch)
        if self.head is None:
            loss = prompted_loss(self.backbone, batch, prompts)
        else:
            loss = functional.cross_entropy(self.head(prompted_pooled(self.backbone, batch, prompts)), labels)
        return loss + extra if self.training else loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Prompts and head with their own learning rates; prompts, like words, are not decayed."""
        groups: list[dict[str, Any]] = [
            {"params": self.prompt_parameters(), "lr": self.settings.learning_rate, "weight_decay": 0.0}
        ]
        if self.head is not None:
            own = {"lr": self.settings.head_learning_rate, "weight_decay": self.settings.weight_decay}
            groups.append({"params": list(self.head.parameters()), **own})
        return groups
