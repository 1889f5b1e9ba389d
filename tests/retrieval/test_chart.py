"""Charts of retrievers: where their own rows fall on paper."""

from __future__ import annotations

import pytest
import torch

from slm.config import RetrievalConfig
from slm.retrieval.chart import ELLIPSE_SHARE, Chart
from slm.retrieval.keys import learn_keys
from slm.retrieval.retriever import Retriever

NUM_CHANNELS = 10


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(num_tasks: int, num_rows: int, seed: int, distance: float = 2.0) -> list[torch.Tensor]:
    """Rows of tasks whose centres and shapes differ; the same tasks for every seed."""
    centres = distance * draw(num_tasks, NUM_CHANNELS, seed=1)
    shapes = [torch.linspace(0.3, 1.6, NUM_CHANNELS).roll(i).double() for i in range(num_tasks)]
    return [
        centre + shape * draw(num_rows, NUM_CHANNELS, seed=100 * seed + i)
        for i, (centre, shape) in enumerate(zip(centres, shapes, strict=True))
    ]


def make(rows: list[torch.Tensor], **settings: object) -> Retriever:
    tasks = [learn_keys(own, torch.zeros(len(own), dtype=torch.int64)) for own in rows]
    scatter_sum = sum(task.scatter.double() for task in tasks)
    return Retriever(tasks, scatter_sum, RetrievalConfig(**settings))


@pytest.mark.parametrize("num_tasks", [3, 6])
def test_an_ellipse_holds_its_share_of_rows_never_seen(num_tasks):
    retriever = make(rows_of(num_tasks, 400, seed=1))
    chart = Chart(retriever)
    outlines = dict(chart.ellipses())
    assert sorted(outlines) == list(range(num_tasks))
    for task, own in enumerate(rows_of(num_tasks, 1500, seed=2)):
        places = torch.tensor(chart.places(own, retriever(own)), dtype=torch.float64)
        corners = torch.tensor(outlines[task], dtype=torch.float64)
        edges = corners.roll(-1, 0) - corners
        away = places[:, None] - corners
        sides = edges[:, 0] * away[..., 1] - edges[:, 1] * away[..., 0]
        inside = float(((sides >= 0).all(1) | (sides <= 0).all(1)).double().mean())
        # Scales reckon with rows unlike the learned ones, so rows drawn alike lie inside a little more often.
        assert ELLIPSE_SHARE - 0.06 < inside < 0.95


def test_one_direction_has_no_ellipses_and_no_reaches():
    chart = Chart(make(rows_of(2, 100, seed=1)))
    assert chart.num_axes == 1
    assert chart.ellipses() == [] == chart.reaches()
    cells, borders = chart.regions()
    assert sorted(cells) == [0, 1]
    assert len(borders) == 1


def test_height_is_the_distance_beyond_the_threshold_where_an_axis_is_wanting():
    rows = rows_of(2, 100, seed=1)
    retriever = make(rows)
    found = retriever(rows[0][:5])
    heights = [y for _, y in Chart(retriever).places(rows[0][:5], found)]
    assert heights == pytest.approx((found.distances[:, 0] - found.thresholds).tolist())


def test_a_query_is_drawn_where_its_owner_is_nearest_when_nothing_is_left_out():
    rows = rows_of(3, 60, seed=1)
    retriever = make(rows)
    chart, queries = Chart(retriever), torch.cat(rows)
    found = retriever(queries)
    assert chart.owners_on_paper(queries) == found.owners[found.nearest].tolist()


def test_a_reach_with_priors_is_the_one_of_rows_that_are_not_refused():
    rows = rows_of(4, 200, seed=1)
    rows[0] = rows[0][:20]
    chart = Chart(make(rows, prior="size"))
    reaches = dict(chart.reaches())
    assert sorted(reaches) == list(range(4))
    retriever = make(rows, prior="size")
    for task, own in enumerate(rows_of(4, 300, seed=2)):
        found = retriever(own)
        is_kept = (found.owners[found.nearest] == task) & ~found.is_abstained & ~found.is_contested
        assert is_kept.sum() > 30
        places = torch.tensor(chart.places(own, found), dtype=torch.float64)[is_kept]
        corners = torch.tensor(reaches[task], dtype=torch.float64)
        edges, away = corners.roll(-1, 0) - corners, places[:, None] - corners
        sides = edges[:, 0] * away[..., 1] - edges[:, 1] * away[..., 0]
        assert bool(((sides >= -1e-6).all(1) | (sides <= 1e-6).all(1)).all())
