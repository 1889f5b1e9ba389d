"""How well a backbone that writes reads texts of no task: what is measured of base-model drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.prompts import IGNORED, Row

BATCH_SIZE = 8


def text_losses(
    backbone: Backbone, texts: Sequence[str], bent: Callable[[Sequence[str]], AbstractContextManager[object]]
) -> list[float] | None:
    """Mean negative log-likelihood of each text's tokens after its first, in nats.

    Args:
        backbone: as the method has it.
        texts: each within the backbone's window.
        bent: within its block the backbone is what the method makes of it for these texts.

    Returns:
        One loss per text; None for a backbone that is not causal.
    """
    if backbone.kind is not BackboneKind.CAUSAL:
        return None
    losses: list[float] = []
    for start in range(0, len(texts), BATCH_SIZE):
        chosen = texts[start : start + BATCH_SIZE]
        rows = []
        for text in chosen:
            ids = backbone.renderer.tokenizer(text)["input_ids"][: backbone.window]
            rows.append(Row(tuple(ids[:1]), (0, 1), tuple(ids[1:])))
        with backbone.lock, torch.inference_mode(), bent(chosen):
            batch = backbone.batch(rows)
            logits = backbone.model(**backbone.inputs(batch), use_cache=False).logits.float()
        is_counted = batch.targets != IGNORED
        found = logits.log_softmax(-1).gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
        losses += (-(found * is_counted).sum(1) / is_counted.sum(1)).tolist()
    return losses
