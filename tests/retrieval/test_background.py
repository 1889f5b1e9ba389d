"""Text that belongs to no task: a single task is told from it, and few rows do not make a key too sure."""

from __future__ import annotations

import pytest
import torch

from slm.config import RetrievalConfig
from slm.retrieval.background import background_texts, learn_background
from slm.retrieval.index import all_distances
from slm.retrieval.keys import learn_keys, shrink, unpack
from slm.retrieval.retriever import Retriever
from slm.retrieval.scoring import GaussianScorer, fit_scorer

NUM_CHANNELS = 48


class World:
    """Tasks around centres of their own, and text at large around none of them."""

    def __init__(self, num_rows: int, num_tasks: int = 1, distance: float = 4.0) -> None:
        self._generator = torch.Generator().manual_seed(num_rows)
        self._scales = torch.linspace(3.0, 0.3, NUM_CHANNELS, dtype=torch.float64)
        self.centres = distance * self._draw(num_tasks) / NUM_CHANNELS**0.5 * self._scales
        self.background = learn_background(self.strangers(200))
        self.tasks = [
            learn_keys(self.rows(task, num_rows), torch.zeros(num_rows, dtype=torch.long))
            for task in range(num_tasks)
        ]
        self.total = sum(task.scatter.double() for task in self.tasks)

    def _draw(self, num_rows: int) -> torch.Tensor:
        return torch.randn(num_rows, NUM_CHANNELS, generator=self._generator, dtype=torch.float64)

    def rows(self, task: int, num_rows: int) -> torch.Tensor:
        return self.centres[task] + self._draw(num_rows) * self._scales

    def strangers(self, num_rows: int) -> torch.Tensor:
        return self._draw(num_rows) * self._scales


def refused(retriever: Retriever, queries: torch.Tensor) -> float:
    return float(retriever(queries.float()).is_abstained.double().mean())


def test_the_texts_are_many_different_and_always_the_same():
    texts = background_texts()
    assert len(texts) == len(set(texts)) >= 300
    assert all(text.strip() for text in texts)
    assert texts == background_texts()


def test_a_background_is_a_mean_a_scatter_and_a_number():
    queries = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = learn_background(queries)
    exact = queries.double()
    assert torch.equal(found.mean, exact.mean(0))
    rows, columns = torch.triu_indices(5, 5)
    centred = exact - exact.mean(0)
    torch.testing.assert_close(found.scatter, (centred.T @ centred)[rows, columns].float())
    assert found.num_texts == 20


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_a_store_of_few_tasks_lets_fewer_strangers_in_with_a_background(num_tasks):
    world = World(400, num_tasks, distance=6.0)
    config = RetrievalConfig(false_refusal_rate=0.01)
    bare = Retriever(world.tasks, world.total, config)
    told = Retriever(world.tasks, world.total, config, background=world.background)
    strangers, own = world.strangers(4000), world.rows(0, 4000)
    assert refused(told, strangers) > 0.9
    assert refused(told, strangers) > refused(bare, strangers) + 0.1
    assert refused(told, own) < 0.02
    if num_tasks == 2:
        assert torch.equal(told(own.float()).nearest, bare(own.float()).nearest)


@pytest.mark.parametrize("num_rows", [16, 400])
def test_rows_lie_where_the_law_of_their_task_says_however_few_taught_it(num_rows):
    """Over many draws of the training rows: where new rows lie in the subspace, and how many are refused."""
    offs, shares = [], []
    for draw in range(12):
        world = World(num_rows + draw, 2)
        scorer = fit_scorer(world.tasks, world.total, 0.05, background=world.background)
        new = scorer.points(world.rows(0, 4000))
        law = scorer.law(0)
        away = new.mean(0) - scorer.keys[0]
        offs.append(float(away @ (law.centres[0] - scorer.keys[0])) / float(away @ away))
        relative = scorer.relative_distances(new, ((new - scorer.keys[0]) ** 2).sum(1, keepdim=True))
        limit = scorer.thresholds(torch.tensor([0]))
        shares.append(float((relative[:, 0] > limit).double().mean()))
    assert 0.02 < sum(shares) / 12 < 0.10
    if num_rows == 16:
        assert 0.5 < sum(offs) / 12 < 1.5


