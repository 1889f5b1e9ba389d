"""The decision of DTKR for each row: which knowledge, how much of it, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slm.config import RetrievalConfig
from slm.retrieval.background import Background
from slm.retrieval.cosine import CosineScorer
from slm.retrieval.index import all_distances, build_index
from slm.retrieval.keys import LoadScatter, TaskKeys
from slm.retrieval.scoring import Scorer, fit_scorer

STRETCHES = {"ends": 1.2}
"""By how much requests lie farther (squared) than any rows left out of the training rows, by pooling: single
words after a deep layer vary more than training rows show (``docs/results/retrieval.md``)."""

Reread = Callable[[int], Tensor]
"""Gives the query of a row of the batch, (C,) float32, as it is when the row is read by itself."""

NUM_CANDIDATES = 32
"""M, the nearest keys a decision looks at: all of them in a store of no more keys, more where one task alone
has as many."""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was decided for each row of a batch, from its M nearest keys, nearest first.

    Attributes:
        tasks: (B, K) int64, the task of each kept key, most similar first.
        increments: (B, K) int64, which of that task's increments the key owns.
        weights: (B, K) float32, w ≥ 0; rows sum to 1, or are all zero when the row abstains.
        candidates: (B, M) int64, numbers of the nearest keys; the first K are the kept ones.
        posterior: (B, M) float32, weights over all candidates before anything was dropped.
        distances: (B, M) float32, relative distance of each candidate (method section 2d), after the runoff.
        thresholds: (B,) float32, largest relative distance of the row's nearest key that is not refused;
            infinite where the retriever never abstains.
        margins: (B,) float32, smallest change of a difference of distances that could make another key the
            nearest, bring others into the runoff, have the row refused or not, or keep or drop another key.
        owners: (N,) int64, the task of each key.
        is_contested: (B,) bool, whether two tasks both claimed the row and a runoff decided.
        is_abstained: (B,) bool, whether the row belongs to no task of the store.
    """

    tasks: Int[Tensor, "B K"]
    increments: Int[Tensor, "B K"]
    weights: Float[Tensor, "B K"]
    candidates: Int[Tensor, "B M"]
    posterior: Float[Tensor, "B M"]
    distances: Float[Tensor, "B M"]
    thresholds: Float[Tensor, " B"]
    margins: Float[Tensor, " B"]
    owners: Int[Tensor, " N"]
    is_contested: Bool[Tensor, " B"]
    is_abstained: Bool[Tensor, " B"]

    @property
    def nearest(self) -> Int[Tensor, " B"]:
        """(B,) int64, the most similar key of each row, abstained or not."""
        return self.candidates[:, 0]


@dataclass(frozen=True, slots=True)
class TaskDistances:
    """Every task of the store as some rows see it; t tasks.

    Attributes:
        distances: (B, t) float32, relative distance of the task's nearest key (method section 2d), after the
            runoff.
        thresholds: (B, t) float32, largest relative distance of that key that is not refused; infinite where
            the retriever never abstains.
        probabilities: (B, t) float32, the task's share in the weights over all keys.
    """

    distances: Float[Tensor, "B t"]
    thresholds: Float[Tensor, "B t"]
    probabilities: Float[Tensor, "B t"]


