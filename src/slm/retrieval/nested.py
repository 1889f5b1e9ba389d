"""Tasks whose rows another task was learned from too (method section 2b).

A second version of a task has most rows of the first. Counted twice, they make Σ as sure of them as of twice
as many, and both versions refuse texts that are not among them. Rows are not kept, but what is kept tells:
if a task of n rows and one of m ≥ n rows of like texts have k rows in common, their mean queries lie

    |μ_a − μ_b|² = g (1/n + 1/m − 2k/(nm))

apart on average, g being the mean squared distance of the larger task's rows from their mean, all under Σ.
Two tasks of like texts without common rows lie farther apart than that, for Σ has seen their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slm.retrieval.background import Background
from slm.retrieval.keys import LoadScatter, TaskKeys, unpack
from slm.retrieval.space import GaussianSpace, fit_space

HELD = 0.6
"""Estimated share of a task's rows, k/n, from which on another holds them (``docs/results/retrieval.md``)."""

_MOST_TIMES = 3
"""How many times its rows a holder may have: the estimate is unsteady beyond, and rows that count twice among
so many do little harm."""

_WIDER = 2.0
"""How many times wider than all rows on average a task's may scatter, to be looked at as a holder."""

_SKETCH = 128
"""Random directions in which the nearest tasks are looked for."""

_CHUNK = 1024


def fit_distinct_space(
    tasks: Sequence[TaskKeys],
    scatter_sum: Float[Tensor, " P"],
    load_scatter: LoadScatter,
    background: Background | None = None,
) -> GaussianSpace:
    """The space of the tasks (:func:`slm.retrieval.space.fit_space`), rows that came twice counted once.

    A task whose rows another holds adds nothing to Σ, to the whole or to the subspace, and each of its keys
    weighs what the holder's nearest key does. The space names the holder of each task.

    Args:
        tasks: keys and statistics of each task; their scatters are not read.
        scatter_sum: (P,) float64, packed sum of the tasks' scatters.
        load_scatter: gives the scatter of a task by its number; only of tasks that hold others' rows or whose
            rows are held.
        background: of texts of all kinds.

    Raises:
        StoreError: a scatter cannot be read.
    """
    space = fit_space(tasks, scatter_sum, background)
    holders = find_holders(tasks, space, load_scatter)
    distinct = [number for number, holder in enumerate(holders) if holder == number]
    if len(distinct) == len(tasks):
        return space
    for number in sorted(set(range(len(tasks))) - set(distinct)):
        scatter_sum = scatter_sum - load_scatter(number)
    space = fit_space([tasks[number] for number in distinct], scatter_sum, background)
    parts = torch.split(space.weights, [tasks[number].num_keys for number in distinct])
    own = dict(zip(distinct, parts, strict=True))
    weights = [
        own[holder]
        if holder == number
        else own[holder][torch.cdist(tasks[number].means, tasks[holder].means).argmin(1)]
        for number, holder in enumerate(holders)
    ]
    return replace(space, weights=torch.cat(weights), holders=torch.tensor(holders))


def find_holders(tasks: Sequence[TaskKeys], space: GaussianSpace, load_scatter: LoadScatter) -> list[int]:
    """For each task the number of the one that holds its rows and is held by none; mostly its own.

    Who holds whom does not depend on the order of tasks. A scatter is read only of a task that would be a
    holder if its rows lay twice as wide as all tasks' on average.

    Args:
        tasks: keys and statistics of each task; their scatters are not read.
        space: fitted to all of them.
        load_scatter: gives the scatter of a task that may be a holder.

    Raises:
        StoreError: a scatter cannot be read.
    """
    holders = list(range(len(tasks)))
    if len(tasks) == 1:
        return holders
    spreads: dict[int, float] = {}
    for small, large in _near_pairs(tasks, space):
        if holders[small] != small:
            continue
        if large not in spreads:
            spreads[large] = spread_of(tasks[large], load_scatter(large), space)
        if held_share(tasks[small], tasks[large], spreads[large], space) >= HELD:
            holders[small] = large
    return [_last(holders, number) for number in range(len(tasks))]


