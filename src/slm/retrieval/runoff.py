"""Who has a row that two tasks claim: the two nearest again, under a covariance of their own (method 2b).

One covariance for all keys is right on average. Two tasks that look alike to it may differ in a direction in
which both scatter little and the others much, and the more rows they were learned from, the better that
direction is known. So what the two nearest tasks say of a row is taken again under

    Σ_ab = (C·Σ + S_a + S_b) / (C + N_a + N_b),

S and N being the scatter and the rows of each, and the shared Σ counting for as many rows as a query has
channels C. Everything is a sum that the store keeps anyway, so neither the order of arrival nor other tasks
between the two change it.

Versions of a task (:mod:`slm.retrieval.nested`), or tasks of one holder, are no rivals: the nearest of them
runs for all.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slm.retrieval.keys import LoadScatter, TaskKeys, unpack
from slm.retrieval.space import GaussianSpace

CONTESTED = 48.0
"""Difference of relative distances up to which the nearest key of another task contests a row; at the default
temperature a runner-up farther away falls below the default smallest weight."""

_MOST_KEYS = 2048
"""Keys, counted once for each pair of tasks, whose discriminant is kept, C float64 each."""


@final
class Runoff:
    """Decides between two keys of tasks of different holders.

    What two tasks need is computed when a row is first contested between them, from the scatters of both, by
    one factorization of C × C, and kept.

    Args:
        space: fitted to these tasks; says whose rows each of them has.
        tasks: keys and statistics of each task; their scatters are not read here.
        owners: (N,) int64, the task each key belongs to.
        originals: (N,) int64, of keys in one place the first, as :func:`slm.retrieval.nested.find_originals`
            finds them.
        load_scatter: gives a task's scatter.
        log_priors: (N,) float64, log π_n ≤ 0 of each key up to a constant; None is the same for all.

    Attributes:
        most_keys: of all tasks of one holder, the largest number.
    """

    def __init__(
        self,
        space: GaussianSpace,
        tasks: Sequence[TaskKeys],
        owners: Int[Tensor, " N"],
        originals: Int[Tensor, " N"],
        load_scatter: LoadScatter,
        log_priors: Float[Tensor, " N"] | None = None,
    ) -> None:
        self._space, self._tasks, self._owners, self._originals = space, tasks, owners, originals
        self._load_scatter, self._log_priors = load_scatter, log_priors
        self._places = torch.cat([torch.arange(task.num_keys) for task in tasks])
        self._holders = space.holders[owners]
        self._num_keys = self._holders.bincount()
        self.most_keys = int(self._num_keys.max())
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()

    def settle(
        self, queries: Float[Tensor, "B C"], keys: Int[Tensor, "B M"], distances: Float[Tensor, "B M"]
    ) -> tuple[Float[Tensor, "B M"], Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Have the nearest keys of two holders decide between them where both claim a row.

        The winner gets the smaller distance and the loser what it is behind, −2 log-odds of the two; other
        keys of the two holders' tasks move with them, so what lies between versions stays. Rows whose second
        holder is farther than :data:`CONTESTED` behind stay as they are.

        Args:
            queries: (B, C).
            keys: (B, M) key numbers.
            distances: (B, M) float64, relative distances of these keys.

        Returns:
            (B, M) float64, the settled distances; (B,) float64, the smallest change of a difference of
            distances that would bring other keys into the runoff, or call it off or on; and (B,) bool,
            whether there was one.

        Raises:
            StoreError: the statistics of a task cannot be read.
        """
        holders = self._holders[keys]
        first, leader = distances.min(1, keepdim=True)
        is_leading = holders == holders.gather(1, leader)
        others = distances.masked_fill(is_leading, torch.inf)
        second, runner = others.min(1, keepdim=True)
        is_second = holders == holders.gather(1, runner)
        behind = (second - first)[:, 0]
        is_contested = behind < CONTESTED
        third = others.masked_fill(is_second, torch.inf).amin(1)
        changes = torch.minimum(third - second[:, 0], self._lead(keys, distances, is_leading, leader))
        changes = torch.minimum(changes, self._lead(keys, distances, is_second, runner))
        doubts = torch.minimum((behind - CONTESTED).abs(), torch.where(is_contested, changes, torch.inf))
        if not is_contested.any():
            return distances, doubts, is_contested
        rows = is_contested.nonzero()[:, 0]
        first, second = first[rows], second[rows]
        leaders, runners = keys.gather(1, leader)[rows, 0], keys.gather(1, runner)[rows, 0]
        ahead = 2 * self.log_odds(queries.cpu()[rows], leaders, runners)[:, None]
        settled = distances.clone()
        settled[rows] += is_leading[rows] * (-ahead).clamp_min(0.0)
        settled[rows] += is_second[rows] * (first + ahead.clamp_min(0.0) - second)
        return settled, doubts, is_contested

    def _lead(
        self,
        keys: Int[Tensor, "B M"],
        distances: Float[Tensor, "B M"],
        is_own: Bool[Tensor, "B M"],
        ahead: Int[Tensor, "B 1"],
    ) -> Float[Tensor, " B"]:
        """How far the key that runs for a holder is ahead of its next one, which may have other log-odds."""
        originals = self._originals[keys]
        is_next = is_own & (originals != originals.gather(1, ahead))
        return distances.masked_fill(~is_next, torch.inf).amin(1) - distances.gather(1, ahead)[:, 0]

    def least_unseen(
        self, keys: Int[Tensor, "B M"], before: Float[Tensor, "B M"], after: Float[Tensor, "B M"]
    ) -> Float[Tensor, " B"]:
        """What a key that was not found has at least after the runoff, (B,) float64; infinite if all were.

        Minus infinity where all that was found is of two holders: who would run in place of one is not known.

        Args:
            keys: (B, M) key numbers, the M nearest before.
            before: (B, M) float64, their relative distances.
            after: (B, M) float64, the same as :meth:`settle` gives them.
        """
        if keys.shape[1] == len(self._owners):
            return torch.full_like(before[:, 0], torch.inf)
        holders = self._holders[keys]
        winner = holders.gather(1, after.argmin(1, keepdim=True))
        is_whole = (holders == winner).sum(1) == self._num_keys[winner[:, 0]]
        nearer = (after - before).amin(1).clamp_max(0.0)  # the winner's, where it was second
        least = before.amax(1) + torch.where(is_whole, 0.0, nearer)
        num_borders = (holders.sort(1).values.diff(dim=1) != 0).sum(1)
        return torch.where(num_borders > 1, least, -torch.inf)

    def log_odds(
        self, queries: Float[Tensor, "B C"], first: Int[Tensor, " B"], second: Int[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """How much likelier each row's first key is than its second, (B,) float64, in nats.

        (q − (μ_a + μ_b)/2)ᵀ Σ_ab⁻¹ (μ_a − μ_b) + log π_a/π_b, a and b being the two keys: the difference of
        their linear discriminants under Σ_ab.

        Args:
            queries: (B, C).
            first: (B,) key numbers.
            second: (B,) key numbers, of other tasks than ``first``.

        Raises:
            StoreError: the statistics of a task cannot be read.
        """
        centred = queries.to(torch.float64) - self._space.centre
        owners = torch.stack([self._owners[first], self._owners[second]], dim=1)
        pairs, which = torch.unique(owners.sort(dim=1).values, dim=0, return_inverse=True)
        odds = torch.zeros(len(queries), dtype=torch.float64)
        for number, (one, two) in enumerate(pairs.tolist()):
            rows = (which == number).nonzero()[:, 0]
            slopes, offsets = self._discriminants(one, two)
            values = centred[rows] @ slopes.T - offsets
            a, b = (
                self._places[keys[rows]] + (self._owners[keys[rows]] == two) * self._tasks[one].num_keys
                for keys in (first, second)
            )
            odds[rows] = (values.gather(1, a[:, None]) - values.gather(1, b[:, None]))[:, 0]
        return odds if self._log_priors is None else odds + self._log_priors[first] - self._log_priors[second]

    def _discriminants(self, one: int, two: int) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
        """What a row adds up to for the keys of two tasks: slopes z_n = Σ_ab⁻¹ m_n, offsets ½ m_nᵀ z_n.

        Float64, the keys of the first task before those of the second; m_n = μ_n − μ_0.
        """
        with self._lock:
            if (one, two) not in self._known:
                found = self._solve(one, two)
                num_keys = sum(len(offsets) for _, offsets in self._known.values())
                while self._known and num_keys + len(found[1]) > _MOST_KEYS:
                    num_keys -= len(self._known.pop(next(iter(self._known)))[1])
                self._known[one, two] = found
            return self._known[one, two]

    def _solve(self, one: int, two: int) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
        tasks = self._tasks[one], self._tasks[two]
        packed = self._load_scatter(one).to(torch.float64) + self._load_scatter(two)
        num_channels, num_rows = tasks[0].num_channels, sum(float(task.counts.sum()) for task in tasks)
        covariance = unpack(packed, num_channels).add_(self._space.covariance, alpha=num_channels)
        factor = torch.linalg.cholesky(covariance / (num_channels + num_rows))
        means = torch.cat([task.means for task in tasks]) - self._space.centre
        slopes = torch.cholesky_solve(means.T, factor).T.contiguous()
        return slopes, (means * slopes).sum(1) / 2
