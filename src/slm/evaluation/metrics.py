"""The formulas of method section 5, each once, on plain numbers.

Notation: t tasks in learning order; ``scores[i][j]`` = a[i][j] is the score on task j's test set after
learning task i, for j ≤ i. What stands above the diagonal is never read and may be None or left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from slm.errors import ConfigError, DataError

Scores = Sequence[Sequence[float | None]]
"""a[i][j]; row i holds at least its first i + 1 entries."""


def average(scores: Scores) -> float:
    """Average after the last task: (1/t) Σ_j a[t][j].

    Raises:
        DataError: the matrix is empty, or a score of its lower triangle is missing or not finite.
    """
    return fmean(_triangle(scores)[-1])


def forgetting(scores: Scores) -> float | None:
    """Forgetting: mean over j < t of (max over i in [j, t] of a[i][j] − a[t][j]); never below 0.

    Returns:
        The mean, or None for one task, where it is undefined: there is no earlier task to forget.

    Raises:
        DataError: the matrix is empty, or a score of its lower triangle is missing or not finite.
    """
    a = _triangle(scores)
    last = a[-1]
    losses = [max(row[j] for row in a[j:]) - last[j] for j in range(len(a) - 1)]
    return fmean(losses) if losses else None


def backward_transfer(scores: Scores) -> float | None:
    """Backward transfer: mean over j < t of (a[t][j] − a[j][j]); below 0 where later tasks did harm.

    Returns:
        The mean, or None for one task, where it is undefined: there is no earlier task.

    Raises:
        DataError: the matrix is empty, or a score of its lower triangle is missing or not finite.
    """
    a = _triangle(scores)
    gains = [a[-1][j] - a[j][j] for j in range(len(a) - 1)]
    return fmean(gains) if gains else None


def forward_transfer(scores: Scores, alone: Sequence[float | None]) -> float | None:
    """Forward transfer: mean over j ≥ 2 of (a[j][j] − alone[j]).

    Args:
        scores: a[i][j].
        alone: score of the same learner on each task when it has learned nothing else; the first is never
            read and may be None.

    Returns:
        The mean, or None for one task, where it is undefined: nothing was learned before it.

    Raises:
        DataError: the matrix is empty, a score is missing or not finite, or the lengths differ.
    """
    a = _triangle(scores)
    _check_lengths(len(a), "tasks of the matrix", len(alone), "scores alone")
    gains = [a[j][j] - _number(alone[j], f"score alone of task {j + 1}") for j in range(1, len(a))]
    return fmean(gains) if gains else None


def misrouting(owners: Sequence[int], nearest: Sequence[int]) -> float:
    """Misrouting: (1/B) Σ_b [nearest_b ≠ owner_b], the share of test rows nearest to another task's key.

    The nearest key is the one of the largest weight; a refused row counts by it too.

    Args:
        owners: task of each row.
        nearest: task of each row's nearest key.

    Raises:
        DataError: there are no rows, or the lengths differ.
    """
    _check_rows(len(owners), "misrouting")
    _check_lengths(len(owners), "rows", len(nearest), "nearest tasks")
    return sum(a != b for a, b in zip(owners, nearest, strict=True)) / len(owners)


def oracle_gap(scores: Scores, oracle: Sequence[float]) -> float:
    """Oracle gap: (1/t) Σ_j oracle[j] − (1/t) Σ_j a[t][j]; what knowing the true task-ID would add.

    Args:
        scores: a[i][j].
        oracle: score on each task with its true task-ID given.

    Raises:
        DataError: the matrix is empty, a score is missing or not finite, or the lengths differ.
    """
    without = average(scores)
    _check_lengths(len(scores), "tasks of the matrix", len(oracle), "oracle scores")
    given = fmean(_number(score, f"oracle score of task {j}") for j, score in enumerate(oracle, start=1))
    return given - without


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Area under the ROC curve: P(p > n) + ½ P(p = n) for a random positive p and a random negative n.

    For abstention the positives are distances of rows of no task, the negatives those of learned tasks.

    Args:
        positives: values that should be large.
        negatives: values that should be small.

    Raises:
        DataError: a side is empty or holds a value that is not a number.
    """
    p, n = np.asarray(positives, dtype=np.float64), np.sort(np.asarray(negatives, dtype=np.float64))
    for side, values in (("positive", p), ("negative", n)):
        _check_rows(len(values), f"the {side} side of an AUROC")
        if np.isnan(values).any():
            raise DataError(
                f"the {side} side of an AUROC must hold numbers, got nan: look for broken distances"
            )
    # Twice the wins plus the ties, in whole numbers: below + (below + equal).
    doubled = np.searchsorted(n, p, side="left").sum() + np.searchsorted(n, p, side="right").sum()
    return int(doubled) / (2 * len(p) * len(n))


