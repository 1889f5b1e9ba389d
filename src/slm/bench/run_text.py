"""The tables of a run as rows of text, for the page and for Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from slm.bench.run_notes import drift_notes, examples_text, listed, notes
from slm.bench.suite import shots_text
from slm.bench.suite_file import suite_names
from slm.bench.tables import (
    Line,
    Result,
    Spread,
    by_number,
    drift_table,
    is_alone,
    leaderboard,
    num_shots,
    shared_cells,
    side_by_side,
)

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Header and rows; the first column is text, the others are numbers."""

FORMULAS = (
    "a[i][j] is the score on task j's test rows after learning task i; all tasks learned so far are asked in "
    "one shuffled list. Scores are points of 100; ± is the sample deviation over orders and seeds. Bounds "
    "are told the task of every question, or see all tasks at once."
)

COLUMNS = {
    "of each label": "examples of each label that a task is learned from",
    "average": "(1/t) Σ a[t][j], the mean score of all t tasks after the last one",
    "when learned": "(1/t) Σ a[j][j], the mean score of each task just after it was learned: a method that "
    "scores little then has little to forget, so its small forgetting is no retention",
    "forgetting": "mean over j < t of max over i ≥ j of a[i][j] − a[t][j]: what tasks lost of their best",
    "backward transfer": "mean over j < t of a[t][j] − a[j][j]: what later tasks changed of the first score",
    "forward transfer": "mean over j > 1 of a[j][j] less the score of task j where it is learned alone",
    "oracle gap": "the oracle's average − the method's, order by order: what not being told the task costs",
    "misrouted": "test rows after the last task that go to another task than their own, whether refused or "
    "not; a dash where nothing is routed",
    "refused": "test rows after the last task that no task claims: the frozen backbone answers them, where "
    "it can; an encoder cannot, so they count as wrong",
    "kB per task": "kept at the end beside the frozen backbone, over the number of tasks. Of slm: increment, "
    "head, key and statistics of each task, and the store's background statistics in cells from commit "
    "6e4d665 on. Increments kept in a store, those of slm, its bounds, its ablations and the mean key, are "
    "float16 from commit ef0cb94 on; in cells of earlier commits they are float32, twice as large. The "
    "increments, prompts, heads and weights of all other methods are counted as float32, as most of them go "
    "on learning",
    "learn, s per task": "seconds to learn a task; of a joint method, all tasks over their number. What slm, "
    "its bounds and its ablations learn of a task is learned once a run, and its time counts for each. All "
    "times are of a shared machine as it was, so only large ratios mean something",
    "ask, ms": "milliseconds for a question of the last round, routing included",
    "retrieval share": "time of routing the same questions alone, over the time of answering them",
}
"""What the columns of the leaderboard say."""

DEFINITIONS = "\n".join([FORMULAS, "", *(f"* **{name}**: {text}." for name, text in COLUMNS.items())])
"""What stands once in a document of Markdown."""

_CAPTIONS = {
    "curves": "Mean score of all tasks learned so far. Tasks differ in difficulty, so every curve moves with "
    "them.",
    "costs": "Average after the last task against bytes kept beside the frozen backbone, and against the "
    "time to learn a task. Bars are deviations over orders and seeds. Where an axis counts decades, what "
    "lies left of the first one runs evenly to zero.",
    "matrices": "Row: after learning this task. Column: score of that task (%). What fades downwards is "
    "forgotten.",
    "confusion": "Where the test rows went after the last task, for methods that route. Orange: percent of a "
    "task's rows routed to another one.",
    "shots": "Average after the last task against examples of each label.",
}
_BESIDE_ORACLE = (
    " The distance to the oracle's, black and dashed with stars, is what forgetting and routing cost."
)


