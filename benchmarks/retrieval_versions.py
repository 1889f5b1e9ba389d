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

SIZES = ((12, 18), (100, 110), (100, 150))
"""Rows of the first version and of the second."""

SHARES = (1.0, 0.75, 0.5, 0.0)
"""Of the first version's rows, so many that are the second's too."""


def versions(splits: Splits, background: Background, config: RetrievalConfig) -> dict[str, Any]:
    """Beside another task: the estimated share of common rows, and what refusing costs.

    Args:
        splits: queries of each task; the test rows are requests.
        background: of texts of all kinds.
        config: how the queries were read.
    """
    names = list(splits)
    found: dict[str, Any] = {}
    for n, m in SIZES:
        estimates: dict[float, list[float]] = {share: [] for share in SHARES}
        refused: dict[str, list[float]] = {"one version": [], "counted once": [], "counted twice": []}
        for task, other in zip(names, [*names[1:], names[0]], strict=True):
            train, requests = splits[task]
            beside, second = keys_of(splits[other][0]), keys_of(train[:m])
            for share in SHARES:
                common = round(share * n)
                first = keys_of(torch.cat([train[:common], train[len(train) - (n - common) :]]))
                estimates[share].append(_estimate([first, beside, second], background))
            both = [keys_of(train[:n]), beside, second]
            refused["one version"].append(_refused(both[1:], requests, background, config))
            refused["counted once"].append(_refused(both, requests, background, config))
            with patch.object(nested, "HELD", math.inf):
                refused["counted twice"].append(_refused(both, requests, background, config))
        found[f"{n}, {m}"] = {
            "estimates": {str(s): [min(own), max(own)] for s, own in estimates.items()},
            "refused": {name: fmean(own) for name, own in refused.items()},
        }
    return found


def _estimate(tasks: Sequence[TaskKeys], background: Background) -> float:
    space = fit_space(tasks, _total(tasks), background)
    spread = nested.spread_of(tasks[2], tasks[2].scatter, space)
    return nested.held_share(tasks[0], tasks[2], spread, space)


def _refused(
    tasks: Sequence[TaskKeys], requests: Tensor, background: Background, config: RetrievalConfig
) -> float:
    retriever = Retriever(tasks, _total(tasks), config, background=background)
    return float(retriever(requests).is_abstained.float().mean())


def _total(tasks: Sequence[TaskKeys]) -> Tensor:
    return torch.stack([task.scatter for task in tasks]).double().sum(0)
