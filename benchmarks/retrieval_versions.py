"""What ``retrieval.py`` measures of a task's second version, which has rows of the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from retrieval_routing import Splits, keys_of
from torch import Tensor

from slm.config import RetrievalConfig
from slm.retrieval import nested
from slm.retrieval.background import Background
from slm.retrieval.keys import TaskKeys
from slm.retrieval.retriever import Retriever
from slm.retrieval.space import fit_space

SIZES = ((12, 18), (100, 110), (100, 150), (100, 200))
"""Rows of the first version and of the second."""

SHARES = (1.0, 0.75, 0.5, 0.0)
"""Of the first version's rows, so many that are the second's too."""


def versions(splits: Splits, background: Background, config: RetrievalConfig) -> dict[str, Any]:
    """The estimated share of common rows, and what refusing costs, the other tasks being in the store.

    Args:
        splits: queries of each task; the test rows are requests.
        background: of texts of all kinds.
        config: how the queries were read.
    """
    others = {task: keys_of(train[: max(m for _, m in SIZES)]) for task, (train, _) in splits.items()}
    found: dict[str, Any] = {}
    for n, m in SIZES:
        estimates: dict[float, list[float]] = {share: [] for share in SHARES}
        refused: dict[str, list[float]] = {"one version": [], "counted once": [], "counted twice": []}
        for task, (train, requests) in splits.items():
            beside = [keys for other, keys in others.items() if other != task]
            second = keys_of(train[:m])
            firsts = {
                share: keys_of(
                    torch.cat([train[: round(share * n)], train[len(train) - n + round(share * n) :]])
                )
                for share in SHARES
            }
            for share, first in firsts.items():
                estimates[share].append(_estimate(first, second, beside, background))
            both = [*beside, firsts[1.0], second]
            refused["one version"].append(_refused([*beside, second], requests, background, config))
            refused["counted once"].append(_refused(both, requests, background, config))
            with patch.object(nested, "HELD", math.inf):
                refused["counted twice"].append(_refused(both, requests, background, config))
        found[f"{n}, {m}"] = {
            "estimates": {str(s): [min(own), max(own)] for s, own in estimates.items()},
            "refused": {name: fmean(own) for name, own in refused.items()},
        }
    return found


def _estimate(first: TaskKeys, second: TaskKeys, beside: Sequence[TaskKeys], background: Background) -> float:
    tasks = [*beside, first, second]
    space = fit_space(tasks, _total(tasks), background)
    return nested.held_share(first, second, nested.spread_of(second, second.scatter, space), space)


def _refused(
    tasks: Sequence[TaskKeys], requests: Tensor, background: Background, config: RetrievalConfig
) -> float:
    retriever = Retriever(tasks, _total(tasks), config, background=background)
    return float(retriever(requests).is_abstained.float().mean())


def _total(tasks: Sequence[TaskKeys]) -> Tensor:
    return torch.stack([task.scatter for task in tasks]).double().sum(0)
