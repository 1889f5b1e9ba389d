"""The decision of DTKR for each row: which knowledge, how much of it, or none at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slm.config import RetrievalConfig
from slm.retrieval.keys import TaskKeys
from slm.retrieval.scoring import fit_scorer


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was decided for each row of a batch.

    Attributes:
        tasks: (B, K) int64, the task of each kept key, most similar first.
        increments: (B, K) int64, which of that task's increments the key owns.
        weights: (B, K) float32, w ≥ 0; rows sum to 1, or are all zero when the row abstains.
        posterior: (B, N) float32, softmax over all keys before anything was dropped.
        distances: (B, N) float32, relative distance of each key (method section 2d).
        thresholds: (N,) float32, largest relative distance of each key that is not refused.
        owners: (N,) int64, the task of each key.
        is_abstained: (B,) bool, whether the row belongs to no task of the store.
    """

    tasks: Int[Tensor, "B K"]
    increments: Int[Tensor, "B K"]
    weights: Float[Tensor, "B K"]
    posterior: Float[Tensor, "B N"]
    distances: Float[Tensor, "B N"]
    thresholds: Float[Tensor, " N"]
    owners: Int[Tensor, " N"]
    is_abstained: Bool[Tensor, " B"]

    @property
    def nearest(self) -> Int[Tensor, " B"]:
        """(B,) int64, the most similar key of each row, abstained or not."""
        return self.distances.argmin(1)


class Retriever:
    """Decides from queries alone, one row at a time, for a fixed set of tasks.

    Args:
        tasks: keys and statistics of each task, in learning order.
        scatter_sum: (P,) float64, packed sum of the tasks' scatters.
        config: K, temperature, smallest weight and abstention (a false-refusal rate of None is 0.01).
    """

    def __init__(
        self, tasks: Sequence[TaskKeys], scatter_sum: Float[Tensor, " P"], config: RetrievalConfig
    ) -> None:
        self.config = config
        rate = 0.01 if config.false_refusal_rate is None else config.false_refusal_rate
        self.scorer = fit_scorer(tasks, scatter_sum, rate)

    def __call__(self, queries: Float[Tensor, "B C"]) -> Retrieved:
        """Retrieve for each row; its result does not depend on the other rows."""
        scorer, config = self.scorer, self.config
        distances = scorer.relative_distances(queries.cpu())
        log_density = -distances / 2 / config.temperature
        num_kept = min(config.top_k, distances.shape[1])
        best, keys = log_density.topk(num_kept, dim=1)
        weights = best.softmax(1)
        weights = torch.where(weights < config.min_weight, 0.0, weights)
        weights = weights / weights.sum(1, keepdim=True)
        nearest = keys[:, 0]
        is_abstained = distances.gather(1, keys[:, :1])[:, 0] > scorer.thresholds[nearest]
        if not config.is_abstaining:
            is_abstained = torch.zeros_like(is_abstained)
        weights = torch.where(is_abstained[:, None], 0.0, weights)
        return Retrieved(
            tasks=scorer.tasks[keys],
            increments=scorer.increments[keys],
            weights=weights.to(torch.float32),
            posterior=log_density.softmax(1).to(torch.float32),
            distances=distances.to(torch.float32),
            thresholds=scorer.thresholds.to(torch.float32),
            owners=scorer.tasks,
            is_abstained=is_abstained,
        )
