"""Fitting and thresholds of the gaussian form against slow references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import chi2
from torch.utils.flop_counter import FlopCounterMode

from slm.config import RetrievalConfig
from slm.retrieval.index import all_distances
from slm.retrieval.keys import TaskKeys, learn_keys, shrink, unpack
from slm.retrieval.retriever import Retriever
from slm.retrieval.scoring import GaussianScorer, Scorer, _tails, fit_scorer
from slm.retrieval.space import fit_space

NUM_CHANNELS = 10


def tasks_of(num_tasks: int, num_keys: int = 1, twins: float | None = None) -> list[TaskKeys]:
    """Made-up tasks; with ``twins`` the last one's rows are the first one's, moved by so much."""
    generator = torch.Generator().manual_seed(num_tasks)
    mixing = torch.randn(NUM_CHANNELS, NUM_CHANNELS, generator=generator, dtype=torch.float64)
    rows = [
        3 * torch.randn(NUM_CHANNELS, generator=generator, dtype=torch.float64)
        + torch.randn(60, NUM_CHANNELS, generator=generator, dtype=torch.float64) @ mixing
        for _ in range(num_tasks)
    ]
    if twins is not None:
        rows[-1] = rows[0] + twins
    return [learn_keys(own, torch.arange(60) % num_keys) for own in rows]


def total(tasks: list[TaskKeys]) -> torch.Tensor:
    return sum(task.scatter.double() for task in tasks)


def slow_distances(tasks: list[TaskKeys], queries: torch.Tensor) -> torch.Tensor:
    """Relative distances from a singular value decomposition of all whitened keys."""
    means, counts = torch.cat([t.means for t in tasks]), torch.cat([t.counts for t in tasks]).double()
    covariance, _ = shrink(unpack(total(tasks), NUM_CHANNELS) / counts.sum(), float(counts.sum()))
    factor = torch.linalg.cholesky(covariance)
    centre = (counts[:, None] * means).sum(0) / counts.sum()
    between = (means - centre) * (counts / counts.sum()).sqrt()[:, None]
    white = torch.linalg.solve_triangular(factor, between.T, upper=False)
    directions, singular, _ = torch.linalg.svd(white, full_matrices=False)
    kept = singular > 1e-9
    projection = torch.linalg.solve_triangular(factor.T, directions[:, kept], upper=True)
    y, keys = (queries - centre) @ projection, (means - centre) @ projection
    whole = (y * y / (1 + singular[kept] ** 2)).sum(1, keepdim=True)
    return ((y[:, None] - keys) ** 2).sum(2) - whole


@pytest.mark.parametrize(
    ("num_tasks", "num_keys", "twins"),
    [
        (2, 1, None),
        (5, 1, None),
        (3, 3, None),
        (3, 4, None),
        (12, 5, None),
        (4, 1, 0.0),
        (4, 1, 1e-5),
        (12, 2, 0.0),
    ],
)
def test_the_eigenproblem_gives_the_distances_of_a_singular_value_decomposition(num_tasks, num_keys, twins):
    tasks = tasks_of(num_tasks, num_keys, twins)
    queries = torch.cat([task.means for task in tasks]) + 0.3
    space = fit_space(tasks, total(tasks))
    scorer = GaussianScorer(space, tasks, 0.01, lambda number: tasks[number].scatter)
    points = scorer.points(queries)
    found = scorer.relative_distances(points, all_distances(points, scorer.keys))
    torch.testing.assert_close(found, slow_distances(tasks, queries), atol=1e-8, rtol=1e-8)


def test_the_gaussian_form_is_a_scorer():
    tasks = tasks_of(3, 2)
    scorer = fit_scorer(tasks, total(tasks), 0.01)
    assert isinstance(scorer, Scorer)
    assert scorer.tasks.tolist() == [0, 0, 1, 1, 2, 2]
    assert scorer.keys.shape[0] == 6


def test_only_the_scatters_of_retrieved_tasks_are_read_and_each_once():
    tasks = tasks_of(5)
    bare = [dataclasses.replace(task, scatter=torch.zeros(0)) for task in tasks]
    read: list[int] = []

    def load(number: int) -> torch.Tensor:
        read.append(number)
        return tasks[number].scatter

    config = RetrievalConfig(has_runoff=False)
    lazy = Retriever(bare, total(tasks), config, load)
    assert read == []
    queries = torch.stack([tasks[3].means[0], tasks[1].means[0], tasks[3].means[0]])
    found, eager = lazy(queries), Retriever(tasks, total(tasks), config)(queries)
    assert read == [3, 1]
    lazy(queries)
    assert read == [3, 1]
    assert torch.equal(found.thresholds, eager.thresholds)
    assert torch.equal(found.weights, eager.weights)


def test_a_retriever_that_never_abstains_reads_no_scatter_for_rows_that_one_task_claims():
    tasks = tasks_of(3)

    def load(number: int) -> torch.Tensor:
        raise AssertionError(f"the scatter of task {number} was read")

    found = Retriever(tasks, total(tasks), RetrievalConfig(is_abstaining=False), load)(tasks[1].means)
    assert torch.isinf(found.thresholds).all()
    assert not found.is_abstained.any()


def test_thresholds_keep_the_shape_of_the_key_numbers():
    tasks = tasks_of(3, 2)
    scorer = fit_scorer(tasks, total(tasks), 0.01)
    assert isinstance(scorer, GaussianScorer)
    numbers = torch.tensor([[5, 0, 3], [1, 1, 5]])
    found = scorer.thresholds(numbers)
    assert found.shape == (2, 3)
    assert torch.equal(found.flatten(), scorer.thresholds(torch.arange(6))[numbers.flatten()])


@pytest.mark.parametrize("num_directions", [1, 3, 20])
def test_the_tail_of_a_sum_of_squares_is_chi_squares(num_directions):
    zero, eye = torch.zeros(num_directions).double(), torch.eye(num_directions).double()
    for rate in (0.001, 0.01, 0.3):
        (found,) = _tails(zero[None], zero[None], zero, eye, torch.ones(33).double(), rate)
        assert found == pytest.approx(float(chi2.isf(rate, num_directions)), rel=1e-6)


def test_the_law_lengthens_rows_as_leaving_them_out_does():
    x = torch.randn(14, NUM_CHANNELS, generator=torch.Generator().manual_seed(5)).double()
    x *= 10 ** torch.linspace(0, -2, NUM_CHANNELS)  # little is left to shrinkage
    tasks = [learn_keys(x, torch.zeros(14, dtype=torch.long)), learn_keys(x + 0.1, torch.arange(14) * 0)]
    tasks[1] = dataclasses.replace(tasks[1], counts=torch.tensor([2]), scatter=tasks[1].scatter * 0)
    scorer = fit_scorer(tasks, tasks[0].scatter.double(), 0.01)
    space, key = scorer.space, x.mean(0)
    seen = left = 0.0
    for row in x:
        away = (row - key) * 14 / 13
        rest = space.covariance - (1 - space.rho) / space.num_rows * 13 / 14 * torch.outer(away, away)
        direction = space.covariance @ space.projection[:, 0]
        seen += float(direction @ torch.linalg.solve(space.covariance, row - key)) ** 2 / 14
        left += float(direction @ torch.linalg.solve(rest, away)) ** 2 / 14
    spread = scorer.law(0).spread[0, 0]
    assert left > 1.5 * seen
    assert float(spread) == pytest.approx(left, rel=0.25)


def test_what_all_keys_of_a_task_share_is_computed_once_and_gives_the_same_thresholds():
    draw = torch.Generator().manual_seed(0)
    keys, aways = torch.randn(2, 20, 30, generator=draw, dtype=torch.float64)
    root = torch.randn(30, 30, generator=draw, dtype=torch.float64)
    scales = torch.linspace(0.5, 2, 33, dtype=torch.float64)
    rest = torch.rand(30, generator=draw, dtype=torch.float64), root @ root.T / 30, scales, 0.01
    with FlopCounterMode(display=False) as counter:
        together = _tails(keys, aways, *rest)
    assert counter.get_total_flops() == 2 * 30**3
    assert together == [
        _tails(key[None], away[None], *rest)[0] for key, away in zip(keys, aways, strict=True)
    ]


def test_no_threshold_is_nearer_to_its_key_than_numbers_can_tell_in_the_plain_space_either():
    task = learn_keys(torch.ones(12, 5), torch.zeros(12, dtype=torch.long))
    scorer = fit_scorer([task], task.scatter.double(), 0.01, epsilon=1e-3)
    assert scorer.space.is_plain
    assert scorer.thresholds(torch.tensor([0])).tolist() == pytest.approx([0.64])