def test_a_key_is_off_along_the_function_that_is_one_there_and_zero_at_the_others():
    world = World(40, 3)
    scorer = fit_scorer(world.tasks, world.total, 0.01, background=world.background)
    others = scorer.space.points(world.background.mean[None])
    points = torch.cat([scorer.keys, others])
    planes = torch.linalg.inv(torch.cat([points, torch.ones(4, 1, dtype=torch.float64)], dim=1))
    for task in range(3):
        moved = scorer.law(task).centres[0] - scorer.keys[task]
        slope = planes[:3, task]
        torch.testing.assert_close(moved / moved.norm(), -slope / slope.norm())
        height = float(planes[:, task] @ torch.cat([scorer.keys[task] + moved, torch.ones(1)]))
        assert 0 <= height < 1


def test_a_background_that_is_the_task_itself_tells_nothing():
    world = World(60)
    same = learn_background(world.rows(0, 50))
    plain = type(same)(world.tasks[0].means[0], same.scatter, same.num_texts)
    scorer = fit_scorer(world.tasks, world.total, 0.01, background=plain)
    assert isinstance(scorer, GaussianScorer)
    assert scorer.space.is_plain
    assert torch.isfinite(scorer.thresholds(torch.tensor([0]))).all()


@pytest.mark.parametrize("num_others", [0, 2])
def test_a_task_taught_twice_tightens_no_limit_and_moves_no_distance(num_others):
    world = World(30, 1 + num_others)
    rows = world.rows(0, 30)
    again = learn_keys(rows.flip(0), torch.zeros(30, dtype=torch.long))
    tasks = [learn_keys(rows, torch.zeros(30, dtype=torch.long)), *world.tasks[1:]]
    once = fit_scorer(tasks, sum(t.scatter.double() for t in tasks), 0.01, background=world.background)
    tasks = [*tasks, again]
    twice = fit_scorer(tasks, sum(t.scatter.double() for t in tasks), 0.01, background=world.background)
    limits = twice.thresholds(torch.arange(len(tasks)))
    torch.testing.assert_close(
        limits[:-1], once.thresholds(torch.arange(len(tasks) - 1)), rtol=1e-4, atol=1e-4
    )
    assert float(limits[-1]) == pytest.approx(float(limits[0]), rel=0.1)  # its τ by other parts of the rows
    new = world.rows(0, 50)
    assert twice.space.num_rows == once.space.num_rows
    one, two = (
        s.relative_distances(s.points(new), all_distances(s.points(new), s.keys))[:, 0] for s in (once, twice)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_a_task_of_equal_texts_lets_that_text_in():
    world = World(60, 3)
    text = world.rows(0, 1)
    tasks = [learn_keys(text.repeat(50, 1), torch.zeros(50, dtype=torch.long)), *world.tasks[1:]]
    total = sum(t.scatter.double() for t in tasks)
    retriever = Retriever(tasks, total, RetrievalConfig(), background=world.background)
    noise = torch.randn(200, NUM_CHANNELS, generator=torch.Generator().manual_seed(0)) * 1e-7
    assert refused(retriever, text * (1 + noise)) == 0
    found = retriever(torch.cat([world.rows(0, 200), world.strangers(200)]).float())
    assert int((found.nearest == 0).sum()) > 20
    assert found.is_abstained[found.nearest == 0].all()


def test_a_text_of_the_background_counts_for_a_quarter_of_a_row():
    world = World(60, 2)
    space = fit_scorer(world.tasks, world.total, 0.01, background=world.background).space
    scatter = unpack(world.total, NUM_CHANNELS) + unpack(world.background.scatter, NUM_CHANNELS) / 4
    assert space.num_rows == 120 + 200 / 4
    torch.testing.assert_close(space.covariance, shrink(scatter / 170, 170.0)[0])
