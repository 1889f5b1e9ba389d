"""Which tasks a store's own keys expect to be confused, without asking a single question."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from slm.retrieval.index import all_distances
from slm.retrieval.retriever import Retriever
from slm.retrieval.scoring import GaussianScorer

NUM_DRAWS = 400
"""Rows drawn around each key."""


def implied_confusion(
    retriever: Retriever, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Float[Tensor, "t T"] | None:
    """Where rows of each task would go if they lay as the store's statistics say; t tasks, T = t + 1.

    A row of key n is drawn as y_n + b_n + e with e ~ √τ · N(0, Y_n) (method section 2d), the very law
    thresholds follow from, and then given to the nearest key. So it needs no row of data; it knows only
    confusions that the statistics know, and tells of those that a runoff (section 2b) is left to settle.

    Args:
        retriever: decides among the tasks.
        num_draws: rows around each key.
        seed: of the draws; one seed gives one result.

    Returns:
        (t, T) float64: share of each task's rows nearest to a key of each task and not refused, and in the
        last column refused; rows sum to 1. None where no key keeps a spread in a space that tells tasks from
        each other or from a background: the cosine form, or a single task without one.

    Raises:
        StoreError: a task's statistics cannot be read.
    """
    scorer = retriever.scorer
    if not isinstance(scorer, GaussianScorer) or scorer.space.is_plain:
        return None
    num_tasks = int(scorer.tasks[-1]) + 1
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(num_tasks, num_tasks + 1, dtype=torch.float64)
    for task in range(num_tasks):
        law = scorer.law(task)
        values, directions = torch.linalg.eigh(law.spread)
        root = directions * values.clamp_min(0.0).sqrt()
        scales = scorer.scales(task).clamp_min(0.0).sqrt()
        for centre, share in zip(law.centres, scorer.shares_of(task), strict=True):
            noise = torch.randn(num_draws, len(root), generator=generator, dtype=torch.float64)
            lengths = scales[torch.arange(num_draws) % len(scales)]
            points = torch.zeros(num_draws, scorer.keys.shape[1], dtype=torch.float64)
            points[:, : len(root)] = centre + lengths[:, None] * noise @ root.T  # of a prior's a row has none
            gone = _decide(retriever, points)
            found[task] += share * torch.bincount(gone, minlength=num_tasks + 1) / num_draws
    return found


def _decide(retriever: Retriever, points: Float[Tensor, "B J"]) -> Tensor:
    """Task of the nearest key of each point, (B,) int64, or the number of tasks where it is refused."""
    scorer = retriever.scorer
    squared, nearest = all_distances(points, scorer.keys).min(1)
    given = scorer.tasks[nearest]
    if retriever.config.is_abstaining:
        distances = scorer.relative_distances(points, squared[:, None])[:, 0]
        given = torch.where(distances > scorer.thresholds(nearest), int(scorer.tasks[-1]) + 1, given)
    return given