class Retriever:
    """Decides from queries alone, one row at a time, for a fixed set of tasks.

    Args:
        tasks: keys and statistics of each task, in learning order.
        scatter_sum: (P,) float64, packed sum of the tasks' scatters; the cosine form reads none.
        config: form, K, temperature, smallest weight, abstention (a false-refusal rate of None is 0.01) and
            index.
        load_scatter: gives the scatter of a task by its number when it is first needed; without it the tasks
            carry theirs.
        device: where the exact index computes.
        background: of texts of all kinds; the cosine form has no use for it.
        epsilon: of the numbers that the backbone computes with; decisions are rounded as coarsely.

    Raises:
        ConfigError: the vector index is asked for and FAISS is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[TaskKeys],
        scatter_sum: Float[Tensor, " P"],
        config: RetrievalConfig,
        load_scatter: LoadScatter | None = None,
        device: torch.device | str = "cpu",
        background: Background | None = None,
        epsilon: float = torch.finfo(torch.float32).eps,
    ) -> None:
        self.config = config
        rate = 0.01 if config.false_refusal_rate is None else config.false_refusal_rate
        self.scorer: Scorer
        if config.form == "cosine":
            self.scorer = CosineScorer(tasks, config.cosine.num_groups, rate)
        else:
            has_priors, pooling = config.prior == "size", config.pooling or ""
            stretch = STRETCHES.get(pooling, 1.0) if config.extractor == "backbone" else 1.0
            if stretch != 1.0:
                tasks = [replace(task, scales=task.scales * stretch) for task in tasks]
            self.scorer = fit_scorer(
                tasks,
                scatter_sum,
                rate,
                load_scatter,
                has_priors=has_priors,
                background=background,
                epsilon=epsilon,
            )
        self._runoff = self.scorer.runoff if config.has_runoff else None
        self.index = build_index(self.scorer.keys, config, device)
        self._rounding = self.scorer.rounding * epsilon
        self._num_candidates = max(NUM_CANDIDATES, config.top_k)
        if self._runoff is not None:  # the runner-up is the nearest key of another holder
            self._num_candidates = max(self._num_candidates, 1 + self._runoff.most_keys)

    def __call__(self, queries: Float[Tensor, "B C"], reread: Reread | None = None) -> Retrieved:
        """Retrieve for each row; its result does not depend on the other rows.

        A backbone rounds a row differently in other company. Where a decision is that close, the query read
        from the row by itself decides, so that neighbours change no decision either.

        Args:
            queries: (B, C), read together.
            reread: reads a row by itself; without it the queries are taken as they are.

        Raises:
            StoreError: a threshold needs statistics that the store cannot give.
        """
        retrieved = self._decide(queries)
        if reread is None or len(queries) < 2:
            return retrieved
        close = (retrieved.margins < self._rounding).nonzero().flatten().tolist()
        if not close:
            return retrieved
        alone = self._decide(torch.stack([reread(row) for row in close]))
        found = {field.name: getattr(retrieved, field.name) for field in fields(Retrieved)}
        for name in found.keys() - {"owners"}:
            found[name] = found[name].index_copy(0, torch.tensor(close), getattr(alone, name))
        return Retrieved(**found)

    def _decide(self, queries: Float[Tensor, "B C"]) -> Retrieved:
        scorer, config = self.scorer, self.config
        queries = queries.cpu()
        points = scorer.points(queries)
        candidates, distances, margins, owed, is_contested = self._nearest(queries, points)
        margins = torch.minimum(margins, self._lead(candidates, distances, 0))
        shares = scorer.weigh(distances[:, : config.top_k], config.settled_temperature)
        is_small = shares < config.min_weight
        is_small[:, 0] = False  # of many equal ones the nearest stays
        weights = torch.where(is_small, 0.0, shares)
        weights = weights / weights.sum(1, keepdim=True)
        keys = candidates[:, : config.top_k]
        thresholds = torch.full((len(points),), torch.inf, dtype=torch.float64)
        if config.is_abstaining:
            thresholds = scorer.thresholds(candidates[:, 0]) + owed
        beyond = distances[:, 0] - thresholds
        is_abstained = ~(beyond <= 0)  # a query that is not a number belongs to no task
        mixing = torch.where(is_abstained, torch.inf, self._mixing_margins(candidates, distances, shares))
        margins = torch.minimum(torch.minimum(margins, mixing), beyond.abs())
        return Retrieved(
            tasks=scorer.tasks[keys],
            increments=scorer.increments[keys],
            weights=torch.where(is_abstained[:, None], 0.0, weights).to(torch.float32),
            candidates=candidates,
            posterior=scorer.weigh(distances, config.settled_temperature).to(torch.float32),
            distances=distances.to(torch.float32),
            thresholds=thresholds.to(torch.float32),
            margins=margins.to(torch.float32),
            owners=scorer.tasks,
            is_contested=is_contested,
            is_abstained=is_abstained,
        )

    def _nearest(self, queries: Float[Tensor, "B C"], points: Float[Tensor, "B J"]) -> tuple[Tensor, ...]:
        """The M keys nearest to each row after the runoff, and how it went.

        Where the loser of a runoff fell behind keys that were not found before it, twice as many are looked
        for, until the K first and the next are known, and a third holder is among them.

        Returns:
            (B, M) int64, key numbers, and (B, M) float64, their relative distances, the smallest first; then
            (B,) float64, the runoff's doubts and what the winner is owed; (B,) bool, whether there was one.

        Raises:
            StoreError: the statistics of a task cannot be read.
        """
        num = self._num_candidates
        *found, is_known = self._settled(queries, points, num)
        while num < len(self.scorer.keys) and not bool(is_known.all()):
            num, rows = 2 * num, (~is_known).nonzero()[:, 0]
            again = self._settled(queries[rows], points[rows], num)
            *found, is_known = (
                old.index_copy(0, rows, new) for old, new in zip((*found, is_known), again, strict=True)
            )
        return tuple(found)

    def _settled(
        self, queries: Float[Tensor, "B C"], points: Float[Tensor, "B J"], num: int
    ) -> tuple[Tensor, ...]:
        """What :meth:`_nearest` returns, from a search for so many keys, and whether these suffice."""
        squared, keys = self.index.search(points, num)
        distances = self.scorer.relative_distances(points, squared)
        margins = distances.new_full((len(points),), torch.inf)
        owed, is_contested = margins.new_zeros(len(points)), torch.zeros(len(points), dtype=torch.bool)
        is_known = torch.ones_like(is_contested)
        if self._runoff is not None:
            before = distances
            distances, margins, is_contested = self._runoff.settle(queries, keys, before)
            owed = self._owed(keys, before, distances, is_contested)
            unseen = self._runoff.least_unseen(keys, before, distances)
            distances, order = distances.sort(dim=1, stable=True)
            keys = keys.gather(1, order)
            last = distances[:, min(self.config.top_k, distances.shape[1] - 1)]
            is_known = ~(is_contested & (last > unseen))
        first = slice(self._num_candidates)
        return keys[:, first], distances[:, first], margins, owed, is_contested, is_known

    def _lead(
        self, candidates: Int[Tensor, "B M"], distances: Float[Tensor, "B M"], place: int
    ) -> Float[Tensor, " B"]:
        """How far the key at a place is ahead of the next that lies elsewhere, (B,) float64.

        Of keys that lie in one place, as versions of a task do, the one of smaller number is first whatever
        company a row is read in.

        Args:
            candidates: (B, M) key numbers.
            distances: (B, M) float64, smallest first.
            place: in this order.
        """
        originals = self.scorer.originals[candidates[:, place:]]
        leads = distances[:, place:] - distances[:, place, None]
        return leads.masked_fill(originals == originals[:, :1], torch.inf).amin(1)

    def _mixing_margins(
        self,
        candidates: Int[Tensor, "B M"],
        distances: Float[Tensor, "B M"],
        shares: Float[Tensor, "B K"],
    ) -> Float[Tensor, " B"]:
        """Smallest change of a difference of distances that keeps or drops another key, (B,) float64.

        Which key is the K-th matters only where its share is not dropped anyway.

        Args:
            candidates: (B, M) key numbers.
            distances: (B, M) float64, smallest first.
            shares: (B, K) float64, of the first K, before the small ones are dropped.
        """
        least, num_kept = self.config.min_weight, shares.shape[1]
        margins = distances.new_full((len(distances),), torch.inf)
        if least > 0 and num_kept > 1:
            away = self.scorer.share_margins(distances[:, :num_kept], least, self.config.settled_temperature)
            margins = away[:, 1:].amin(1)
        gap = self._lead(candidates, distances, num_kept - 1)
        return torch.minimum(margins, gap.where(shares[:, -1] >= least, torch.inf))

    def task_distances(self, queries: Float[Tensor, "B C"]) -> TaskDistances:
        """Every task's nearest key, exact for any number of keys; scores all of them, which is slow for many.

        Raises:
            StoreError: a threshold needs statistics that the store cannot give.
        """
        scorer = self.scorer
        points = scorer.points(queries.cpu())
        distances = scorer.relative_distances(points, all_distances(points, scorer.keys))
        owed = torch.zeros(len(points), dtype=torch.float64)
        if self._runoff is not None:
            everyone, before = torch.arange(len(scorer.keys)).expand_as(distances), distances
            distances, _, is_contested = self._runoff.settle(queries, everyone, before)
            owed = self._owed(everyone, before, distances, is_contested)
        owners = scorer.tasks.expand_as(distances)
        num_keys, num_tasks = len(scorer.tasks), int(scorer.tasks[-1]) + 1
        best = distances.new_full((len(points), num_tasks), torch.inf)
        best.scatter_reduce_(1, owners, distances, "amin")
        places = torch.arange(num_keys).where(distances == best.gather(1, owners), num_keys)
        nearest = torch.full((len(points), num_tasks), num_keys).scatter_reduce_(1, owners, places, "amin")
        shares = scorer.weigh(distances, self.config.settled_temperature)
        thresholds = torch.full_like(best, torch.inf)
        if self.config.is_abstaining:
            limits = scorer.thresholds(nearest.clamp_max(num_keys - 1))  # a row that is not a number has none
            thresholds = limits.scatter_add_(1, best.argmin(1, keepdim=True), owed[:, None])
        return TaskDistances(
            distances=best.to(torch.float32),
            thresholds=thresholds.to(torch.float32),
            probabilities=torch.zeros_like(best).scatter_add_(1, owners, shares).to(torch.float32),
        )

    def _owed(
        self,
        keys: Int[Tensor, "B M"],
        before: Float[Tensor, "B M"],
        after: Float[Tensor, "B M"],
        is_contested: Bool[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """What to add to the winner's threshold, (B,) float64, so that priors refuse nothing in a runoff.

        The winner was given a distance that holds another key's −2 log π_n, while its threshold holds its
        own. It is judged by the smallest r without priors, as it is where all keys are equally likely.

        Args:
            keys: (B, M) key numbers.
            before: (B, M) float64, their relative distances.
            after: (B, M) float64, the same after the runoff.
            is_contested: (B,) whether there was one.
        """
        penalties = self.scorer.penalties
        if penalties is None:
            return after.new_zeros(len(after))
        given, winner = after.min(1, keepdim=True)
        judged = (before - penalties[keys]).amin(1)
        return torch.where(is_contested, given[:, 0] - penalties[keys.gather(1, winner)][:, 0] - judged, 0.0)
