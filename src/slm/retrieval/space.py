"""Where queries and keys of the gaussian form lie: the subspace in which keys differ (method section 2b)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.retrieval.background import Background
from slm.retrieval.keys import TaskKeys, shrink, unpack

_TEXT = 0.25
"""Training rows that a text of the background counts for in Σ: less steadies a store of few examples too
little, more widens Σ where there are enough (``docs/log.md``)."""

_SAME = 1e-9
"""Whitened distance between keys below which they count as one place."""

FLAT = 1e-6
"""s_j² below which keys do not differ in a direction, for all that rows can tell."""


@dataclass(frozen=True)
class GaussianSpace:
    """Where queries and keys lie (method section 2b), fitted once per set of tasks.

    Attributes:
        centre: (C,) float64, μ_0, the mean of all rows, the background a part of it.
        covariance: (C, C) float64, Σ, pooled and shrunk.
        factor: (C, C) float64, lower triangle L of Σ = L Lᵀ.
        rho: the weight of its shrinkage.
        num_rows: rows behind Σ.
        weights: (N,) float64, share of each key in the whole; with a background they sum to less than 1.
        holders: (t,) int64, for each task the one that holds its rows (:mod:`slm.retrieval.nested`); mostly
            itself.
        projection: (C, J) float64, W, onto the subspace in which the keys differ.
        shares: (J,) float64, 1 / (1 + s_j²), how much of a squared coordinate the pooled whole explains.
        is_plain: nothing tells the tasks from each other or from a background, so J = C, the distance is
            Mahalanobis's and shares are zero.
    """

    centre: Float[Tensor, " C"]
    covariance: Float[Tensor, "C C"]
    factor: Float[Tensor, "C C"]
    rho: float
    num_rows: float
    weights: Float[Tensor, " N"]
    holders: Int[Tensor, " t"]
    projection: Float[Tensor, "C J"]
    shares: Float[Tensor, " J"]
    is_plain: bool

    @cached_property
    def inverse(self) -> Float[Tensor, "C C"]:
        """Σ⁻¹, (C, C) float64."""
        return torch.cholesky_inverse(self.factor)

    @property
    def spread(self) -> float:
        """Mean squared distance of all rows from their keys, tr(Σ⁻¹ S)/M, from how Σ was shrunk."""
        num_channels, trace = len(self.factor), float(self.covariance.trace())
        if self.rho == 1:
            return float(num_channels)
        return (num_channels - self.rho * trace / num_channels * float(self.inverse.trace())) / (1 - self.rho)

    def points(self, queries: Float[Tensor, "B C"]) -> Float[Tensor, "B J"]:
        """Y = Wᵀ (q − μ_0) of each row, (B, J) float64."""
        return (queries.to(torch.float64) - self.centre) @ self.projection


def fit_space(
    tasks: Sequence[TaskKeys],
    scatter_sum: Float[Tensor, " P"],
    background: Background | None = None,
) -> GaussianSpace:
    """The subspace in which the keys differ, whitened by the pooled covariance (method section 2b).

    The background is one more key there, with the share of one more task, to which no row is ever given: it
    shows in which direction text lies that belongs to none (method section 2d). Its scatter is pooled with
    the tasks', which steadies Σ while they are few and small.

    Args:
        tasks: keys and statistics of each task; their scatters are not read.
        scatter_sum: (P,) float64, packed sum of the tasks' scatters.
        background: of texts of all kinds.
    """
    means = torch.cat([t.means for t in tasks])
    counts = torch.cat([t.counts for t in tasks]).to(torch.float64)
    num_rows, num_keys, num_channels = float(counts.sum()), *means.shape
    shares = counts / num_rows
    scatter = unpack(scatter_sum, num_channels)
    if background is not None:
        means = torch.cat([means, background.mean[None]])
        shares = torch.cat([shares * len(tasks), shares.new_ones(1)]) / (len(tasks) + 1)
        scatter = scatter + _TEXT * unpack(background.scatter, num_channels)
        num_rows += _TEXT * background.num_texts
    covariance, rho = shrink(scatter / num_rows, num_rows)
    factor = torch.linalg.cholesky(covariance)
    centre = (shares[:, None] * means).sum(0)
    directions, squares = _directions(means - centre, shares, factor)
    is_plain = (len(tasks) == 1 and background is None) or not bool((squares > FLAT).any())
    if is_plain:  # no whole to be relative to
        directions = torch.eye(num_channels, dtype=torch.float64)
    return GaussianSpace(
        centre=centre,
        covariance=covariance,
        factor=factor,
        rho=rho,
        num_rows=num_rows,
        weights=shares[:num_keys],
        holders=torch.arange(len(tasks)),
        projection=torch.linalg.solve_triangular(factor.T, directions, upper=True),
        shares=torch.zeros(num_channels, dtype=torch.float64) if is_plain else 1 / (1 + squares),
        is_plain=is_plain,
    )


def _directions(away: Tensor, shares: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions, (C, J), of the keys whitened by L⁻¹, and their s_j², (J,), largest first.

    From a symmetric eigenproblem of size min(C, N): with fewer keys than channels it is solved in an
    orthonormal basis of the span of the keys. A direction in which the keys do not differ is harmless, its
    s_j² being zero to rounding; so none has to be told from it by a tolerance.

    Args:
        away: (N, C) float64, keys minus their mean.
        shares: (N,) float64, share of each key in the whole.
        factor: (C, C) float64, L.
    """
    num_keys, num_channels = away.shape
    if num_keys < num_channels:
        spread = torch.linalg.solve_triangular(factor, (away * shares.sqrt()[:, None]).T, upper=False)
        basis = torch.linalg.qr(spread)[0]
        inside = basis.T @ spread
        scatter = inside @ inside.T
    else:
        half = torch.linalg.solve_triangular(factor, away.T @ (away * shares[:, None]), upper=False)
        scatter = torch.linalg.solve_triangular(factor, half.T, upper=False)
        basis = None
    squares, directions = torch.linalg.eigh((scatter + scatter.T) / 2)
    squares, directions = squares.flip(0), directions.flip(1)
    kept = squares > _SAME**2
    directions = directions[:, kept] if basis is None else basis @ directions[:, kept]
    return directions, squares[kept]
