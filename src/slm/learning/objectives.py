"""The losses of method section 4: labels for encoders, answer tokens for backbones that write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.heads import Head
from slm.backbone.prompts import IGNORED, Batch


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one batch of learning or validation gives.

    Attributes:
        loss: () float32, mean over what is counted.
        num_correct: () int64, right labels (encoder) or right answer tokens.
        num_counted: () int64, how many there were.
    """

    loss: Float[Tensor, ""]
    num_correct: Int[Tensor, ""]
    num_counted: Int[Tensor, ""]


def label_objective(backbone: Backbone, head: Head, batch: Batch, labels: Int[Tensor, " B"]) -> Outcome:
    """Cross-entropy of the labels under the head's logits.

    Args:
        backbone: an encoder with the increment bound.
        head: the task's head.
        batch: texts, (B, T).
        labels: (B,) int64, index of each row's label.
    """
    logits = head(backbone.pooled(batch))
    loss = functional.cross_entropy(logits, labels)
    correct = (logits.argmax(-1) == labels).sum()
    return Outcome(loss, correct, torch.tensor(len(labels)))


def answer_objective(backbone: Backbone, batch: Batch) -> Outcome:
    """Token cross-entropy on the answers only; logits are computed from the first answer token on.

    Args:
        backbone: a causal or sequence-to-sequence backbone with the increment bound.
        batch: prompts and answers; for a causal backbone left-padded, so all answers end in the last column.
    """
    targets = batch.targets
    kept: dict[str, torch.Tensor] = {}
    if backbone.kind is BackboneKind.CAUSAL:
        first = int((targets != IGNORED).any(0).nonzero()[0])
        # By index: by number they would stay a view, for which torch copies the head's weights once per row.
        kept["logits_to_keep"] = torch.arange(first, targets.shape[1], device=targets.device)
        targets = targets[:, first:]
    logits = backbone.model(**backbone.inputs(batch), **kept, use_cache=False).logits
    is_counted = targets != IGNORED
    logits, targets = logits[is_counted].float(), targets[is_counted]
    loss = functional.cross_entropy(logits, targets)
    correct = (logits.argmax(-1) == targets).sum()
    return Outcome(loss, correct, torch.tensor(len(targets)))
