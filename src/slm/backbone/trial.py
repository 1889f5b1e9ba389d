"""How a backbone's texts are read behind a prompt, found out once on a few tokens when it is loaded.

Side by side (several texts in one row, rows at different places in one pass) is fast, but right only where
attention goes by the positions and the mask that it is given. What counts positions itself (ALiBi), or sees
parts of a row by a rule that slm does not know (chunks, GPT-Neo's local layers), reads each text in a row of
its own, as transformers would. What keeps something else than keys and values can be read neither way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.decode import Prefill, cache_of, prefill, read_apart, read_side_by_side
from slm.backbone.prompts import Row
from slm.backbone.slots import Slots
from slm.errors import BackboneError

_TEXT = "The quick brown fox jumps over the lazy dog."
_RAISED = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError)


@torch.no_grad()
def settle_reading(backbone: Backbone) -> None:
    """Read texts apart where side by side is not known, or found, to be right; encoders read none.

    Raises:
        BackboneError: a causal backbone keeps no keys and values that can be cut and copied.
    """
    if backbone.kind is not BackboneKind.CAUSAL:
        return
    first, second, a, b, c, d, e = (backbone.renderer.tokenizer(_TEXT)["input_ids"] * 7)[:7]
    texts = [[a, b], [c, d, e]]
    prompts = [(first, second, a), (second, first)]
    # Each prompt, and each beginning of a text behind it: the last logits say what comes next.
    beginnings = [(*prompt, *begun) for prompt in prompts for begun in ((), (a,), (c,), (c, d))]
    batch = backbone.batch([Row(ids, (0, len(ids))) for ids in beginnings])
    try:
        start = prefill(backbone, batch)
        other = {type(layer).__name__ for layer in start.cache.layers if type(layer) is not DynamicLayer}
        cache_of(start, torch.tensor(_ROWS), crop=1)
        log_probs = start.logits.float().log_softmax(-1).reshape(2, 4, -1)
        expected = torch.stack([log_probs[:, 1, b], log_probs[:, 2, d] + log_probs[:, 3, e]], dim=1)
        is_right = _is_known(backbone.model) and _agrees(backbone, start, texts, expected)
        if not is_right:
            read_apart(backbone, start, _ROWS, [texts] * 2)
    except _RAISED as error:
        raise _refused(backbone, f"{type(error).__name__}: {error}") from error
    if other:
        raise _refused(backbone, f"it has {min(other)}")
    backbone.is_reading_apart = not is_right


_ROWS = [0, 4]
"""The rows of the two prompts in the trial's prefill."""


def _refused(backbone: Backbone, reason: str) -> BackboneError:
    reason = " ".join(reason.split())[:200]
    return BackboneError(
        f"backbone {backbone.source!r} is a {type(backbone.model).__name__}, which keeps something else than "
        f"keys and values of a prompt ({reason}): use a model whose layers are all attention"
    )


def _is_known(model: Any) -> bool:
    """Whether a model's own description says that it goes by given positions and masks alone."""
    config = model.config.get_text_config()
    sorts = set(getattr(config, "layer_types", None) or ())
    has_window = "sliding_attention" not in sorts or bool(getattr(config, "sliding_window", None))
    takes = {name for x in (model, model.base_model) for name in inspect.signature(x.forward).parameters}
    return (
        sorts <= {"full_attention", "sliding_attention"}
        and has_window
        and set(getattr(config, "attention_layers", None) or ()) <= {"global"}
        and not getattr(config, "alibi", False)
        and "position_ids" in takes
    )


def _agrees(backbone: Backbone, start: Prefill, texts: Sequence[Sequence[int]], expected: Tensor) -> bool:
    """Whether texts side by side, and a step of rows at different places, give what each gives alone.

    Args:
        backbone: with nothing bound.
        start: the trial's prefill.
        texts: two texts.
        expected: (2, 2) log-probability of the later tokens of each text behind each prompt.
    """
    slots = Slots(backbone)
    try:
        together = read_side_by_side(backbone, start, _ROWS, [texts] * 2)
        for row in _ROWS:
            slots.admit(start, row)
        begun, following = texts[0]
        stepped = slots.step(torch.tensor([begun, begun])).float().log_softmax(-1)[:, following]
    except _RAISED:
        return False
    found = torch.column_stack([*map(torch.stack, zip(*together, strict=True)), stepped])
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 0.05  # sums in another order, in few bits
    return torch.allclose(found, expected[:, [0, 1, 0]], rtol=tolerance, atol=tolerance)
