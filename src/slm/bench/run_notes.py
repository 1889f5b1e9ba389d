"""What stands under the tables of a run: which numbers compare unlike things, and which say little."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slm.bench.suite_file import load_suite, suite_names
from slm.bench.tables import (
    Line,
    Place,
    Result,
    by_number,
    drift_table,
    is_alone,
    leaderboard,
    num_shots,
    place_of,
)


def notes(run: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """What stands under a leaderboard: what took how much, and which numbers compare unlike things."""
    lines = leaderboard(results)
    hours = sum(result["time_s"] for result in results) / 3600
    found = [_one_percent(run, results), f"{len(results)} cells, computed in {hours:.1f} hours in all."]
    if lacking := _lacking(results):
        found.append(f"Means of fewer cells than others': {'; '.join(lacking)}.")
    if partial := _partly_transferred(lines):
        found.append(
            "Forward transfer is of those cells alone whose tasks were learned alone too: "
            f"{'; '.join(partial)}."
        )
    if still := _unmoved(lines, results):
        found.append(
            f"The average is the same in every order for {'; '.join(still)}: all orders ask the same test "
            "rows, so a deviation of 0 says that the order does not matter, not how sure the score is."
        )
    other = Counter(r["title"] for r in results if r.get("digest", run["digest"]) != run["digest"])
    if other:
        found.append(
            "Of another digest than run.json's, whose settings or whose commit's way of summing them up "
            f"differ, are {_counted(other, len(results))}."
        )
    if apart := _apart_from_oracle(results):
        found.append(
            f"Of another commit than the oracle's cell beside them are {_counted(apart, len(results))}. "
            "Their oracle gap holds changes of the code as well."
        )
    return found


def drift_notes(results: Sequence[Result]) -> list[str]:
    """What stands under a table of drift: columns in which nothing can be lost."""
    found = [row["before"]["scores"] for row in drift_table(results) if row["before"]]
    empty = [task for task, score in found[0].items() if score == 0] if found else []
    if not empty:
        return []
    columns = "this column" if len(empty) == 1 else "these columns"
    return [
        f"The frozen backbone scores 0 on {listed(empty)}: {columns} can show what a method gained, "
        "but no loss."
    ]


def listed(words: Sequence[str]) -> str:
    """Words one after another, an "and" before the last."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def examples_text(per_label: int | None) -> str:
    """A number of examples of each label in words; None is all of them."""
    return "all examples" if per_label is None else f"{per_label} examples of each label"


def _one_percent(run: Mapping[str, Any], results: Sequence[Result]) -> str:
    """What replaying 1% takes: measured for one number of examples, reckoned from it for the others."""
    totals: dict[int | None, int] = {}
    for result in results:
        if not is_alone(result):
            totals.setdefault(result["cell"]["per_label"], sum(result["num_examples"]))
    first = _number_measured(run, totals)
    others = [number for number in sorted(totals, key=num_shots) if number != first]
    measured = run["bytes_per_task_of_1_percent"] / 1e3
    told = f"To keep 1% of a task's training rows takes {measured:.1f} kB on average"
    if others:
        told += f" with {examples_text(first)}"
    total = run.get("num_examples_of_1_percent", totals.get(first))
    for number in others if total else ():
        told += f", about {measured * totals[number] / total:.1f} kB with {examples_text(number)}"
    return f"{told}."


def _number_measured(run: Mapping[str, Any], present: Collection[int | None]) -> int | None:
    """The examples of each label that the bytes of 1% were measured for.

    Runs that do not say so measured the preset's first number; of a suite of one's own, which is not at hand,
    it is taken to be the smallest number present.
    """
    if "per_label_of_1_percent" in run:
        number: int | None = run["per_label_of_1_percent"]
        return number
    presets = load_suite(run["suite"]).presets if run["suite"] in suite_names() else {}
    if run["preset"] in presets:
        return next(iter(presets[run["preset"]].per_label), None)
    return min(present, key=num_shots)


def _partly_transferred(lines: Sequence[Line]) -> list[str]:
    """Methods whose forward transfer is of some of their cells, each with how many of how many."""
    return [
        f"{_name_of(line, lines)} ({line.forward_transfer.num_cells} of {line.average.num_cells})"
        for line in lines
        if line.forward_transfer and line.forward_transfer.num_cells < line.average.num_cells
    ]


def _unmoved(lines: Sequence[Line], results: Sequence[Result]) -> list[str]:
    """Methods whose average is the same in several orders, as of those that learn each task by itself."""
    orders: dict[tuple[str, int | None], set[str]] = defaultdict(set)
    for result in results:
        if not is_alone(result):
            orders[result["cell"]["method"], result["cell"]["per_label"]].add(result["cell"]["order"])
    return [
        _name_of(line, lines)
        for line in lines
        if line.average.deviation == 0 and len(orders[line.method, line.per_label]) > 1
    ]


def _name_of(line: Line, lines: Sequence[Line]) -> str:
    """Its title, with the number of examples where lines differ in it."""
    has_shots = len({other.per_label for other in lines}) > 1
    return line.title + (f" with {examples_text(line.per_label)}" if has_shots else "")


def _lacking(results: Sequence[Result]) -> list[str]:
    """Methods that lack cells which others have, each with what it lacks."""
    places: dict[str, set[Place]] = {}
    for result in results:
        if not is_alone(result):
            places.setdefault(result["title"], set()).add(place_of(result))
    every = set().union(*places.values())
    return [
        f"{title} without {', '.join(_place_names(every - own, every))}"
        for title, own in sorted(places.items())
        if own != every
    ]


def _place_names(places: Collection[Place], every: Collection[Place]) -> list[str]:
    """Orders, with seed and number of examples where these differ between cells."""
    has_seeds, has_shots = (len({place[i] for place in every}) > 1 for i in (1, 2))
    return [
        f"order {order}"
        + (f" of seed {seed}" if has_seeds else "")
        + (f" with {examples_text(per_label)}" if has_shots else "")
        for order, seed, per_label in sorted(places, key=lambda p: (by_number(p[0]), p[1], num_shots(p[2])))
    ]


def _counted(titles: Counter[str], num_cells: int) -> str:
    named = "; ".join(f"{title} ({number})" for title, number in sorted(titles.items()))
    return f"{titles.total()} of {num_cells} cells: {named}"


def _apart_from_oracle(results: Sequence[Result]) -> Counter[str]:
    """Titles of methods with the number of their cells that are of another commit than the oracle's."""
    commits = {place_of(r): r["environment"]["commit"] for r in results if r["cell"]["method"] == "oracle"}
    return Counter(
        r["title"]
        for r in results
        if not is_alone(r)
        and commits.get(place_of(r), r["environment"]["commit"]) != r["environment"]["commit"]
    )