def leaderboard_table(lines: Sequence[Line]) -> Table:
    """One row per method: what it reaches and what it costs."""
    has_transfer = any(line.forward_transfer for line in lines)
    has_shots = len({line.per_label for line in lines}) > 1
    header = [
        "method",
        *(["of each label"] if has_shots else []),
        "average",
        "when learned",
        "forgetting",
        "backward transfer",
        *(["forward transfer"] if has_transfer else []),
        "oracle gap",
        "misrouted",
        "refused",
        "kB per task",
        "learn, s per task",
        "ask, ms",
        "retrieval share",
    ]
    rows = []
    for line in lines:
        shots = [str(line.per_label or "all")] if has_shots else []
        transfer = [points(line.forward_transfer)] if has_transfer else []
        rows.append(
            (
                line.title + (" (bound)" if line.is_bound else ""),
                *shots,
                points(line.average),
                points(line.when_learned),
                points(line.forgetting),
                points(line.backward_transfer),
                *transfer,
                points(line.oracle_gap),
                points(line.misrouting, "%"),
                points(line.refused, "%"),
                f"{line.bytes_per_task / 1e3:,.0f}",
                _seconds(line.learn_s),
                f"{line.ask_ms:.1f}",
                "–" if line.retrieval_share is None else f"{100 * line.retrieval_share:.0f}%",
            )
        )
    return tuple(header), rows


def task_tables(lines: Sequence[Line]) -> list[tuple[str, Table]]:
    """Last score of every task, one row per method: a table for each number of examples, which it names."""
    return [
        (f"Last score of every task, points of 100{number}.", task_table(own))
        for number, own in _apart(lines)
    ]


def task_table(lines: Sequence[Line]) -> Table:
    """Last score of every task, one row per line."""
    tasks = sorted(lines[0].scores)
    rows = [(line.title, *(f"{100 * line.scores[task]:.1f}" for task in tasks)) for line in lines]
    return ("method", *tasks), rows