def find_originals(keys: Float[Tensor, "N J"], holders: Int[Tensor, " N"], reach: float) -> Int[Tensor, " N"]:
    """For each key the first of the same holder that lies where it does, (N,) int64; mostly itself.

    Between two versions of the same rows every row is a tie, which rounding would settle anew in each batch.

    Args:
        keys: (N, J) float64, key points, whitened.
        holders: (N,) int64, the task that holds the rows of each key's task.
        reach: distance up to which two keys lie in one place.
    """
    originals = torch.arange(len(keys))
    for holder in (holders.bincount() > 1).nonzero()[:, 0]:
        own = (holders == holder).nonzero()[:, 0]
        away = torch.cdist(keys[own], keys[own], compute_mode="donot_use_mm_for_euclid_dist")
        originals[own] = own[(away <= reach).int().argmax(1)]  # of equal numbers the first
    return originals


def held_share(small: TaskKeys, large: TaskKeys, spread: float, space: GaussianSpace) -> float:
    """The estimate k/n of the share of a task's n rows that a task of m ≥ n rows has too; may be below 0.

    Args:
        small: keys of the task.
        large: keys of the other.
        spread: g of the other.
        space: fitted to both.
    """
    apart = _mean(small) - _mean(large)
    n, m = small.counts.sum().to(torch.float64), large.counts.sum().to(torch.float64)
    return float(_share(apart @ space.inverse @ apart, spread, n, m))


def spread_of(task: TaskKeys, scatter: Float[Tensor, " P"], space: GaussianSpace) -> float:
    """The mean squared distance g of a task's rows from their mean, under Σ."""
    counts, away = task.counts.to(torch.float64), task.means - _mean(task)
    within = (space.inverse * unpack(scatter, task.num_channels)).sum()
    between = (counts * ((away @ space.inverse) * away).sum(1)).sum()
    return float((within + between) / counts.sum())


def _near_pairs(tasks: Sequence[TaskKeys], space: GaussianSpace) -> Iterator[tuple[int, int]]:
    """Tasks of which the second would hold the first if it were so wide, the nearest first."""
    counts = torch.stack([task.counts.sum() for task in tasks]).to(torch.float64)
    means = torch.stack([_mean(task) for task in tasks])
    points, widest = _sketched(means, space), _WIDER * space.spread
    ranks = _ranks(counts, means)
    for start in range(0, len(points), _CHUNK):
        distances = torch.cdist(points[start : start + _CHUNK], points)
        reach = (widest / counts[start : start + _CHUNK, None]).sqrt()  # of one of very many rows
        small, large = (distances <= reach).nonzero().unbind(1)
        squared, n, m = distances[small, large].square(), counts[start + small], counts[large]
        is_larger = ranks[large] > ranks[start + small]
        kept = is_larger & (m <= _MOST_TIMES * n) & (_share(squared, widest, n, m) >= HELD)
        order = squared[kept].argsort()
        yield from zip((start + small[kept])[order].tolist(), large[kept][order].tolist(), strict=True)


def _ranks(counts: Float[Tensor, " t"], means: Float[Tensor, "t C"]) -> Int[Tensor, " t"]:
    """A rank of each task by its number of rows, then by its mean: those of higher rank may hold it."""
    order = means[:, 0].argsort(stable=True)
    order = order[counts[order].argsort(stable=True)]
    return order.argsort()


def _sketched(means: Float[Tensor, "t C"], space: GaussianSpace) -> Float[Tensor, "t A"]:
    """Means whitened by Σ, float32, seen in few random directions where they have many."""
    num_channels = means.shape[1]
    directions = torch.eye(num_channels, dtype=torch.float64)
    if num_channels > _SKETCH:
        draw = torch.Generator().manual_seed(0)
        directions = torch.randn(num_channels, _SKETCH, generator=draw, dtype=torch.float64) / _SKETCH**0.5
    whitening: Tensor = torch.linalg.solve_triangular(space.factor.T, directions, upper=True)
    return ((means - space.centre) @ whitening).to(torch.float32)


def _share(squared: Tensor, spread: float, n: Tensor, m: Tensor) -> Tensor:
    """k/n from |μ_a − μ_b|² = g (1/n + 1/m − 2k/(nm))."""
    least = torch.finfo(torch.float64).tiny  # of a task of equal texts
    return (1 / n + 1 / m - squared / max(spread, least)) * m / 2


def _mean(task: TaskKeys) -> Float[Tensor, " C"]:
    """The mean of all rows of a task, (C,) float64."""
    counts = task.counts.to(torch.float64)
    return (counts / counts.sum()) @ task.means


def _last(holders: Sequence[int], number: int) -> int:
    """Whoever holds the holder, to the end."""
    while holders[number] != number:
        number = holders[number]
    return number
