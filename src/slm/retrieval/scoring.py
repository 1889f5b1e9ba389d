"""The gaussian form of DTKR: one covariance shared by all keys, in closed form (method section 2b, 2d).

With the pooled within-key covariance Σ and keys μ_n, the log-density of a query q under key n is
−½ (q − μ_n)ᵀ Σ⁻¹ (q − μ_n) up to a constant. Keys differ only inside the subspace spanned by
Σ^{-1/2} (μ_n − μ_0), of at most N − 1 dimensions, so everything is computed there: with the projection
y = Wᵀ (q − μ_0) the distances are |y − y_n|² plus a term common to all keys, and the pooled whole
(covariance Σ + B, B the scatter between keys) is as far away as Σ_j y_j² / (1 + s_j²) plus the same term.

The relative distance of abstention is the difference of the two, so the common term, which grows with
odd or long texts whatever task they belong to, cancels:

    r_n(q) = |y − y_n|² − Σ_j y_j² / (1 + s_j²)

Its threshold is not a stored number. For a row of key n, y = y_n + e with e ~ √τ · N(0, Y_n), where Y_n is
the task's own scatter in the subspace and τ the task's own spread of lengths; r_n is then a quadratic form
whose tail is known in closed form. So every threshold follows from the statistics of the tasks that are in
the store *now*: adding or forgetting tasks in any order ends in the same thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.retrieval.keys import TaskKeys, shrink, unpack

_SAME = 1e-9
"""Whitened distance between keys below which they count as one place."""


@dataclass(frozen=True, slots=True)
class GaussianScorer:
    """Everything a decision needs, fitted once per set of tasks.

    Attributes:
        tasks: (N,) int64, the task each key belongs to.
        increments: (N,) int64, which of its task's increments each key owns.
        centre: (C,) float64, μ_0, the mean of all rows.
        projection: (C, J) float64, W, onto the subspace in which the keys differ.
        keys: (N, J) float64, y_n.
        shares: (J,) float64, 1 / (1 + s_j²), how much of a squared coordinate the pooled whole explains.
        thresholds: (N,) float64, the largest relative distance that is not refused.
    """

    tasks: Int[Tensor, " N"]
    increments: Int[Tensor, " N"]
    centre: Float[Tensor, " C"]
    projection: Float[Tensor, "C J"]
    keys: Float[Tensor, "N J"]
    shares: Float[Tensor, " J"]
    thresholds: Float[Tensor, " N"]

    def relative_distances(self, queries: Float[Tensor, "B C"]) -> Float[Tensor, "B N"]:
        """r_n(q) for every key; the log-density under key n is −r_n / 2 up to a constant of the row."""
        y = (queries.to(torch.float64) - self.centre) @ self.projection
        # Written out rather than torch.cdist: exact for a row whatever its neighbours are.
        squares = (y * y * (1 - self.shares)).sum(1, keepdim=True)
        return squares - 2 * y @ self.keys.T + (self.keys * self.keys).sum(1)


def fit_scorer(
    tasks: Sequence[TaskKeys], scatter_sum: Float[Tensor, " P"], false_refusal_rate: float
) -> GaussianScorer:
    """Fit the scorer to the tasks of a store.

    Args:
        tasks: keys and statistics of each task.
        scatter_sum: (P,) float64, packed sum of the tasks' scatters.
        false_refusal_rate: share of a task's own rows that may be refused.
    """
    means = torch.cat([t.means for t in tasks])
    counts = torch.cat([t.counts for t in tasks]).to(torch.float64)
    num_rows, num_channels = float(counts.sum()), means.shape[1]
    covariance, rho = shrink(unpack(scatter_sum, num_channels) / num_rows, num_rows)
    factor = torch.linalg.cholesky(covariance)
    centre = (counts[:, None] * means).sum(0) / num_rows
    between = (means - centre) * (counts / num_rows).sqrt()[:, None]
    directions, singular, _ = torch.linalg.svd(
        torch.linalg.solve_triangular(factor, between.T, upper=False), full_matrices=False
    )
    kept = singular > _SAME
    if len(tasks) == 1 or not kept.any():
        return _plain(tasks, centre, factor, false_refusal_rate)
    projection = torch.linalg.solve_triangular(factor.T, directions[:, kept], upper=True)
    keys = (means - centre) @ projection
    shares = 1 / (1 + singular[kept] ** 2)
    inverse = torch.cholesky_inverse(factor)
    thresholds = []
    for task in tasks:
        spread = _own_spread(task, projection, inverse, rho, num_rows)
        own = (task.means - centre) @ projection
        thresholds += [_tail(key, shares, spread, task.scales, false_refusal_rate) for key in own]
    return GaussianScorer(
        tasks=_owners(tasks),
        increments=torch.cat([t.increments for t in tasks]),
        centre=centre,
        projection=projection,
        keys=keys,
        shares=shares,
        thresholds=torch.tensor(thresholds, dtype=torch.float64),
    )


def _owners(tasks: Sequence[TaskKeys]) -> Tensor:
    """(N,) int64, the task of each key."""
    return torch.cat([torch.full((task.num_keys,), i) for i, task in enumerate(tasks)])


def _plain(tasks: Sequence[TaskKeys], centre: Tensor, factor: Tensor, rate: float) -> GaussianScorer:
    """One task, or tasks nothing tells apart: no whole to be relative to, so plain Mahalanobis distances."""
    eye = torch.eye(len(centre), dtype=torch.float64)
    projection = torch.linalg.solve_triangular(factor.T, eye, upper=True)
    limits = [task.radius * float(torch.quantile(task.scales, 1 - rate)) for task in tasks]
    owners = _owners(tasks)
    return GaussianScorer(
        tasks=owners,
        increments=torch.cat([t.increments for t in tasks]),
        centre=centre,
        projection=projection,
        keys=(torch.cat([t.means for t in tasks]) - centre) @ projection,
        shares=torch.zeros(len(centre), dtype=torch.float64),
        thresholds=torch.tensor(limits, dtype=torch.float64)[owners],
    )


def _own_spread(task: TaskKeys, projection: Tensor, inverse: Tensor, rho: float, num_rows: float) -> Tensor:
    """Y_n, (J, J): the task's own covariance in the subspace, as rows it was not fitted on would show it.

    Σ⁻¹ has seen the task's rows and so is too good to them. Taking one row out stretches its projection by
    a / (1 − a (1−ρ) g / N) (see :func:`slm.retrieval.keys.leave_one_out_distances`), here with the mean g.
    """
    scatter = unpack(task.scatter, task.num_channels)
    num_own = float(task.counts.sum())
    a = num_own / max(num_own - task.num_keys, 1.0)
    g = float((inverse * scatter).sum()) / num_own
    stretch = a / max(1 - a * (1 - rho) * g / num_rows, 0.05)
    return projection.T @ scatter @ projection / num_own * stretch**2


def _tail(key: Tensor, shares: Tensor, spread: Tensor, scales: Tensor, rate: float) -> float:
    """The value h that r_n of the task's own rows exceeds with probability ``rate``.

    Given τ, r_n = c + lᵀe + eᵀAe with A = diag(1 − shares), l = −2 shares ∘ y_n, c = −Σ shares y_n² and
    e ~ N(0, τ Y). Its first three cumulants are matched by a shifted gamma distribution; the tail is averaged
    over the task's quantiles of τ and inverted by bisection.
    """
    A, slope = 1 - shares, -2 * shares * key
    AY = A[:, None] * spread
    Yl = spread @ slope
    tr1, tr2, tr3 = AY.trace(), (AY * AY.T).sum(), ((AY @ AY) * AY.T).sum()
    tau = (scales[1:] + scales[:-1]) / 2
    mean = -(shares * key * key).sum() + tau * tr1
    variance = (tau * (slope @ Yl) + 2 * tau**2 * tr2).clamp_min(1e-12)
    third = 6 * tau**2 * (Yl @ (A * Yl)) + 8 * tau**3 * tr3
    shape = 4 * variance**3 / (third**2).clamp_min(1e-24)

    def exceeds(h: float) -> float:
        z = (h - mean) / variance.sqrt()
        gamma = torch.special.gammaincc(shape, (shape + z * shape.sqrt()).clamp_min(0.0))
        normal = torch.special.ndtr(-z)
        return float(torch.where(shape < 1e6, gamma, normal).mean())

    low, high = float(mean.min()), float((mean + variance.sqrt()).max())
    while exceeds(high) > rate:
        high += high - low + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) > rate else (low, middle)
    return high
