"""Keys: closed forms against slow references."""

from __future__ import annotations

import pytest
import torch
from sklearn.covariance import OAS

from slm.config import RetrievalConfig
from slm.errors import DataError
from slm.retrieval.background import learn_background
from slm.retrieval.keys import (
    cluster,
    join_single,
    learn_keys,
    leave_one_out_distances,
    left_part_out_distances,
    most_keys,
    pack,
    shrink,
    unpack,
)
from slm.retrieval.retriever import Retriever


def some_queries(num_rows: int = 40, num_channels: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_channels, num_channels, generator=generator)
    return torch.randn(num_rows, num_channels, generator=generator) @ mixing + 3


def test_means_counts_and_scatter_are_those_of_a_loop_over_rows():
    queries = some_queries()
    assignments = torch.arange(40) % 3
    keys = learn_keys(queries, assignments)
    scatter = torch.zeros(6, 6, dtype=torch.float64)
    for n in range(3):
        own = queries[assignments == n].double()
        torch.testing.assert_close(keys.means[n], own.mean(0))
        assert keys.counts[n] == len(own)
        for row in own:
            scatter += torch.outer(row - own.mean(0), row - own.mean(0))
    torch.testing.assert_close(unpack(keys.scatter, 6), scatter, atol=1e-3, rtol=1e-5)


def test_shrinkage_agrees_with_scikit_learn():
    x = some_queries().double()
    centred = x - x.mean(0)
    reference = OAS(assume_centered=True).fit(centred.numpy())
    found, rho = shrink(centred.T @ centred / len(x), float(len(x)))
    # scikit-learn leaves out a term of order 1/C of the paper's equation 23.
    assert rho == pytest.approx(reference.shrinkage_, rel=0.35)
    assert found.trace() == pytest.approx(float((centred**2).sum() / len(x)))
    again = OAS(assume_centered=True).fit(centred.numpy())
    torch.testing.assert_close(
        (1 - again.shrinkage_) * (centred.T @ centred / len(x))
        + again.shrinkage_ * found.trace() / 6 * torch.eye(6),
        torch.from_numpy(reference.covariance_),
    )


def test_leave_one_out_distances_are_those_of_really_leaving_each_row_out():
    x = some_queries(30, 4).double()
    centred = x - x.mean(0)
    scatter = centred.T @ centred
    fast = leave_one_out_distances(centred, scatter, torch.full((30,), 30))
    covariance, rho = shrink(scatter / 30, 30.0)
    ridge = covariance - (1 - rho) * scatter / 30
    for i in range(30):
        rest = torch.cat([x[:i], x[i + 1 :]])
        rest_scatter = (rest - rest.mean(0)).T @ (rest - rest.mean(0))
        away = x[i] - rest.mean(0)
        slow = away @ torch.linalg.solve((1 - rho) * rest_scatter / 30 + ridge, away)
        assert float(fast[i]) == pytest.approx(float(slow), rel=1e-6)


def test_packing_keeps_a_symmetric_matrix():
    x = some_queries().double()
    matrix = x.T @ x
    assert torch.equal(unpack(pack(matrix), 6), matrix)


def test_a_query_that_is_not_finite_is_named_by_its_row():
    queries = some_queries()
    queries[4, 2] = float("nan")
    with pytest.raises(
        DataError, match=r"^the query of training row 5 is not finite: the backbone overflows"
    ):
        learn_keys(queries, torch.zeros(40, dtype=torch.long))


def test_identical_rows_give_usable_keys():
    keys = learn_keys(torch.ones(12, 5), torch.zeros(12, dtype=torch.long))
    assert torch.isfinite(keys.scales).all()
    assert keys.radius >= 0


def test_clusters_are_found_and_never_more_than_distinct_rows():
    far = torch.cat([torch.randn(10, 3), torch.randn(10, 3) + 50])
    assignments = cluster(far, 2, seed=0)
    assert len(set(assignments[:10].tolist())) == len(set(assignments[10:].tolist())) == 1
    assert assignments[0] != assignments[10]
    assert cluster(torch.ones(8, 3), 4, seed=0).tolist() == [0] * 8


@pytest.mark.parametrize("num_rows", [10.0, 40.0, 400.0])
def test_shrinkage_is_equation_23_of_chen_and_others(num_rows):
    x = some_queries().double()
    covariance = x.T @ x / len(x)
    trace, square = covariance.trace(), (covariance @ covariance).trace()
    above = (1 - 2 / 6) * square + trace**2
    below = (num_rows + 1 - 2 / 6) * (square - trace**2 / 6)
    found, rho = shrink(covariance, num_rows)
    assert rho == pytest.approx(min(1.0, float(above / below)), rel=1e-12)
    torch.testing.assert_close(found, (1 - rho) * covariance + rho * trace / 6 * torch.eye(6))


@pytest.mark.parametrize(("num_each", "is_measured"), [(3, False), (4, True)])
def test_a_part_is_measured_against_eight_rows_and_no_fewer(num_each, is_measured):
    rows = some_queries(3 * num_each).double() + 100 * torch.arange(3).repeat_interleave(num_each)[:, None]
    fallback = torch.full((len(rows),), -1.0, dtype=torch.float64)
    found = left_part_out_distances(rows, torch.zeros(len(rows), dtype=torch.long), fallback)
    assert bool((found >= 0).all()) == bool((found >= 0).any()) == is_measured


def test_keys_of_a_single_row_become_one():
    labels = torch.tensor([0, 1, 1, 2, 3, 3, 2, 4])
    assert join_single(labels, range(8)).tolist() == [3, 0, 0, 1, 2, 2, 1, 3]
    # The first prompt of label 3 stands twice, so of its rows one counts.
    assert join_single(labels, [0, 1, 2, 3, 4, 6, 7]).tolist() == [2, 0, 0, 1, 2, 2, 1, 2]
    assert join_single(torch.arange(4), range(4)).tolist() == [0, 0, 0, 0]
    assert join_single(labels[1:7] - 1, range(6)).tolist() == (labels[1:7] - 1).tolist()


def test_there_are_no_more_keys_than_rows_suffice_for():
    wanted = [(1, 1), (1, 500), (3, 23), (3, 24), (4, 7), (1000, 100)]
    assert [most_keys(num_keys, num_rows) for num_keys, num_rows in wanted] == [1, 1, 2, 3, 1, 12]


@pytest.mark.parametrize("num_each", [1, 2])
def test_a_task_of_few_rows_a_label_does_not_refuse_all_but_these(num_each):
    draw = torch.Generator().manual_seed(0)
    background = learn_background(2 * torch.randn(320, 24, generator=draw))
    rows, labels = 4 + torch.randn(16 * num_each, 24, generator=draw), torch.arange(16).repeat(num_each)
    requests, strangers = 4 + torch.randn(500, 24, generator=draw), 2 * torch.randn(500, 24, generator=draw)

    def refused(assignments: torch.Tensor, queries: torch.Tensor) -> float:
        task = learn_keys(rows, assignments)
        retriever = Retriever([task], task.scatter.double(), RetrievalConfig(), background=background)
        return float(retriever(queries).is_abstained.double().mean())

    assigned = join_single(labels, range(len(labels)))
    assert refused(assigned, requests) < 0.1
    assert refused(assigned, strangers) > 0.9
    if num_each == 1:
        assert refused(labels, requests) == 1.0
