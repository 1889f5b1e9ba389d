"""The gaussian form of DTKR: one covariance shared by all keys, in closed form (method section 2b, 2d).

With the pooled within-key covariance Σ and keys μ_n, the log-density of a query q under key n is
−½ (q − μ_n)ᵀ Σ⁻¹ (q − μ_n) up to a constant, to which log π_n is added where priors
are asked for. Keys differ only inside the subspace spanned by
Σ^{-1/2} (μ_n − μ_0), of at most N − 1 dimensions (N with a background), so everything is computed there:
with the projection y = Wᵀ (q − μ_0) the distances are |y − y_n|² plus a term common to all keys, and the
pooled whole (covariance Σ + B, B the scatter between keys and the background) is as far away as
Σ_j y_j² / (1 + s_j²) plus the same term.

The relative distance of abstention is the difference of the two, so the common term, which grows with
odd or long texts whatever task they belong to, cancels:

    r_n(q) = |y − y_n|² − Σ_j y_j² / (1 + s_j²)

Its threshold is not a stored number. For a row of key n, y = y_n + b_n + e with e ~ √τ · N(0, Y_n), where
Y_n is the task's own scatter in the subspace, τ the task's own spread of lengths, and b_n what the key is
off, being a mean of few rows; r_n is then a quadratic form whose tail is known in closed form. So every
threshold follows from the statistics of the tasks that are in the store *now*: adding or forgetting tasks in
any order ends in the same thresholds. It is computed when a row is first nearest to a key of the task, from
that task's scatter alone, so fitting reads no scatter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.retrieval.background import Background
from slm.retrieval.keys import LoadScatter, TaskKeys, unpack
from slm.retrieval.nested import find_originals, fit_distinct_space
from slm.retrieval.runoff import Runoff
from slm.retrieval.space import FLAT, GaussianSpace


@runtime_checkable
class Scorer(Protocol):
    """What a form of DTKR gives a retriever: a space of points, and how far is too far in it.

    Attributes:
        tasks: (N,) int64, the task each key belongs to; keys of one task follow each other.
        increments: (N,) int64, which of its task's increments each key owns.
        keys: (N, J) float64, the key points, N ≥ 1.
        originals: (N,) int64, of keys in one place, as versions of a task have them, the first.
        rounding: how much a difference of relative distances may change with the company a row is read in, in
            units of the epsilon of the backbone's numbers.
        penalties: (N,) float64, −2 log π_n, the part of each key's relative distances and threshold that is
            its prior's; None without priors.
        runoff: decides between the two nearest tasks where both claim a row; None in a form without.
    """

    rounding: float
    penalties: Float[Tensor, " N"] | None
    runoff: Runoff | None
    tasks: Int[Tensor, " N"]
    increments: Int[Tensor, " N"]
    keys: Float[Tensor, "N J"]
    originals: Int[Tensor, " N"]

    def points(self, queries: Float[Tensor, "B C"]) -> Float[Tensor, "B J"]:
        """Where some queries lie, (B, J) float64, so that the most similar key is the nearest one."""
        ...

    def relative_distances(
        self, points: Float[Tensor, "B J"], squared: Float[Tensor, "B M"]
    ) -> Float[Tensor, "B M"]:
        """What weights and abstention judge, from squared distances to keys.

        Args:
            points: (B, J) float64.
            squared: (B, M) float64, |p − k|². For each row the result grows with it.
        """
        ...

    def thresholds(self, keys: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The largest relative distance that is not refused, float64, of each key number."""
        ...

    def weigh(self, distances: Float[Tensor, "B M"], temperature: float) -> Float[Tensor, "B M"]:
        """How a row is divided among keys at these relative distances, w ≥ 0, rows sum to 1.

        Args:
            distances: (B, M) float64; the smallest gets the largest weight.
            temperature: 1 is the form's own division; smaller sharpens, larger levels.
        """
        ...

    def share_margins(
        self, distances: Float[Tensor, "B K"], share: float, temperature: float
    ) -> Float[Tensor, "B K"]:
        """By how much each distance, the others staying, is off the one that has just this share.

        Args:
            distances: (B, K) float64.
            share: above 0, below 1.
            temperature: as in :meth:`weigh`.
        """
        ...


@dataclass(frozen=True, slots=True)
class RowLaw:
    """How a task's own rows should lie: y = centre + e, e ~ √τ · N(0, spread); A of the J directions.

    Attributes:
        centres: (N_t, A) float64, of the rows of each of its keys.
        spread: (A, A) float64, Y_n.
    """

    centres: Float[Tensor, "N A"]
    spread: Float[Tensor, "A A"]


