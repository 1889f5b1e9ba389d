"""Every formula against a slow reference that reads like its equation, and the invariants between them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import ConfigError, DataError
from slm.evaluation.metrics import (
    auroc,
    average,
    backward_transfer,
    expected_calibration_error,
    false_refusal_rate,
    forgetting,
    forward_transfer,
    misrouting,
    oracle_gap,
    reliability_bins,
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


CONFIDENT = st.lists(st.tuples(st.one_of(st.just(1.0), SHARES), st.booleans()), min_size=1, max_size=40)


def reference_calibration_error(rows, num_bins) -> float:
    """Walks the sorted rows; a bin ends at the first change of confidence after its share of the rows."""
    rows = sorted(rows, key=lambda row: row[0])
    total, begun, wanted = 0.0, [], len(rows) / num_bins
    for i, row in enumerate(rows):
        begun.append(row)
        is_last = i + 1 == len(rows)
        if is_last or (i + 1 >= wanted and rows[i + 1][0] != row[0]):
            gap = sum(right for _, right in begun) - sum(sure for sure, _ in begun)
            total += abs(gap)
            begun = []
            while wanted <= i + 1 + 1e-9:
                wanted += len(rows) / num_bins
    return total / len(rows)


@fast
@given(CONFIDENT, st.integers(1, 20))
def test_the_expected_calibration_error_equals_its_reference(rows, num_bins):
    sure, right = zip(*rows, strict=True)
    expected = reference_calibration_error(rows, num_bins)
    assert expected_calibration_error(sure, right, num_bins) == pytest.approx(expected, abs=1e-9)


@fast
@given(CONFIDENT, st.randoms())
def test_the_expected_calibration_error_does_not_depend_on_the_order_of_the_rows(rows, random):
    shuffled = random.sample(rows, len(rows))
    (sure, right), (sure_2, right_2) = zip(*rows, strict=True), zip(*shuffled, strict=True)
    assert expected_calibration_error(sure, right) == pytest.approx(
        expected_calibration_error(sure_2, right_2), abs=1e-12
    )


def test_reliability_bins_are_of_equal_mass_and_never_part_equal_confidences():
    bins = reliability_bins([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [False, True, False, True, True, True], 3)
    assert [(m.num_rows, m.accuracy) for m in bins] == [(2, 0.5), (2, 0.5), (2, 1.0)]
    assert [m.confidence for m in bins] == pytest.approx([0.15, 0.35, 0.55])
    tied = reliability_bins([0.5, 1.0, 1.0, 1.0, 1.0, 1.0], [True] * 6, 3)
    assert [m.num_rows for m in tied] == [6]


def test_the_expected_calibration_error_is_nothing_for_honest_and_everything_for_wrong_certainty():
    assert expected_calibration_error([0.75] * 4, [True, True, True, False]) == 0
    assert expected_calibration_error([1.0] * 5, [False] * 5) == 1
    assert expected_calibration_error([0.5, 1.0], [True, True], num_bins=2) == 0.25


def test_a_reliability_diagram_refuses_what_is_no_probability():
    assert message_of(expected_calibration_error, [], []) == (
        "a reliability diagram needs at least 1 row, got 0: give some"
    )
    assert message_of(reliability_bins, [0.5], []) == (
        "there are 1 confidences but 0 decisions: give one for each"
    )
    for odd, shown in ((1.5, "1.5"), (math.nan, "nan"), (-0.1, "-0.1")):
        assert message_of(reliability_bins, [0.5, odd], [True, True]) == (
            f"a confidence must be in 0..1, got {shown}: give probabilities"
        )
    with pytest.raises(ConfigError, match=r"^num_bins must be at least 1, got 0: raise it$"):
        reliability_bins([0.5], [True], 0)
