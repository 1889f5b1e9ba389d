"""The plane of a map against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial import ConvexHull

from slm.retrieval.cosine import CosineScorer
from slm.retrieval.keys import TaskKeys, learn_keys
from slm.retrieval.plane import bands, choose_plane, nearest_keys, reaches, regions
from slm.retrieval.scoring import GaussianScorer, fit_scorer

NUM_CHANNELS = 8


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(num_tasks: int, num_keys: int = 1) -> GaussianScorer:
    centres = 2 * draw(num_tasks, NUM_CHANNELS, seed=num_tasks)
    rows = [centre + draw(60, NUM_CHANNELS, seed=i) for i, centre in enumerate(centres)]
    tasks = [learn_keys(own, torch.arange(60) % num_keys) for own in rows]
    return fit_scorer(tasks, sum(task.scatter.double() for task in tasks), 0.01)


def cosine(num_tasks: int) -> CosineScorer:
    scales = torch.linspace(0.2, 0.6, 33, dtype=torch.float64)
    tasks = [
        TaskKeys(draw(2, NUM_CHANNELS, seed=i), torch.tensor([5, 5]), torch.zeros(0), torch.arange(2), scales)
        for i in range(num_tasks)
    ]
    return CosineScorer(tasks, 2, 0.05)


def overlap(keys: torch.Tensor, owners: torch.Tensor, axes: torch.Tensor) -> float:
    """What the axes minimise, pair by pair."""
    pairs = [(i, j) for j in range(len(keys)) for i in range(j) if owners[i] != owners[j]]
    whole = torch.stack([((keys[i] - keys[j]) ** 2).sum() for i, j in pairs])
    drawn = torch.stack([((axes.T @ (keys[i] - keys[j])) ** 2).sum() for i, j in pairs])
    return float(torch.logsumexp(-drawn / (whole.median() / 160), 0))


def is_inside(point: torch.Tensor, polygon: torch.Tensor) -> bool:
    """Whether a convex polygon holds a point, which is then on the same side of all its edges."""
    edges, ways = polygon.roll(-1, 0) - polygon, point - polygon
    sides = edges[:, 0] * ways[:, 1] - edges[:, 1] * ways[:, 0]
    return bool((sides >= 0).all() or (sides <= 0).all())


@pytest.mark.parametrize("seed", range(4))
def test_no_plane_through_three_dimensions_tells_keys_apart_better(seed):
    keys, owners = 5 * draw(7, 3, seed=seed), torch.tensor([0, 1, 2, 2, 3, 4, 4])
    plane = choose_plane(keys, owners)
    found = overlap(keys, owners, plane.axes)
    best = math.inf
    for normal in draw(1000, 3, seed=seed + 100):
        axes = torch.linalg.svd(normal[None])[2][1:].T
        best = min(best, overlap(keys, owners, axes))
    assert found <= best + 0.05 * abs(best)


def test_twins_stay_apart_where_the_axes_of_largest_variance_lay_them_together():
    keys = torch.zeros(5, 6, dtype=torch.float64)
    keys[0, 0], keys[1, 0], keys[2, 1], keys[3, 1] = 60, -60, 50, -50
    keys[3, 2], keys[4, 1], keys[4, 2], keys[2, 2] = (
        8,
        -50,
        -8,
        1,
    )  # twins 16 apart, seen along the third direction only
    by_variance = torch.linalg.svd(keys - keys.mean(0))[2][:2].T
    assert float(((keys[3] - keys[4]) @ by_variance).norm()) < 1
    places = choose_plane(keys, torch.arange(5)).places(keys)
    assert float(torch.cdist(places, places)[3, 4]) > 8
    assert float(torch.cdist(places, places)[torch.triu_indices(5, 5, 1).unbind(0)].min()) > 8


def test_the_plane_does_not_depend_on_how_the_space_lies():
    keys, owners = 3 * draw(6, 5, seed=1), torch.tensor([0, 0, 1, 1, 2, 3])
    turn = torch.linalg.qr(draw(5, 5, seed=2))[0]
    one, other = choose_plane(keys, owners), choose_plane(keys @ turn + 7, owners)
    ways = [torch.cdist(p.places(k), p.places(k)) for p, k in ((one, keys), (other, keys @ turn + 7))]
    torch.testing.assert_close(ways[0], ways[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one.axes.T @ one.axes, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(("num_keys", "num_axes"), [(1, 0), (2, 1), (3, 2)])
def test_up_to_three_keys_are_drawn_at_their_true_distances(num_keys, num_axes):
    keys = draw(num_keys, 6, seed=3)
    plane = choose_plane(keys, torch.arange(num_keys))
    assert (plane.axes.shape, plane.num_directions) == ((6, num_axes), num_axes)
    assert plane.drawn_share == pytest.approx(1.0)
    places = plane.places(keys)
    torch.testing.assert_close(
        torch.cdist(places, places) if num_axes else torch.zeros(1, 1).double(), torch.cdist(keys, keys)
    )


def test_keys_in_one_place_have_no_direction():
    plane = choose_plane(torch.ones(3, 4, dtype=torch.float64), torch.arange(3))
    assert (plane.axes.shape, plane.num_directions, plane.drawn_share) == ((4, 0), 0, 1.0)


def test_keys_of_inference_mode_can_be_laid_out():
    with torch.inference_mode():
        keys = draw(6, 5, seed=4)
    assert choose_plane(keys, torch.arange(6)).axes.shape == (5, 2)


def test_of_very_many_keys_evenly_many_choose_the_axes():
    keys = draw(1500, 4, seed=5) * 0.1
    keys[:, :2] += 9 * draw(500, 2, seed=6).repeat_interleave(3, 0)
    plane = choose_plane(keys, torch.arange(500).repeat_interleave(3))
    assert float(plane.axes[:2].norm()) == pytest.approx(2**0.5, abs=0.01)


def test_every_point_lies_in_the_region_of_its_nearest_key_s_task():
    keys, owners = draw(9, 2, seed=7), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4])
    found, borders = regions(keys, owners)
    assert sum(len(cells) for cells in found.values()) == len(keys)
    points = 3 * draw(300, 2, seed=8)
    for point, key in zip(points, nearest_keys(points, keys).tolist(), strict=True):
        task = int(owners[key])
        assert any(is_inside(point, torch.tensor(cell, dtype=torch.float64)) for cell in found[task])
    for ends in borders:
        middle = torch.tensor(ends, dtype=torch.float64).mean(0)
        near = torch.cdist(middle[None], keys)[0].sort()
        assert float(near.values[0]) == pytest.approx(float(near.values[1]), rel=1e-6)
        assert owners[near.indices[0]] != owners[near.indices[1]]


def test_of_keys_in_one_place_the_first_has_the_region():
    keys = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]).double()
    found, _ = regions(keys, torch.tensor([0, 1, 2]))
    assert sorted(found) == [0, 2]
    assert nearest_keys(torch.tensor([[0.1, 0.0]]).double(), keys).tolist() == [0]
    bars, borders = bands(torch.zeros(3).double(), torch.tensor([2, 1, 0]), math.inf)
    assert (list(bars), borders) == ([2], [])


def test_bands_meet_half_way_and_end_at_the_threshold():
    found, borders = bands(torch.tensor([4.0, 0.0, 6.0]).double(), torch.tensor([0, 1, 0]), 0.0)
    assert {x for x, _ in found[1][0]} == {-6e6, 2.0}
    assert [sorted({x for x, _ in cell}) for cell in found[0]] == [[2.0, 5.0], [5.0, 6e6 + 6]]
    assert {y for cells in found.values() for cell in cells for _, y in cell} == {-1e6, 0.0}
    assert [x for x, _ in borders[0]] == [2.0, 2.0]  # none between keys of one task
    assert len(borders) == 1


def test_on_an_outline_the_distance_is_the_threshold_where_the_plane_is_all_there_is():
    scorer = gaussian(3)
    plane = choose_plane(scorer.keys, scorer.tasks)
    outlines = reaches(scorer, plane)
    assert [task for task, _ in outlines] == [0, 1, 2]
    for number, (_, outline) in enumerate(outlines):
        points = torch.tensor(outline, dtype=torch.float64) @ plane.axes.T + plane.origin
        squared = ((points - scorer.keys[number]) ** 2).sum(1, keepdim=True)
        limit = float(scorer.thresholds(torch.tensor([number])))
        wanted = torch.full((len(points), 1), limit, dtype=torch.float64)
        torch.testing.assert_close(scorer.relative_distances(points, squared), wanted)


@pytest.mark.parametrize("scorer", [gaussian(6), gaussian(3, num_keys=3), cosine(3)])
def test_what_a_key_does_not_refuse_is_drawn_inside_its_outline(scorer):
    plane = choose_plane(scorer.keys, scorer.tasks)
    outlines = reaches(scorer, plane)
    assert len(outlines) == len(scorer.keys)
    limits = scorer.thresholds(torch.arange(len(scorer.keys)))
    num_inside = 0
    for number, (_, outline) in enumerate(outlines):
        spread = 0.2 if isinstance(scorer, CosineScorer) else 1.5
        points = scorer.keys[number] + spread * draw(4000, scorer.keys.shape[1], seed=number)
        if isinstance(scorer, CosineScorer):
            points = scorer.points(points)
        squared = ((points - scorer.keys[number]) ** 2).sum(1, keepdim=True)
        is_kept = scorer.relative_distances(points, squared)[:, 0] <= limits[number]
        hull = ConvexHull(torch.tensor(outline, dtype=torch.float64).numpy()).equations
        places = plane.places(points[is_kept]).numpy()
        num_inside += len(places)
        # 72 corners cut off a thousandth of an ellipse's width.
        assert (places @ hull[:, :2].T + hull[:, 2] <= 0.01).all()
    assert num_inside > 1000
