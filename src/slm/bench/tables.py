"""From cells to tables: means and spreads over orders and seeds, by the formulas of method section 5."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from slm.bench.suite import ALONE
from slm.errors import DataError
from slm.evaluation import metrics

Result = Mapping[str, Any]
"""One cell as :func:`slm.bench.runner.run_cell` returns it."""

Place = tuple[str, int, int | None]
"""Order, seed and examples of each label: what a cell shares with those of other methods."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over cells.

    Attributes:
        mean: over the cells.
        deviation: sample standard deviation; None for one cell.
        num_cells: how many.
    """

    mean: float
    deviation: float | None
    num_cells: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of what is known; None where nothing is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One method in the leaderboard; scores and shares run from 0 to 1, times are seconds.

    Attributes:
        method: its name.
        title: in words.
        per_label: examples of each label; None for as many in all as the preset says.
        needs_task_id: it is told the task of every question, so it is a bound.
        is_joint: it sees all tasks at once, so it is a bound.
        replayed_share: part of old rows that it keeps.
        average: after the last task.
        when_learned: mean score of each task just after it was learned; None for a joint method.
        forgetting: mean drop from the best score.
        backward_transfer: mean change of the first score.
        forward_transfer: mean lead over learning each task alone; None unless that was run.
        oracle_gap: the oracle's average minus this one's, order by order; None without an oracle.
        misrouting: share of test rows routed to another task.
        refused: share of test rows that abstained.
        bytes_per_task: kept at the end, over the number of tasks.
        learn_s: per task, over cells.
        ask_ms: milliseconds for a question of the last round.
        retrieval_share: of the time of answering.
        scores: task -> last score, mean over cells.
    """

    method: str
    title: str
    per_label: int | None
    needs_task_id: bool
    is_joint: bool
    replayed_share: float
    average: Spread
    when_learned: Spread | None
    forgetting: Spread | None
    backward_transfer: Spread | None
    forward_transfer: Spread | None
    oracle_gap: Spread | None
    misrouting: Spread | None
    refused: Spread | None
    bytes_per_task: float
    learn_s: Spread
    ask_ms: float
    retrieval_share: float | None
    scores: Mapping[str, float]

    @property
    def is_bound(self) -> bool:
        """Whether it is told more than a method in use would be."""
        return self.needs_task_id or self.is_joint


def leaderboard(results: Sequence[Result]) -> list[Line]:
    """One line per method and number of examples, bounds last, otherwise by average.

    Raises:
        DataError: there is no result of more than one task alone.
    """
    if all(is_alone(result) for result in results):
        raise DataError("the run has no finished cell yet: run `slm bench` first")
    groups: dict[tuple[str, int | None], list[Result]] = defaultdict(list)
    for result in results:
        groups[result["cell"]["method"], result["cell"]["per_label"]].append(result)
    lines = [
        _line(own, groups.get(("oracle", per_label), []))
        for (_, per_label), own in groups.items()
        if any(not is_alone(result) for result in own)
    ]
    return sorted(lines, key=lambda line: (num_shots(line.per_label), line.is_bound, -line.average.mean))


def num_shots(per_label: int | None) -> float:
    """Examples of each label as a number to sort by; all of them come last."""
    return math.inf if per_label is None else per_label


def is_alone(result: Result) -> bool:
    """Whether a cell learned one task and no other."""
    return str(result["cell"]["order"]).startswith(ALONE)


def side_by_side(results: Sequence[Result]) -> list[Result]:
    """A cell of each method, all of one order, seed and number of examples: the place that most have.

    Of places that equally many have, it is the one of the most examples, then of the first order and seed.
    """
    places: dict[Place, list[Result]] = defaultdict(list)
    for result in results:
        places[place_of(result)].append(result)

    def rank(place: Place) -> tuple[Any, ...]:
        order, seed, per_label = place
        return -len(places[place]), -num_shots(per_label), *by_number(order), seed

    return places[min(places, key=rank)] if places else []


def shared_cells(results: Sequence[Result]) -> list[Result]:
    """Cells of streams that every method has lived through, as curves of other tasks cannot be compared.

    With the number of examples of :func:`side_by_side`; its cells where no order and seed is shared. Joint
    methods live through no stream.
    """
    beside = side_by_side(results)
    per_label = beside[0]["cell"]["per_label"] if beside else None
    lived = [r for r in results if not r["is_joint"] and r["cell"]["per_label"] == per_label]
    places: dict[str, set[Place]] = defaultdict(set)
    for result in lived:
        places[result["cell"]["method"]].add(place_of(result))
    shared = set.intersection(*places.values()) if places else set()
    found = lived if shared else [result for result in beside if not result["is_joint"]]
    return [result for result in found if not shared or place_of(result) in shared]


