"""Tasks whose rows another task has too, and what happens to both."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slm.config import RetrievalConfig
from slm.retrieval.keys import TaskKeys, learn_keys
from slm.retrieval.nested import find_holders, find_originals, fit_distinct_space, spread_of
from slm.retrieval.retriever import Retriever
from slm.retrieval.space import fit_space

NUM_CHANNELS = 256


def rows_of(topic: int, num_rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of one distribution, (num_rows, C); a larger number of rows begins with the same ones."""
    draw = torch.Generator().manual_seed(topic)
    centre = 2 * torch.randn(NUM_CHANNELS, generator=draw)
    mixing = torch.randn(NUM_CHANNELS, NUM_CHANNELS, generator=torch.Generator().manual_seed(99))
    noise = torch.stack(
        [
            torch.randn(
                NUM_CHANNELS,
                generator=torch.Generator().manual_seed(10_000 * (topic + 1) + 1_000_000 * seed + i),
            )
            for i in range(num_rows)
        ]
    )
    return centre + noise @ mixing / NUM_CHANNELS**0.5


def task_of(rows: torch.Tensor, num_keys: int = 1) -> TaskKeys:
    return learn_keys(rows, torch.arange(len(rows)) % num_keys)


def total(tasks: list[TaskKeys]) -> torch.Tensor:
    return torch.stack([task.scatter for task in tasks]).double().sum(0)


def holders_of(tasks: list[TaskKeys]) -> list[int]:
    return find_holders(tasks, fit_space(tasks, total(tasks)), lambda number: tasks[number].scatter)


def share_refused(tasks: list[TaskKeys], queries: torch.Tensor) -> float:
    retriever = Retriever(tasks, total(tasks), RetrievalConfig().settled(has_words=False))
    return float(retriever(queries).is_abstained.float().mean())


ALL = rows_of(0, 400)
OTHER = task_of(rows_of(1, 100))


@pytest.mark.parametrize("num_keys", [1, 3])
@pytest.mark.parametrize(("n", "m"), [(12, 18), (60, 90), (100, 110), (100, 150), (100, 300), (200, 250)])
def test_a_task_that_has_all_rows_of_another_holds_it(n, m, num_keys):
    small, large = task_of(ALL[:n], num_keys), task_of(ALL[:m], num_keys)
    assert holders_of([small, OTHER, large]) == [2, 1, 2]
    assert holders_of([large, small, OTHER]) == [0, 0, 2]


def test_a_holder_may_have_rows_of_another_kind_too():
    both = torch.cat([ALL[:100], rows_of(0, 50, seed=1) + 0.1])
    assert holders_of([task_of(ALL[:100]), OTHER, task_of(both)]) == [2, 1, 2]


def test_of_the_same_rows_one_task_holds_the_others():
    tasks = [task_of(ALL[:50]), OTHER, task_of(ALL[:50] * (1 + 1e-7)), task_of(ALL[:50])]
    first, other, second, third = holders_of(tasks)
    assert first == second == third != 1
    assert other == 1


def test_a_task_may_scatter_wider_than_others():
    wide = 1.8 * ALL
    assert holders_of([task_of(wide[:100]), OTHER, task_of(wide[:200]), task_of(rows_of(3, 200))]) == [
        2,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_who_holds_whom_does_not_depend_on_the_order(order):
    later = torch.cat(
        [ALL[30:200], rows_of(0, 30, seed=1)]
    )  # as many rows as the first, most of them the same
    tasks = [task_of(ALL[:200]), task_of(later), OTHER, task_of(ALL[:90])]
    found = holders_of([tasks[number] for number in order])
    named = {number: order[holder] for number, holder in zip(order, found, strict=True)}
    assert named == dict(enumerate(holders_of(tasks)))
    assert named[0] == named[1]


def test_versions_that_grow_are_held_by_the_last():
    sizes = (100, 120, 150, 190, 250)
    versions = [task_of(ALL[:size]) for size in sizes]
    assert holders_of([*versions, OTHER]) == [4, 4, 4, 4, 4, 5]


@pytest.mark.parametrize(("n", "m"), [(12, 18), (60, 90), (100, 100), (100, 150), (100, 300), (20, 400)])
def test_tasks_of_like_texts_do_not_hold_each_other(n, m):
    assert holders_of([task_of(rows_of(0, n, seed=1)), OTHER, task_of(ALL[:m])]) == [0, 1, 2]


@pytest.mark.parametrize(("n", "m"), [(12, 18), (60, 90), (100, 100), (100, 150)])
def test_half_of_the_rows_is_too_few(n, m):
    half = torch.cat([ALL[: n // 2], rows_of(0, n, seed=1)[n // 2 :]])
    assert holders_of([task_of(half), OTHER, task_of(ALL[:m])]) == [0, 1, 2]


def test_tasks_of_other_rows_are_told_without_reading_a_scatter():
    tasks = [task_of(rows_of(topic, 16)) for topic in range(20)]

    def refuse(number: int) -> torch.Tensor:
        raise AssertionError(f"the scatter of task {number} is read")

    assert find_holders(tasks, fit_space(tasks, total(tasks)), refuse) == list(range(20))


@pytest.mark.parametrize("sizes", [range(100, 161, 12), range(100, 140, 5)])
@pytest.mark.parametrize("num_keys", [1, 3])
def test_later_versions_of_a_task_refuse_no_more_of_its_requests(sizes, num_keys):
    versions = [task_of(ALL[:size], num_keys) for size in sizes]
    requests, strangers = rows_of(0, 200, seed=2), rows_of(2, 50)
    assert share_refused([*versions, OTHER], requests) <= 0.03
    assert share_refused([*versions, OTHER], strangers) == 1.0


def test_a_forgotten_version_leaves_what_was_there_before():
    first, second = task_of(ALL[:100]), task_of(ALL[:150])
    queries = rows_of(0, 20, seed=3)

    def decided(tasks: list[TaskKeys]) -> torch.Tensor:
        found = Retriever(tasks, total(tasks), RetrievalConfig().settled(has_words=False))(queries)
        return torch.stack([found.distances[:, 0], found.thresholds])

    torch.testing.assert_close(
        decided([first, OTHER, second]), decided([OTHER, second, dataclasses.replace(first)])
    )


def test_copies_of_one_text_hold_each_other():
    one = task_of(ALL[:1].expand(20, -1))
    first, other, second = holders_of([one, OTHER, dataclasses.replace(one)])
    assert first == second != other


def test_the_spread_of_a_space_is_that_of_its_rows():
    tasks = [task_of(ALL[:100]), OTHER]
    space = fit_space(tasks, total(tasks))
    own = [(float(task.counts.sum()), spread_of(task, task.scatter, space)) for task in tasks]
    assert space.spread == pytest.approx(sum(n * g for n, g in own) / sum(n for n, _ in own), rel=1e-5)


def test_of_keys_of_one_holder_in_one_place_the_first_stands_for_all():
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1e-8], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).double()
    holders = torch.tensor([2, 1, 2, 2, 4, 2])
    assert find_originals(keys, holders, 1e-7).tolist() == [0, 1, 0, 0, 4, 5]
    assert find_originals(keys, holders, 1e-9).tolist() == [0, 1, 2, 0, 4, 5]
    assert find_originals(keys, torch.arange(6), 1e-7).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_space_names_the_holders():
    tasks = [task_of(ALL[:100]), OTHER, task_of(ALL[:110])]
    space = fit_distinct_space(tasks, total(tasks), lambda number: tasks[number].scatter)
    assert space.holders.tolist() == [2, 1, 2]
