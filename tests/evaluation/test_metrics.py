"""Every formula against a slow reference that reads like its equation, and the invariants between them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import DataError
from slm.evaluation.metrics import (
    auroc,
    average,
    backward_transfer,
    false_refusal_rate,
    forgetting,
    forward_transfer,
    misrouting,
    oracle_gap,
)

EXAMPLE = [
    [0.8, None, None],
    [0.9, 0.5, None],
    [0.7, 0.6, 0.4],
]
SHARES = st.floats(0, 1)
TRIANGLES = st.integers(1, 5).flatmap(
    lambda t: st.tuples(*(st.lists(SHARES, min_size=i, max_size=i) for i in range(1, t + 1)))
)
DISTANCES = st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.5, 1.0, 3.0, math.inf]), min_size=1, max_size=12)
fast = settings(max_examples=80, deadline=None)


def reference_forgetting(a) -> float:
    t = len(a)
    total = 0.0
    for j in range(t - 1):
        best = -math.inf
        for i in range(j, t):
            best = max(best, a[i][j])
        total += best - a[t - 1][j]
    return total / (t - 1)


def reference_backward_transfer(a) -> float:
    t = len(a)
    total = 0.0
    for j in range(t - 1):
        total += a[t - 1][j] - a[j][j]
    return total / (t - 1)


def reference_auroc(positives, negatives) -> float:
    wins = 0.0
    for p in positives:
        for n in negatives:
            wins += 1.0 if p > n else 0.5 if p == n else 0.0
    return wins / (len(positives) * len(negatives))


def message_of(function, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_worked_example_gives_the_numbers_computed_by_hand():
    assert average(EXAMPLE) == pytest.approx((0.7 + 0.6 + 0.4) / 3)
    assert forgetting(EXAMPLE) == pytest.approx(((0.9 - 0.7) + (0.6 - 0.6)) / 2)
    assert backward_transfer(EXAMPLE) == pytest.approx(((0.7 - 0.8) + (0.6 - 0.5)) / 2)
    assert forward_transfer(EXAMPLE, [None, 0.7, 0.3]) == pytest.approx(((0.5 - 0.7) + (0.4 - 0.3)) / 2)
    assert oracle_gap(EXAMPLE, [0.9, 0.6, 0.6]) == pytest.approx(0.7 - 1.7 / 3)


@fast
@given(TRIANGLES)
def test_average_forgetting_and_backward_transfer_equal_their_references(a):
    assert average(a) == pytest.approx(sum(a[-1]) / len(a))
    if len(a) > 1:
        assert forgetting(a) == pytest.approx(reference_forgetting(a))
        assert backward_transfer(a) == pytest.approx(reference_backward_transfer(a))


@fast
@given(TRIANGLES, st.lists(SHARES, min_size=5, max_size=5))
def test_forward_transfer_and_oracle_gap_equal_their_references(a, others):
    others = others[: len(a)]
    assert oracle_gap(a, others) == pytest.approx(sum(others) / len(a) - sum(a[-1]) / len(a), abs=1e-12)
    if len(a) > 1:
        expected = sum(a[j][j] - others[j] for j in range(1, len(a))) / (len(a) - 1)
        assert forward_transfer(a, others) == pytest.approx(expected, abs=1e-12)


@fast
@given(TRIANGLES)
def test_forgetting_is_never_negative_and_never_less_than_what_backward_transfer_lost(a):
    if len(a) > 1:
        assert forgetting(a) >= 0
        assert forgetting(a) >= -backward_transfer(a) - 1e-12


@fast
@given(TRIANGLES)
def test_what_stands_above_the_diagonal_is_never_read(a):
    full = [[*row, *[math.nan] * (len(a) - len(row))] for row in a]
    assert average(full) == average(a) == average(np.array(full))
    assert forgetting(full) == forgetting(a) == forgetting(np.array(full))
    assert backward_transfer(full) == backward_transfer(a) == backward_transfer(np.array(full))


def test_transfer_and_forgetting_are_undefined_for_one_task():
    assert forgetting([[0.5]]) is None
    assert backward_transfer([[0.5]]) is None
    assert forward_transfer([[0.5]], [None]) is None
    assert average([[0.5]]) == 0.5
    assert oracle_gap([[0.5]], [0.75]) == 0.25


def test_a_broken_matrix_is_named():
    assert message_of(average, []) == "a score matrix needs at least 1 task, got 0: evaluate a task first"
    assert message_of(forgetting, [[1.0], [1.0]]) == (
        "row 2 of a score matrix needs at least 2 scores, got 1: score every task learned so far"
    )
    assert message_of(backward_transfer, [[1.0], [None, 1.0]]) == (
        "score of task 1 after task 2 must be a finite number, got None: score it first"
    )
    assert message_of(average, [[math.nan]]) == (
        "score of task 1 after task 1 must be a finite number, got nan: score it first"
    )


def test_a_missing_score_of_another_learner_is_named():
    assert message_of(forward_transfer, EXAMPLE, [0.1]) == (
        "there are 3 tasks of the matrix but 1 scores alone: give one for each"
    )
    assert message_of(forward_transfer, EXAMPLE, [None, None, 0.1]) == (
        "score alone of task 2 must be a finite number, got None: score it first"
    )
    assert message_of(oracle_gap, EXAMPLE, [0.1]) == (
        "there are 3 tasks of the matrix but 1 oracle scores: give one for each"
    )


@fast
@given(DISTANCES, DISTANCES)
def test_auroc_equals_comparing_every_pair_with_ties_counted_half(positives, negatives):
    assert auroc(positives, negatives) == pytest.approx(reference_auroc(positives, negatives), abs=1e-12)


@fast
@given(DISTANCES, DISTANCES)
def test_auroc_of_swapped_sides_is_one_minus_auroc(positives, negatives):
    assert auroc(positives, negatives) + auroc(negatives, positives) == pytest.approx(1)


def test_auroc_is_one_when_separated_and_half_when_all_is_tied():
    assert auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auroc([0.0], [1.0, 2.0]) == 0.0
    assert auroc([1.0] * 3, [1.0] * 5) == 0.5


def test_auroc_refuses_an_empty_side_and_what_is_not_a_number():
    assert message_of(auroc, [], [1.0]) == (
        "the positive side of an AUROC needs at least 1 row, got 0: give some"
    )
    assert message_of(auroc, [1.0], [0.0, math.nan]) == (
        "the negative side of an AUROC must hold numbers, got nan: look for broken distances"
    )


@fast
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_misrouting_is_the_share_of_rows_off_the_diagonal_of_the_confusion_matrix(rows):
    counts = np.zeros((4, 4))
    for owner, nearest in rows:
        counts[owner, nearest] += 1
    owners, nearest = zip(*rows, strict=True)
    assert misrouting(owners, nearest) == pytest.approx(1 - np.trace(counts) / counts.sum())


def test_misrouting_needs_rows_of_equal_number():
    assert message_of(misrouting, [], []) == "misrouting needs at least 1 row, got 0: give some"
    assert message_of(misrouting, [0, 1], [0]) == ("there are 2 rows but 1 nearest tasks: give one for each")


def test_the_false_refusal_rate_is_the_share_of_rows_that_abstained():
    assert false_refusal_rate([True, False, False, False]) == 0.25
    assert false_refusal_rate(np.array([True, True])) == 1.0
    assert message_of(false_refusal_rate, []) == (
        "the false-refusal rate needs at least 1 row, got 0: give some"
    )