@final
class GaussianScorer:
    """The gaussian form as a :class:`Scorer`.

    Args:
        space: fitted to these tasks.
        tasks: keys and statistics of each task; their scatters are not read here.
        false_refusal_rate: share of a task's own rows that may be refused.
        load_scatter: gives a task's scatter when its threshold is first needed.
        log_priors: (N,) float64, log π_n ≤ 0 of each key up to a constant; None is the same for all.

    Attributes:
        rounding: above the largest seen (``docs/results/retrieval.md``).
        runoff: between two of these tasks.

    With priors the score is log π_n − ½ |y − y_n|², and points get one more coordinate, 0 for a query and
    √(−2 log π_n) for a key: the nearest key stays the most likely one, so any index serves this too.
    """

    rounding = 640.0

    def __init__(
        self,
        space: GaussianSpace,
        tasks: Sequence[TaskKeys],
        false_refusal_rate: float,
        load_scatter: LoadScatter,
        log_priors: Float[Tensor, " N"] | None = None,
        epsilon: float = torch.finfo(torch.float32).eps,
    ) -> None:
        self.space = space
        self._least_reach = self.rounding * epsilon
        counts = torch.tensor([task.num_keys for task in tasks])
        self.tasks = torch.arange(len(tasks)).repeat_interleave(counts)
        self.increments = torch.cat([task.increments for task in tasks])
        self._means = space.points(torch.cat([task.means for task in tasks]))
        self.penalties = None if log_priors is None else -2 * log_priors
        keys = self._means
        if self.penalties is not None:
            keys = torch.cat([keys, self.penalties.sqrt()[:, None]], dim=1)
        # Of keys this near r differs by less than the company of a row can change it, 2ε|y − y_n|.
        self.originals = find_originals(keys, space.holders[self.tasks], epsilon)
        has_twins = bool((self.originals != torch.arange(len(keys))).any())
        self.keys = keys[self.originals] if has_twins else keys
        self._learned = tasks
        self._first_keys = (counts.cumsum(0) - counts).tolist()
        self._rate = false_refusal_rate
        self._load_scatter = load_scatter
        self._limits: dict[int, list[float]] = {}
        self.runoff: Runoff | None = Runoff(
            space, tasks, self.tasks, self.originals, load_scatter, log_priors
        )

    def points(self, queries: Float[Tensor, "B C"]) -> Float[Tensor, "B J"]:
        """Y = Wᵀ (q − μ_0) of each row, (B, J) float64; with priors a coordinate of zero follows."""
        points = self.space.points(queries)
        return points if self.penalties is None else torch.nn.functional.pad(points, (0, 1))

    def relative_distances(
        self, points: Float[Tensor, "B J"], squared: Float[Tensor, "B M"]
    ) -> Float[Tensor, "B M"]:
        """r_n(q) = |y − y_n|² − Σ_j y_j² / (1 + s_j²) from the first term, (B, M) float64.

        With priors −2 log π_n is part of it, and of the threshold as well: they weigh, but refuse nothing.
        """
        shares = self.space.shares
        inside = points[:, : len(shares)]
        return squared - (inside * inside * shares).sum(1, keepdim=True)

    def thresholds(self, keys: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The largest relative distance that is not refused of each key number, float64.

        Computed once per task, from its scatter.
        """
        found = []
        for key in keys.flatten().tolist():
            task = int(self.tasks[key])
            if task not in self._limits:
                self._limits[task] = self._task_limits(task)
            found.append(self._limits[task][key - self._first_keys[task]])
        limits = torch.tensor(found, dtype=torch.float64).reshape(keys.shape)
        return limits if self.penalties is None else limits + self.penalties[keys]

    def weigh(self, distances: Float[Tensor, "B M"], temperature: float) -> Float[Tensor, "B M"]:
        """Softmax of the log-densities −r_n / 2 over the temperature, (B, M) float64."""
        return (-distances / 2 / temperature).softmax(1)

    def share_margins(
        self, distances: Float[Tensor, "B K"], share: float, temperature: float
    ) -> Float[Tensor, "B K"]:
        """2T · |logit w − logit share| at the temperature T, (B, K) float64."""
        logits = self.weigh(distances, temperature).logit()
        return 2 * temperature * (logits - math.log(share / (1 - share))).abs()

    def _task_limits(self, number: int) -> list[float]:
        """Thresholds of the keys of one task."""
        task, space = self._learned[number], self.space
        if space.is_plain:
            limit = task.radius * float(torch.quantile(task.scales, 1 - self._rate))
            return [max(limit, self._least_reach)] * task.num_keys
        law = self.law(number)
        own = self._means[self._own_keys(number)]
        limits = _tails(own, law.centres - own, space.shares, law.spread, task.scales, self._rate)
        at_keys = -(own * own * space.shares).sum(1)  # r of each key itself
        # Of a task of equal texts the law leaves nothing but the key, and rounding would refuse these texts.
        return [max(h, r + self._least_reach) for h, r in zip(limits, at_keys.tolist(), strict=True)]

    def law(self, number: int, axes: Float[Tensor, "J A"] | None = None) -> RowLaw:
        """How rows of a task that its key was not learned from should lie (method section 2d).

        Σ⁻¹ has seen the task's rows and so is too good to them. Taking one row out stretches its projection
        by a / (1 − a (1−ρ) g / M) (see :func:`slm.retrieval.keys.leave_one_out_distances`), here with the
        mean g of the task's rows and M rows in all.

        A key is a mean of N_n rows, and the subspace has turned towards its error, of squared length
        h = g'/N_n with g' the stretched g. With λ_n the affine function that is 1 at key n and 0 at all
        others and the background (least squares where they are too many), whose gradient is c = w_n y_n / s²
        from the weights w and scatter s² of the whole, the rows lie around y_n − min(h, 1/|c|²) c.

        Args:
            number: of the task.
            axes: (J, A) float64, directions to see it along; None is all of them.

        Raises:
            StoreError: the task's statistics cannot be read.
        """
        space, task = self.space, self._learned[number]
        scatter = unpack(self._load_scatter(number), task.num_channels)
        num_own = float(task.counts.sum())
        a = num_own / max(num_own - task.num_keys, 1.0)
        g = float((space.inverse * scatter).sum()) / num_own
        stretch = a / max(1 - a * (1 - space.rho) * g / space.num_rows, 0.05)
        own = self._own_keys(number)
        keys = self._means[own]
        if not space.is_plain:
            squares = 1 / space.shares - 1
            slopes = space.weights[own, None] * keys / squares
            slopes = torch.where(squares > FLAT, slopes, 0.0)
            errors = g * stretch / task.counts.clamp_min(1)[:, None]
            lengths = (slopes * slopes).sum(1, keepdim=True).clamp_min(1e-300)
            keys = keys - torch.minimum(errors, 1 / lengths) * slopes
        projection = space.projection
        if axes is not None:
            axes = axes[: projection.shape[1]]  # a prior's coordinate is no direction of rows
            projection, keys = projection @ axes, keys @ axes
        return RowLaw(keys, projection.T @ scatter @ projection / num_own * stretch**2)

    def _own_keys(self, number: int) -> slice:
        first = self._first_keys[number]
        return slice(first, first + self._learned[number].num_keys)

    def scales(self, number: int) -> Float[Tensor, " S"]:
        """τ of a task, (S,) float64: equally likely values of how far its rows lie."""
        quantiles = self._learned[number].scales
        return (quantiles[1:] + quantiles[:-1]) / 2

    def shares_of(self, number: int) -> list[float]:
        """The share of a task's rows behind each of its keys."""
        counts = self._learned[number].counts.to(torch.float64)
        return list((counts / counts.sum()).tolist())


def fit_scorer(
    tasks: Sequence[TaskKeys],
    scatter_sum: Float[Tensor, " P"],
    false_refusal_rate: float,
    load_scatter: LoadScatter | None = None,
    *,
    has_priors: bool = False,
    background: Background | None = None,
    epsilon: float = torch.finfo(torch.float32).eps,
) -> GaussianScorer:
    """Fit the scorer to the tasks of a store.

    Args:
        tasks: keys and statistics of each task; without ``load_scatter`` with their scatters.
        scatter_sum: (P,) float64, packed sum of the tasks' scatters.
        false_refusal_rate: share of a task's own rows that may be refused.
        load_scatter: gives the scatter of a task by its number, when it is first needed; now only where a
            task may hold another's rows.
        has_priors: whether π_n is the key's share of all rows, instead of the same for all keys.
        background: of texts of all kinds.
        epsilon: of the numbers that the backbone computes with; no threshold is nearer to its key than they
            can tell.
    """
    load = load_scatter or (lambda i: tasks[i].scatter)
    space = fit_distinct_space(tasks, scatter_sum, load, background)
    log_priors = None
    if has_priors:
        counts = torch.cat([task.counts for task in tasks]).to(torch.float64)
        log_priors = (counts / counts.sum()).log()
    return GaussianScorer(space, tasks, false_refusal_rate, load, log_priors, epsilon)


def _tails(
    keys: Tensor, aways: Tensor, shares: Tensor, spread: Tensor, scales: Tensor, rate: float
) -> list[float]:
    """The value h that r_n of the task's own rows exceeds with probability ``rate``, for each of its keys.

    Given τ, r_n = c + lᵀe + eᵀAe with A = diag(1 − shares), l = 2 (b − shares ∘ (y_n + b)),
    c = |b|² − Σ shares (y_n + b)² and e ~ N(0, τ Y), b being how far the rows lie from their key. Its first
    three cumulants are matched by a shifted gamma distribution; the tail is averaged over the task's
    quantiles of τ and inverted by bisection.
    """
    A = 1 - shares
    AY = A[:, None] * spread
    tr1, tr2, tr3 = AY.trace(), (AY * AY.T).sum(), ((AY @ AY) * AY.T).sum()  # J³, the same for all keys
    tau = (scales[1:] + scales[:-1]) / 2
    found = []
    for key, away in zip(keys, aways, strict=True):
        centre = key + away
        slope = 2 * (away - shares * centre)
        Yl = spread @ slope
        mean = (away * away).sum() - (shares * centre * centre).sum() + tau * tr1
        variance = (tau * (slope @ Yl) + 2 * tau**2 * tr2).clamp_min(1e-12)
        third = 6 * tau**2 * (Yl @ (A * Yl)) + 8 * tau**3 * tr3
        found.append(_exceeded(mean, variance, third, rate))
    return found


def _exceeded(mean: Tensor, variance: Tensor, third: Tensor, rate: float) -> float:
    """What shifted gammas of these cumulants, (S,) each, exceed with probability ``rate`` on average."""
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
