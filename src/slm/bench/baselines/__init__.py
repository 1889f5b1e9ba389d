"""Rivals of slm, one readable file each; :func:`rival` finds one by its name and loads torch no sooner."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from slm.errors import ConfigError

if TYPE_CHECKING:
    from slm.bench.rival import Rival

_HOMES = {
    "frozen": "frozen:Frozen",
    "sequential": "sequential:SequentialFineTuning",
    "sequential-lora": "sequential_lora:SequentialLora",
    "replay-1": "replay:Replay1",
    "replay-10": "replay:Replay10",
    "ewc": "ewc:ElasticWeightConsolidation",
    "l2p": "l2p:PromptPool",
    "o-lora": "o_lora:OrthogonalLora",
    "progressive-prompts": "progressive_prompts:ProgressivePrompts",
    "mean-key": "mean_key:MeanKey",
    "slm-cosine": "slm_cosine:SlmCosine",
    "slm-cosine-voting": "slm_cosine:SlmCosineVoting",
    "slm": "slm_default:SlmDefault",
    "slm-never-abstaining": "never_abstaining:NeverAbstaining",
    "oracle": "oracle:Oracle",
    "joint": "joint:Joint",
    "joint-wide": "joint:JointWide",
}

NAMES = tuple(_HOMES)
"""Every method, from the one that learns nothing to the bounds."""


def rival(name: str) -> type[Rival]:
    """The method of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _HOMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"method {name!r} is unknown{hint}; known are {', '.join(NAMES)}")
    module, _, class_name = _HOMES[name].partition(":")
    found: type[Rival] = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    return found
