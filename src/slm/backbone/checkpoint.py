"""Whether a checkpoint is the whole of a model and no more: else what is loaded is not what was saved.

transformers draws weights that a checkpoint lacks at random and goes on, and takes an adapter that lies
beside the weights as part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slm.errors import BackboneError

WHOLE = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Keyword arguments of ``from_pretrained`` that have it say what :func:`expect_whole` asks."""

_NUM_SHOWN = 3


def refuse_adapter(source: str, path: str) -> None:
    """Refuse a checkpoint beside whose weights a PEFT adapter lies; PEFT need not be installed for that.

    Args:
        source: what the user called the backbone.
        path: a local folder or a hub id.

    Raises:
        BackboneError: one does.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(path) is not None:
        raise BackboneError(
            f"backbone {source!r} holds a PEFT adapter (adapter_config.json), which would become part of the "
            "frozen weights: merge it into them first (merge_and_unload) or give a folder without it"
        )


def expect_whole(source: str, model: nn.Module, found: Mapping[str, Any], *, is_encoder: bool) -> None:
    """Expect every weight of a model to have come from its checkpoint; what is there besides may be.

    An encoder's pooler may be missing: nothing reads it. It becomes zero, so that two copies are the same.

    Args:
        source: what the user called the backbone.
        model: as it was loaded.
        found: what ``from_pretrained`` says of it, given :data:`WHOLE`.
        is_encoder: whether it is read by its hidden states alone.

    Raises:
        BackboneError: a weight is missing or has another shape than the model's.
    """
    if found["mismatched_keys"]:
        name, saved, own = min(found["mismatched_keys"])
        raise BackboneError(
            f"backbone {source!r} holds {name} of shape {tuple(saved)}, its config.json describes "
            f"{tuple(own)}: give the weights and the config.json of one model"
        )
    missing = set(found["missing_keys"])
    if is_encoder:
        unread = {name for name in missing if "pooler" in name.split(".")}
        for name in unread:
            model.get_parameter(name).data.zero_()
        missing -= unread
    if missing:
        shown = ", ".join(sorted(missing)[:_NUM_SHOWN]) + (", ..." if len(missing) > _NUM_SHOWN else "")
        raise BackboneError(
            f"backbone {source!r} lacks {len(missing)} of its weights ({shown}), which would be random ones: "
            "give a checkpoint that holds them all"
        )