def _apart(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """The lines of each number of examples, which is named unless it is the only one."""
    groups: dict[int | None, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.per_label, []).append(line)
    return [(f"; {examples_text(n)}" if len(groups) > 1 else "", own) for n, own in groups.items()]


def captions(results: Sequence[Result]) -> dict[str, str]:
    """What each figure shows that has cells to show, and of which orders, seeds and examples it is."""
    cells = [result for result in results if not is_alone(result)]
    beside = side_by_side(cells)
    shown = {
        "curves": shared_cells(cells),
        "costs": [r for r in cells if r["cell"]["per_label"] == beside[0]["cell"]["per_label"]],
        "matrices": [result for result in beside if not result["is_joint"]],
        "confusion": beside,
        "shots": cells,
    }
    texts = dict(_CAPTIONS)
    if any(result["cell"]["method"] == "oracle" for result in shown["curves"]):
        texts["curves"] += _BESIDE_ORACLE
    told = {name: f"{text} Shown: {_stream(shown[name])}." for name, text in texts.items() if shown[name]}
    lived = {result["title"] for result in cells if not result["is_joint"]}
    for name in told.keys() & {"curves", "matrices", "confusion"}:
        if lacking := sorted(lived - {result["title"] for result in shown[name]}):
            told[name] += f" Not among them: {', '.join(lacking)}."
    return told


def _stream(results: Sequence[Result]) -> str:
    """Orders, seeds and examples in words."""
    orders = sorted({r["cell"]["order"] for r in results if not is_alone(r)}, key=by_number)
    seeds = sorted({r["cell"]["seed"] for r in results})
    numbers = sorted({r["cell"]["per_label"] for r in results}, key=num_shots)
    lengths = [n for r in results for n in r["num_examples"]]
    examples = f"{_span(lengths)} examples a task"
    if numbers != [None]:
        told = listed([str(number or "all") for number in numbers])
        examples = f"{told} examples of each label, {examples}"
    return f"{_named('order', orders)}; {_named('seed', seeds)}; {examples}"


def _named(name: str, values: Sequence[object]) -> str:
    return f"{name}{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def drift_rows(results: Sequence[Result]) -> Table | None:
    """Loss and zero-shot scores of what was never learned; None where nothing was measured."""
    found = drift_table(results)
    if not found:
        return None
    tasks = list(found[0]["scores"])
    has_shots = len({row["per_label"] for row in found}) > 1
    header = (
        "method",
        *(["of each label"] if has_shots else []),
        "loss on unrelated texts",
        *(f"{task}, zero-shot" for task in tasks),
        "refused",
    )
    rows = []
    for row in sorted(found, key=lambda row: (num_shots(row["per_label"]), row["method"] != "frozen")):
        before = row["before"]
        rows.append(
            (
                row["title"],
                *([str(row["per_label"] or "all")] if has_shots else []),
                _changed(row["loss"], before and before["loss"], 1.0, "{:.3f}", "{:+.3f}"),
                *(
                    _changed(row["scores"][t], before and before["scores"][t], 100.0, "{:.1f}", "{:+.1f}")
                    for t in tasks
                ),
                f"{100 * row['abstained']:.0f}%",
            )
        )
    return header, rows


def markdown(run: Mapping[str, Any], results: Sequence[Result]) -> str:
    """One section of a results page: its tables, what they are of, and the command under them."""
    lines, about = leaderboard(results), run["about"]
    parts = [
        f"## {run['title']}: preset {run['preset']}",
        f"{about[:1].upper()}{about[1:]}. Backbone `{run['backbone']}`; {describe_cells(results)}.",
        _markdown_table(leaderboard_table(lines)),
        *notes(run, results),
    ]
    for what, table in task_tables(lines):
        parts += [what, _markdown_table(table)]
    drift = drift_rows(results)
    if drift:
        parts += [
            "What was never learned, and in brackets the change against `frozen`:",
            _markdown_table(drift),
            *drift_notes(results),
        ]
    commits = sorted({short_commit(result["environment"]["commit"]) for result in results})
    device = sorted({result["environment"]["device"] for result in results})
    parts.append(f"    {command_of(run, results)}\n\nCommit {', '.join(commits)}; {', '.join(device)}.")
    return "\n\n".join(parts) + "\n"


def short_commit(commit: str) -> str:
    """A commit in 12 digits, and whether it had changes."""
    digits, space, words = commit.partition(" ")
    return digits[:12] + space + words


def command_of(run: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The command that repeats a run."""
    words = ["slm bench", _suite_of(run), f"--preset {run['preset']}", "--data DATA"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in run["options"].items()]
    chosen = {
        "methods": sorted({result["cell"]["method"] for result in results}),
        "orders": sorted({r["cell"]["order"] for r in results if not is_alone(r)}),
        "seeds": sorted({str(result["cell"]["seed"]) for result in results}),
    }
    shots = sorted({result["cell"]["per_label"] for result in results}, key=num_shots)
    if shots != [None]:
        chosen["shots"] = [shots_text(number) for number in shots]
    words += [f"--{name} {','.join(values)}" for name, values in chosen.items()]
    return " ".join([*words, *(["--alone"] if any(map(is_alone, results)) else []), "--out runs/x"])


def _suite_of(run: Mapping[str, Any]) -> str:
    """The word that names its suite in a command: a name of the package's, or the file that was given."""
    if file := run.get("suite_file"):
        return shlex.quote(file)
    return str(run["suite"]) if run["suite"] in suite_names() else "FILE.yaml"


def describe_cells(results: Sequence[Result]) -> str:
    """Orders, seeds, examples and test rows of some cells, in words."""
    cells = [result for result in results if not is_alone(result)]
    rows = [result["num_asked"] / len(result["tasks"]) for result in cells]
    about = "" if all(number == int(number) for number in rows) else "about "
    worth = 100 / min(result["num_asked"] for result in cells)
    return (
        f"{_stream(results)}; {about}{_span(rows)} test rows a task, so one answer is worth "
        f"{about}{worth:.2f} points of a cell's average"
    )


def points(spread: Spread | None, unit: str = "") -> str:
    """A share in points of 100 with its deviation; a dash where there is none."""
    if spread is None:
        return "–"
    value = f"{100 * spread.mean:.2f}{unit}"
    # Minus nothing is nothing.
    value = value.replace("-0.00", "0.00")
    return value if spread.deviation is None else f"{value} ± {100 * spread.deviation:.2f}"


def _seconds(spread: Spread) -> str:
    told = f"{spread.mean:.1f}"
    return told if spread.deviation is None else f"{told} ± {spread.deviation:.1f}"


def _changed(value: float | None, before: float | None, factor: float, form: str, change: str) -> str:
    if value is None:
        return "–"
    told = form.format(factor * value)
    return told if before is None else f"{told} ({change.format(factor * (value - before))})"


def _markdown_table(table: Table) -> str:
    header, rows = table
    rule = "|".join(["---", *["---:"] * (len(header) - 1)])
    body = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {row} |" for row in body)])