def place_of(result: Result) -> Place:
    """Where a cell stands beside those of other methods."""
    cell = result["cell"]
    return cell["order"], cell["seed"], cell["per_label"]


def by_number(order: str) -> tuple[int, str]:
    """Orders are mostly named by numbers: 8 before 10."""
    return len(order), order


def last_scores(result: Result) -> dict[str, float]:
    """Task -> score after the last task."""
    return dict(zip(result["tasks"], result["scores"][-1], strict=True))


def misrouting(confusion: Sequence[Sequence[int]] | None) -> float | None:
    """Share of rows off the diagonal."""
    if confusion is None:
        return None
    return 1 - sum(row[i] for i, row in enumerate(confusion)) / sum(map(sum, confusion))


def _line(results: Sequence[Result], oracle: Sequence[Result]) -> Line:
    cells = [result for result in results if not is_alone(result)]
    alone = {
        (result["tasks"][0], result["cell"]["seed"]): result["scores"][0][0]
        for result in results
        if is_alone(result)
    }
    given = {place_of(result): fmean(result["scores"][-1]) for result in oracle if not is_alone(result)}
    first, one = cells[0], fmean
    is_joint = first["is_joint"]
    gaps = [
        given[place_of(result)] - one(result["scores"][-1]) if place_of(result) in given else None
        for result in cells
    ]
    return Line(
        method=first["cell"]["method"],
        title=first["title"],
        per_label=first["cell"]["per_label"],
        needs_task_id=first["needs_task_id"],
        is_joint=is_joint,
        replayed_share=first["replayed_share"],
        average=_known(Spread.of(one(result["scores"][-1]) for result in cells)),
        when_learned=None if is_joint else Spread.of(map(_when_learned, cells)),
        forgetting=None if is_joint else Spread.of(metrics.forgetting(r["scores"]) for r in cells),
        backward_transfer=None
        if is_joint
        else Spread.of(metrics.backward_transfer(r["scores"]) for r in cells),
        forward_transfer=None if is_joint else Spread.of(_forward_transfer(r, alone) for r in cells),
        oracle_gap=Spread.of(gaps),
        misrouting=Spread.of(misrouting(result["confusion"]) for result in cells),
        refused=Spread.of(sum(result["num_refused"]) / result["num_asked"] for result in cells),
        bytes_per_task=one(result["size_bytes"][-1] / len(result["tasks"]) for result in cells),
        learn_s=_known(Spread.of(sum(r["learn_s"]) / len(r["tasks"]) for r in cells)),
        ask_ms=one(1000 * result["ask_s"] / result["num_asked"] for result in cells),
        retrieval_share=_mean(r["retrieve_s"] / r["ask_s"] for r in cells if r["retrieve_s"] is not None),
        scores={task: one(last_scores(r)[task] for r in cells) for task in sorted(first["tasks"])},
    )


def _when_learned(result: Result) -> float:
    """Mean of a[j][j]."""
    return fmean(row[j] for j, row in enumerate(result["scores"]))


def _forward_transfer(result: Result, alone: Mapping[tuple[str, int], float]) -> float | None:
    """None unless every task but the first, whose score alone is never read, was learned alone."""
    found = [alone.get((task, result["cell"]["seed"])) for task in result["tasks"][1:]]
    return None if None in found else metrics.forward_transfer(result["scores"], [None, *found])


def _known(spread: Spread | None) -> Spread:
    assert spread is not None, "a line has at least one cell"
    return spread


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def drift_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per method and number of examples: loss on unrelated texts, zero-shot scores, what they were.

    What they were before is what the method ``frozen`` has, with whatever number of examples, as it learns
    none; without it ``before`` is None.
    """
    groups: dict[tuple[str, int | None], list[Result]] = defaultdict(list)
    for result in results:
        if result.get("drift") and not is_alone(result):
            groups[result["cell"]["method"], result["cell"]["per_label"]].append(result)
    found = [_drift(own) for own in groups.values()]
    before = next((row for row in found if row["method"] == "frozen"), None)
    return [{**row, "before": before} for row in found]


def _drift(results: Sequence[Result]) -> dict[str, Any]:
    drifts = [result["drift"] for result in results]
    losses = [drift["loss"] for drift in drifts]
    return {
        "method": results[0]["cell"]["method"],
        "title": results[0]["title"],
        "per_label": results[0]["cell"]["per_label"],
        "loss": None if None in losses else fmean(losses),
        "scores": {task: fmean(drift["scores"][task] for drift in drifts) for task in drifts[0]["scores"]},
        "abstained": fmean(drift["abstained"] for drift in drifts),
    }