def false_refusal_rate(is_abstained: Sequence[bool]) -> float:
    """False-refusal rate: (1/B) Σ_b [row b abstained], over test rows that do belong to a learned task.

    Raises:
        DataError: there are no rows.
    """
    _check_rows(len(is_abstained), "the false-refusal rate")
    return sum(map(bool, is_abstained)) / len(is_abstained)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Rows of about equal confidence.

    Attributes:
        num_rows: how many there are.
        confidence: their mean confidence.
        accuracy: share of them that is right.
    """

    num_rows: int
    confidence: float
    accuracy: float


def reliability_bins(
    confidences: Sequence[float], is_right: Sequence[bool], num_bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Sort rows by confidence and cut them into bins of equal mass, B / num_bins rows each.

    Rows of one and the same confidence are never parted: a cut that falls among them moves behind them. So
    the bins do not depend on the order of the rows, and there are fewer of them where confidences repeat.

    Args:
        confidences: of each row, 0 to 1.
        is_right: whether each row's decision is right.
        num_bins: most bins.

    Raises:
        DataError: there are no rows, the lengths differ, or a confidence is outside 0 to 1.
        ConfigError: num_bins is below 1.
    """
    _check_rows(len(confidences), "a reliability diagram")
    _check_lengths(len(confidences), "confidences", len(is_right), "decisions")
    if num_bins < 1:
        raise ConfigError(f"num_bins must be at least 1, got {num_bins}: raise it")
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    odd = sure[~((sure >= 0) & (sure <= 1))]
    if len(odd):
        raise DataError(f"a confidence must be in 0..1, got {odd[0]:g}: give probabilities")
    order = np.argsort(sure, kind="stable")
    sure, right = sure[order], right[order]
    wanted = np.ceil(np.arange(1, num_bins + 1) * len(sure) / num_bins).astype(int)
    cuts = np.unique(np.searchsorted(sure, sure[wanted - 1], side="right"))
    return tuple(
        ReliabilityBin(int(end - start), float(sure[start:end].mean()), float(right[start:end].mean()))
        for start, end in zip([0, *cuts[:-1]], cuts, strict=True)
    )


def expected_calibration_error(
    confidences: Sequence[float], is_right: Sequence[bool], num_bins: int = 15
) -> float:
    """Expected calibration error: Σ_m (B_m / B) |accuracy_m − confidence_m| over bins m of equal mass.

    The bins are those of :func:`reliability_bins`; with bins of equal width, most would be nearly empty where
    a router is nearly always sure.

    Raises:
        DataError: there are no rows, the lengths differ, or a confidence is outside 0 to 1.
        ConfigError: num_bins is below 1.
    """
    bins = reliability_bins(confidences, is_right, num_bins)
    return sum(m.num_rows * abs(m.accuracy - m.confidence) for m in bins) / len(confidences)


def _triangle(scores: Scores) -> list[list[float]]:
    """The lower triangle as floats, checked."""
    if len(scores) == 0:
        raise DataError("a score matrix needs at least 1 task, got 0: evaluate a task first")
    for i, row in enumerate(scores):
        if len(row) <= i:
            raise DataError(
                f"row {i + 1} of a score matrix needs at least {i + 1} scores, got {len(row)}: "
                "score every task learned so far"
            )
    return [
        [_number(row[j], f"score of task {j + 1} after task {i + 1}") for j in range(i + 1)]
        for i, row in enumerate(scores)
    ]


def _number(score: float | None, what: str) -> float:
    if score is None or not math.isfinite(score):
        raise DataError(f"{what} must be a finite number, got {score}: score it first")
    return float(score)


def _check_rows(num_rows: int, what: str) -> None:
    if num_rows == 0:
        raise DataError(f"{what} needs at least 1 row, got 0: give some")


def _check_lengths(num_left: int, left: str, num_right: int, right: str) -> None:
    if num_left != num_right:
        raise DataError(f"there are {num_left} {left} but {num_right} {right}: give one for each")
