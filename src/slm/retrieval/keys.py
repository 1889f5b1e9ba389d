"""Keys of one task: what the gaussian form of DTKR remembers of it (method section 2b).

Only counts, means and one scatter are kept: sums over the task's queries, from which no example can
be read back. They are rounded once, when the task is learned, and from then on every sum over tasks
starts from these same stored numbers, so the result cannot depend on the order of arrival and what
``forget`` takes away is exactly what ``learn`` added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TaskKeys:
    """Keys and statistics of one task.

    Attributes:
        means: (N_t, C) float64, mean query μ_n of each of the task's keys.
        counts: (N_t,) int64, training rows behind each key.
        scatter: (C·(C+1)/2,) float32, upper triangle of the within-key scatter
            Σ_n Σ_{q of key n} (q − μ_n)(q − μ_n)ᵀ, row by row.
        increments: (N_t,) int64, which of the task's increments each key owns.
        threshold: relative distance above which a row is refused (method section 2d), in the
            standardised unit of :mod:`slm.retrieval.scoring`.
    """

    means: Float[Tensor, "N C"]
    counts: Int[Tensor, " N"]
    scatter: Float[Tensor, " P"]
    increments: Int[Tensor, " N"] = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    threshold: float = float("inf")

    @property
    def num_keys(self) -> int:
        """N_t, the number of keys."""
        return self.means.shape[0]

    @property
    def num_channels(self) -> int:
        """C, the channels of a key."""
        return self.means.shape[1]
