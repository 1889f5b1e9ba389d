"""What a retriever knows, on paper: places of keys and queries, regions, and where own rows should lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from slm.retrieval.plane import Place, Polygon, bands, choose_plane, nearest_keys, reaches, regions
from slm.retrieval.retriever import Retrieved, Retriever
from slm.retrieval.scoring import GaussianScorer

ELLIPSE_SHARE = 0.8
"""Share of a key's own rows that its ellipse is expected to hold on paper."""
_NUM_CORNERS = 48
"""Corners of an ellipse."""


@final
class Chart:
    """The plane of one retriever, and what lies in it.

    With two axes a place is a projection of the point that is searched. Where keys differ in one direction
    only, a place's height is the distance beyond the threshold of the nearest key (above 0 is refused), or
    the plain distance where the retriever never abstains; where they do not differ at all, x is a number
    given to the row.

    Args:
        retriever: decides among the tasks.
        middle: where keys stand among the rows' numbers, where keys do not differ.

    Attributes:
        plane: the axes, and what they leave out.
        num_axes: 0 to 2.
    """

    def __init__(self, retriever: Retriever, middle: float = 1.0) -> None:
        self._retriever, self._middle = retriever, middle
        scorer = retriever.scorer
        self.plane = choose_plane(scorer.keys, scorer.tasks)
        self.num_axes = self.plane.axes.shape[1]
        self._places = self.plane.places(scorer.keys)

    @cached_property
    def limits(self) -> list[float]:
        """Threshold of each key; infinite where the retriever never abstains. Reads every task's scatter."""
        numbers = torch.arange(len(self._retriever.scorer.keys))
        if not self._retriever.config.is_abstaining:
            return [math.inf] * len(numbers)
        return list(self._retriever.scorer.thresholds(numbers).tolist())

    @cached_property
    def key_places(self) -> list[Place]:
        """Where each key is drawn."""
        scorer = self._retriever.scorer
        if self.num_axes == 2:
            return [(x, y) for x, y in self._places.tolist()]
        at_keys = scorer.relative_distances(
            scorer.keys, torch.zeros(len(scorer.keys), 1, dtype=torch.float64)
        )
        numbers = [self._middle] * len(scorer.keys)
        return self._upright(self._places, at_keys[:, 0].tolist(), self.limits, numbers)

    def places(self, queries: Float[Tensor, "B C"], found: Retrieved) -> list[Place]:
        """Where some queries are drawn.

        Args:
            queries: (B, C), rows of numbers 1 to B.
            found: what the retriever decided for them.
        """
        points = self.plane.places(self._retriever.scorer.points(queries.cpu()))
        if self.num_axes == 2:
            return [(x, y) for x, y in points.tolist()]
        numbers = [float(number) for number in range(1, len(points) + 1)]
        return self._upright(points, found.distances[:, 0].tolist(), found.thresholds.tolist(), numbers)

    def owners_on_paper(self, queries: Float[Tensor, "B C"]) -> list[int]:
        """The task in whose region each query is drawn."""
        scorer = self._retriever.scorer
        places = self.plane.places(scorer.points(queries.cpu()))
        return list(scorer.tasks[nearest_keys(places, self._places)].tolist())

    def regions(self) -> tuple[dict[int, list[Polygon]], list[Polygon]]:
        """Task -> where it has the nearest key on paper; and the lines between different tasks."""
        owners = self._retriever.scorer.tasks
        if self.num_axes == 2:
            found, borders = regions(self._places, owners)
        else:
            line = self._places[:, 0] if self.num_axes else torch.zeros(len(owners), dtype=torch.float64)
            found, borders = bands(line, owners, 0.0 if self._retriever.config.is_abstaining else math.inf)
        return {task: found[task] for task in sorted(found)}, borders

    def reaches(self) -> list[tuple[int, Polygon]]:
        """Task and outline beyond which each key refuses; of two axes and a retriever that abstains only."""
        if self.num_axes < 2 or not self._retriever.config.is_abstaining:
            return []
        return reaches(self._retriever.scorer, self.plane)

    def ellipses(self) -> list[tuple[int, Polygon]]:
        """Task and outline around each key that holds :data:`ELLIPSE_SHARE` of its own rows on paper.

        A row is y_n + b_n + e with e ~ √τ · N(0, Y_n) (method section 2d), so on paper e has the covariance
        τ Vᵀ Y_n V, and |e|² in units of Vᵀ Y_n V exceeds R with probability mean_τ exp(−R / 2τ). Of two axes
        and the gaussian form only; the other keeps no scatter.
        """
        scorer, axes = self._retriever.scorer, self.plane.axes
        if self.num_axes < 2 or not isinstance(scorer, GaussianScorer):
            return []
        turns = torch.linspace(0, 2 * math.pi, _NUM_CORNERS + 1, dtype=torch.float64)[:-1]
        circle = torch.stack([turns.cos(), turns.sin()], 1)
        origin = self.plane.origin @ axes
        found = []
        for task in range(int(scorer.tasks[-1]) + 1):
            law = scorer.law(task, axes)
            values, directions = torch.linalg.eigh(law.spread)
            root = directions * values.clamp_min(0.0).sqrt()
            shape = circle @ root.T * math.sqrt(_radius(scorer.scales(task)))
            found += [(task, tuple(map(tuple, (centre - origin + shape).tolist()))) for centre in law.centres]
        return found

    def _upright(
        self, places: Tensor, distances: Sequence[float], limits: Sequence[float], numbers: Sequence[float]
    ) -> list[Place]:
        """Places whose height says how far beyond the threshold they are, as an axis is wanting."""
        heights = [
            distance - limit if self._retriever.config.is_abstaining else distance
            for distance, limit in zip(distances, limits, strict=True)
        ]
        return list(zip(places[:, 0].tolist() if self.num_axes else numbers, heights, strict=True))


def _radius(scales: Float[Tensor, " S"]) -> float:
    """R with mean_τ exp(−R / 2τ) = 1 − :data:`ELLIPSE_SHARE`, by bisection."""
    scales = scales.clamp_min(1e-12)
    low, high = 0.0, 2 * float(scales.max()) * math.log(1 / (1 - ELLIPSE_SHARE))
    for _ in range(60):
        middle = (low + high) / 2
        outside = float((-middle / (2 * scales)).exp().mean())
        low, high = (middle, high) if outside > 1 - ELLIPSE_SHARE else (low, middle)
    return high
