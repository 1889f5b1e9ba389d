"""The runoff between two tasks that both claim a row, against the formula and against truth."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from slm.config import RetrievalConfig
from slm.retrieval import runoff
from slm.retrieval.keys import TaskKeys, learn_keys, unpack
from slm.retrieval.retriever import Retriever
from slm.retrieval.runoff import CONTESTED

NUM_CHANNELS = 12
AWAY = 30.0
"""Distance of the tasks that nobody confuses."""


def rows_of(task: int, num_rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of a made-up task: 0 and 1 are twins that differ where only they scatter little."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    rows = torch.randn(num_rows, NUM_CHANNELS, generator=generator).double()
    if task < 2:
        rows[:, 0] = 0.1 * rows[:, 0] + 0.4 * (task - 0.5)
        rows[:, 1] += 0.3 * (task - 0.5)
    else:
        rows[:, task] += AWAY
    return rows


def keys_of(rows: torch.Tensor, num_keys: int = 1) -> TaskKeys:
    return learn_keys(rows, torch.arange(len(rows)) % num_keys)


def make(tasks: list[TaskKeys], load=None, **settings) -> Retriever:
    total = sum(task.scatter.double() for task in tasks)
    return Retriever(tasks, total, RetrievalConfig(**settings), load)


def four(num_rows: int = 200) -> list[TaskKeys]:
    return [keys_of(rows_of(task, num_rows)) for task in range(4)]


def misrouting(retriever: Retriever, tasks=(0, 1)) -> float:
    wrong = []
    for task in tasks:
        found = retriever(rows_of(task, 500, seed=1))
        wrong.append(float((found.owners[found.nearest] != task).double().mean()))
    return sum(wrong) / len(wrong)


def test_twins_are_told_apart_by_a_direction_that_the_shared_covariance_hides():
    plain, settled = (make(four(), is_abstaining=False, has_runoff=on) for on in (False, True))
    assert misrouting(plain) > 0.2
    assert misrouting(settled) < 0.06
    assert misrouting(settled, (2, 3)) == 0


def test_more_rows_tell_twins_apart_better():
    few, many = (make(four(number), is_abstaining=False) for number in (16, 1000))
    assert (
        misrouting(many) < misrouting(few) < misrouting(make(four(16), is_abstaining=False, has_runoff=False))
    )


def test_log_odds_are_those_of_two_densities_under_the_covariance_of_the_pair():
    tasks, (a, b) = four(), (1, 0)
    retriever = make(tasks)
    factor = retriever.scorer.space.factor
    own = sum(unpack(tasks[n].scatter, NUM_CHANNELS) for n in (a, b))
    covariance = (NUM_CHANNELS * factor @ factor.T + own) / (NUM_CHANNELS + 400)
    queries = rows_of(0, 20, seed=3)
    one, two = (
        torch.distributions.MultivariateNormal(tasks[n].means[0], covariance).log_prob(queries)
        for n in (a, b)
    )
    first, second = torch.full((20,), a), torch.full((20,), b)
    odds = retriever.scorer.runoff.log_odds(queries, first, second)
    torch.testing.assert_close(odds, one - two)
    assert torch.equal(retriever.scorer.runoff.log_odds(queries, second, first), -odds)
    sized = make([tasks[0], keys_of(rows_of(1, 50))], prior="size").scorer.runoff
    plain = make([tasks[0], keys_of(rows_of(1, 50))]).scorer.runoff
    zero, one = torch.tensor([0]), torch.tensor([1])
    difference = sized.log_odds(queries[:1], zero, one) - plain.log_odds(queries[:1], zero, one)
    assert float(difference) == pytest.approx(math.log(200 / 50))


def test_distances_say_what_the_runoff_said_and_the_smallest_stays():
    tasks, queries = four(), torch.cat([rows_of(0, 50, seed=4), rows_of(1, 50, seed=4)])
    before, after = (make(tasks, is_abstaining=False, has_runoff=on)(queries) for on in (False, True))
    assert not torch.equal(before.nearest, after.nearest)
    assert after.is_contested.all()
    assert not before.is_contested.any()
    torch.testing.assert_close(after.distances[:, 0], before.distances[:, 0])
    odds = make(tasks).scorer.runoff.log_odds(queries, *after.candidates[:, :2].T)
    assert bool((odds > 0).all())
    behind = (after.distances[:, 1] - after.distances[:, 0]).double()
    torch.testing.assert_close(behind, 2 * odds, atol=1e-4, rtol=1e-4)
    assert bool((after.distances.diff(dim=1) >= 0).all())


def test_rows_that_one_task_claims_are_left_alone_and_read_no_scatter():
    tasks = four()

    def load(number: int) -> torch.Tensor:
        raise AssertionError(f"the scatter of task {number} was read")

    queries = torch.cat([rows_of(2, 20, seed=5), rows_of(3, 20, seed=5)])
    found = make(tasks, load, is_abstaining=False)(queries)
    assert not found.is_contested.any()
    plain = make(tasks, is_abstaining=False, has_runoff=False)(queries)
    assert torch.equal(found.distances, plain.distances)
    assert bool((plain.distances[:, 1] - plain.distances[:, 0] > CONTESTED).all())


def test_scatters_of_a_pair_are_read_once():
    tasks, read = four(), []

    def load(number: int) -> torch.Tensor:
        read.append(number)
        return tasks[number].scatter

    retriever = make(tasks, load, is_abstaining=False)
    for seed in range(3):
        retriever(torch.cat([rows_of(0, 10, seed=seed), rows_of(1, 10, seed=seed)]))
    assert sorted(read) == [0, 1]


def test_so_much_is_kept_of_pairs_and_no_more(monkeypatch):
    monkeypatch.setattr(runoff, "_MOST_KEYS", 7)
    own = make(four()).scorer.runoff
    query, pairs = rows_of(0, 1), list(itertools.permutations(range(4), 2))
    asked = [own.log_odds(query, torch.tensor([a]), torch.tensor([b])) for a, b in pairs]
    assert sum(len(offsets) for _, offsets in own._known.values()) == 6  # three pairs of one key each
    again = [own.log_odds(query, torch.tensor([a]), torch.tensor([b])) for a, b in pairs]
    assert asked == again


def test_all_keys_of_the_loser_fall_behind_the_winner():
    tasks = [keys_of(rows_of(task, 400), num_keys=3) for task in range(4)]
    queries = torch.cat([rows_of(0, 100, seed=6), rows_of(1, 100, seed=6)])
    found = make(tasks, is_abstaining=False)(queries)
    owners = found.owners[found.candidates]
    for other in (0, 1):
        rows = owners[:, 0] == other
        loser = found.distances[rows].masked_fill(owners[rows] != 1 - other, torch.inf).amin(1)
        behind = (loser - found.distances[rows, 0]).double()
        first = found.nearest[rows]
        nearest_loser = (
            found.distances[rows].masked_fill(owners[rows] != 1 - other, torch.inf).argmin(1, keepdim=True)
        )
        second = found.candidates[rows].gather(1, nearest_loser)[:, 0]
        odds = make(tasks).scorer.runoff.log_odds(queries[rows], first, second)
        torch.testing.assert_close(behind, 2 * odds.abs(), atol=1e-3, rtol=1e-3)


def test_every_task_seen_at_once_agrees_with_the_decision():
    retriever, queries = make(four()), torch.cat([rows_of(t, 50, seed=7) for t in range(4)])
    found, seen = retriever(queries), retriever.task_distances(queries)
    assert torch.equal(seen.distances.argmin(1), found.owners[found.nearest])
    torch.testing.assert_close(seen.distances.amin(1), found.distances[:, 0])


def test_a_margin_tells_what_would_change_the_runoff():
    own = make([keys_of(rows_of(task, 200)) for task in (0, 1, 2)]).scorer.runoff
    queries, keys = torch.zeros(1, NUM_CHANNELS), torch.tensor([[0, 1, 2]])
    for distances, margin in (
        ([0.0, 60.0, 70.0], 60 - CONTESTED),  # 1 comes nearer and contests
        ([0.0, 40.0, 70.0], CONTESTED - 40),  # 1 goes away and does not
        ([0.0, 30.0, 31.0], 1.0),  # 2 would be asked in place of 1
    ):
        given = torch.tensor([distances], dtype=torch.float64)
        assert float(own.settle(queries, keys, given)[1]) == pytest.approx(margin)


def test_a_margin_tells_what_would_let_another_key_of_the_two_tasks_run():
    own = make([keys_of(rows_of(task, 200), num_keys=2) for task in range(3)]).scorer.runoff
    queries, keys = torch.zeros(1, NUM_CHANNELS), torch.arange(6)[None]
    for distances, margin in (
        ([0.0, 0.25, 30.0, 33.0, 60.0, 61.0], 0.25),  # of the winner or loser, whichever leads
        ([0.0, 9.0, 30.0, 30.5, 60.0, 61.0], 0.5),
        ([0.0, 9.0, 60.0, 60.5, 90.0, 91.0], 60 - CONTESTED),  # nobody runs
    ):
        given = torch.tensor([distances], dtype=torch.float64)
        assert float(own.settle(queries, keys, given)[1]) == pytest.approx(margin)


def test_a_near_tie_between_two_keys_of_the_loser_is_read_again():
    tasks = [keys_of(rows_of(0, 400), num_keys=2), *four()[1:]]
    retriever, queries = make(tasks, is_abstaining=False), rows_of(1, 200, seed=1)
    scorer = retriever.scorer
    # Each row is moved to where the two keys of task 0 are equally near.
    one, two = tasks[0].means
    away = torch.linalg.solve(scorer.space.covariance, one - two)
    behind = (queries - (one + two) / 2) @ away
    queries = queries - (behind / (away @ (one - two)))[:, None] * (one - two)
    found = retriever(queries)
    lost = found.is_contested & (found.owners[found.nearest] == 1)
    assert int(lost.sum()) > 50
    assert bool((found.margins[lost] < 1e-6).all())


def test_a_single_task_has_nobody_to_run_against():
    retriever = make([keys_of(rows_of(0, 100), num_keys=2)])
    found = retriever(rows_of(0, 10, seed=8))
    assert torch.isfinite(found.distances).all()
    assert torch.isfinite(found.margins).all()


def test_two_tasks_of_the_same_rows_share_a_row_and_the_first_is_named():
    retriever = make([keys_of(rows_of(0, 100)), keys_of(rows_of(0, 100))], is_abstaining=False)
    found = retriever(rows_of(0, 10, seed=9))
    torch.testing.assert_close(found.posterior, torch.full((10, 2), 0.5))
    assert found.nearest.tolist() == [0] * 10
    assert float(found.margins.min()) > 1


def later_version(has_grown: bool) -> TaskKeys:
    rows = rows_of(0, 200)
    return keys_of(torch.cat([rows, rows_of(0, 60, seed=7)]) if has_grown else rows)


@pytest.mark.parametrize("has_grown", [False, True])
@pytest.mark.parametrize("num_versions", [2, 3])
def test_versions_of_a_task_face_its_rival_together(has_grown, num_versions):
    tasks = [*four(), *[later_version(has_grown)] * (num_versions - 1)]
    assert len(make(tasks).scorer.space.holders.unique()) == 4
    plain, settled = (make(tasks, is_abstaining=False, has_runoff=on) for on in (False, True))
    for task, retriever in ((0, settled), (1, settled), (1, plain)):
        found = retriever(rows_of(task, 500, seed=1))
        owners = found.owners[found.nearest]
        wrong = float((torch.where(owners > 3, 0, owners) != task).double().mean())
        assert (wrong < 0.06) == (retriever is settled)


@pytest.mark.parametrize("has_grown", [False, True])
def test_a_runoff_leaves_between_versions_what_there_was(has_grown):
    tasks, queries = [*four(), later_version(has_grown)], torch.cat([rows_of(t, 50, seed=2) for t in (0, 1)])
    plain, settled = (make(tasks, is_abstaining=False, has_runoff=on) for on in (False, True))
    before, after, found = plain.task_distances(queries), settled.task_distances(queries), settled(queries)
    assert found.is_contested.all()
    assert torch.equal(after.distances.argmin(1), found.owners[found.nearest])
    torch.testing.assert_close(after.distances.amin(1), found.distances[:, 0])
    between = [(seen.distances[:, 4] - seen.distances[:, 0]).double() for seen in (before, after)]
    torch.testing.assert_close(*between, atol=1e-4, rtol=1e-4)
    if not has_grown:
        assert not between[0].any()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_versions_are_no_reason_to_read_rows_again(top_k):
    tasks = [*four(), *[later_version(has_grown=False)] * 2]
    retriever = make(tasks, is_abstaining=False, top_k=top_k)
    queries, asked = torch.cat([rows_of(task, 100, seed=1) for task in range(4)]), []
    found = retriever(queries, lambda row: (asked.append(row), queries[row])[1])
    assert asked == []
    assert set(found.owners[found.nearest].tolist()) == {0, 1, 2, 3}


def test_a_task_that_the_loser_fell_behind_is_found_beyond_the_loser_s_many_keys():
    third = rows_of(5, 400)
    third[:, 5] -= AWAY - 5
    tasks = [keys_of(rows_of(0, 800), num_keys=40), keys_of(rows_of(1, 400)), keys_of(third)]
    tasks += [keys_of(rows_of(task, 400)) for task in (2, 3)]
    queries = rows_of(1, 60, seed=3)
    queries[:, 0] += 0.4  # where task 0 is no longer thought of
    queries[:, 5] += 1.0
    near, all_seen = (make(tasks, is_abstaining=False, min_weight=0.0) for _ in range(2))
    all_seen._num_candidates = len(all_seen.scorer.keys)
    found, wanted = near(queries), all_seen(queries)
    assert found.candidates.shape == (60, 41)
    assert int((wanted.tasks == torch.tensor([1, 2])).all(1).sum()) > 40
    assert torch.equal(found.tasks, wanted.tasks)
    torch.testing.assert_close(found.weights, wanted.weights)
    torch.testing.assert_close(found.margins, wanted.margins)
    for row in range(5):
        alone = near(queries[row : row + 1])
        assert torch.equal(alone.candidates[0], found.candidates[row])
        torch.testing.assert_close(alone.posterior[0], found.posterior[row])


def test_priors_refuse_nothing_in_a_runoff():
    tasks = [keys_of(rows_of(task, size)) for task, size in enumerate((4000, 40, 400, 400))]
    queries = torch.cat([rows_of(0, 600, seed=1), rows_of(1, 600, seed=1)])
    queries[:, 2] += torch.linspace(0, 12, len(queries)).roll(600)  # on the way to another task
    even, sized = (make(tasks, prior=prior, false_refusal_rate=0.05) for prior in ("uniform", "size"))
    one, two = even(queries), sized(queries)
    same = (one.nearest == two.nearest) & two.is_contested
    assert bool((one.nearest != two.nearest).any())
    assert 50 < int(one.is_abstained[same].sum()) < int(same.sum()) - 50
    assert torch.equal(one.is_abstained[same], two.is_abstained[same])
    assert torch.equal(two.distances[:, 0] > two.thresholds, two.is_abstained)
    seen = sized.task_distances(queries)
    nearest = seen.distances.argmin(1, keepdim=True)
    beyond = (seen.distances > seen.thresholds).gather(1, nearest)[:, 0]
    assert torch.equal(beyond, two.is_abstained)
