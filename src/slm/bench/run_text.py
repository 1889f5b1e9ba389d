"""The tables of a run as rows of text, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slm.bench.tables import Line, Result, Spread, by_number, drift_table, is_alone, leaderboard

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Header and rows; the first column is text, the others are numbers."""

FORMULAS = (
    "a[i][j] is the score on task j's test rows after learning task i; all tasks learned so far are asked in "
    "one shuffled list. average = (1/t) Σ a[t][j]; forgetting = mean over j < t of max over i ≥ j of a[i][j] "
    "− a[t][j]; backward transfer = mean over j < t of a[t][j] − a[j][j]; oracle gap = the oracle's average "
    "− the method's. Points of 100; ± is the sample deviation over orders and seeds. Bounds are told the "
    "task of every question, or see all tasks at once."
)


def leaderboard_table(lines: Sequence[Line]) -> Table:
    """One row per method: what it reaches and what it costs."""
    has_transfer = any(line.forward_transfer for line in lines)
    has_shots = len({line.per_label for line in lines}) > 1
    header = [
        "method",
        *(["of each label"] if has_shots else []),
        "average",
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


def task_table(lines: Sequence[Line]) -> Table:
    """Last score of every task, one row per method."""
    tasks = sorted(lines[0].scores)
    rows = [
        (line.title, *(f"{100 * line.scores[task]:.1f}" for task in tasks))
        for line in lines
        if line.per_label == lines[0].per_label
    ]
    return ("method", *tasks), rows


def drift_rows(results: Sequence[Result]) -> Table | None:
    """Loss and zero-shot scores of what was never learned; None where nothing was measured."""
    found = drift_table(results)
    if not found:
        return None
    tasks = list(found[0]["scores"])
    header = ("method", "loss on unrelated texts", *(f"{task}, zero-shot" for task in tasks), "refused")
    rows = []
    for row in sorted(found, key=lambda row: row["method"] != "frozen"):
        before = row["before"]
        rows.append(
            (
                row["title"],
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
    lines = leaderboard(results)
    parts = [
        f"## {run['title']}: preset {run['preset']}",
        f"{run['about'].capitalize()}. Backbone `{run['backbone']}`; {describe_cells(results)}.",
        _markdown_table(leaderboard_table(lines)),
        f"1% of a task's training rows takes {run['bytes_per_task_of_1_percent'] / 1e3:.1f} kB on average.",
        "Last score of every task:",
        _markdown_table(task_table(lines)),
    ]
    drift = drift_rows(results)
    if drift:
        parts += [
            "What was never learned, and in brackets the change against `frozen`:",
            _markdown_table(drift),
        ]
    commits = sorted({result["environment"]["commit"][:17] for result in results})
    device = sorted({result["environment"]["device"] for result in results})
    parts.append(f"    {command_of(run, results)}\n\nCommit {', '.join(commits)}; {', '.join(device)}.")
    return "\n\n".join(parts) + "\n"


def command_of(run: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The command that repeats a run."""
    words = ["slm bench", run["suite"], f"--preset {run['preset']}", "--data DATA"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in run["options"].items()]
    chosen = {
        "methods": sorted({result["cell"]["method"] for result in results}),
        "orders": sorted({r["cell"]["order"] for r in results if not is_alone(r)}),
        "seeds": sorted({str(result["cell"]["seed"]) for result in results}),
    }
    words += [f"--{name} {','.join(values)}" for name, values in chosen.items()]
    return " ".join([*words, *(["--alone"] if any(map(is_alone, results)) else []), "--out runs/x"])


def describe_cells(results: Sequence[Result]) -> str:
    """Orders, seeds and examples of some cells, in words."""
    orders = sorted({r["cell"]["order"] for r in results if not is_alone(r)}, key=by_number)
    seeds = sorted({r["cell"]["seed"] for r in results})
    examples = sorted({n for r in results for n in r["num_examples"]})
    span = f"{examples[0]}" if len(examples) == 1 else f"{examples[0]} to {examples[-1]}"
    told = ", ".join(orders)
    if partial := _partial_methods(results):
        told += f" ({'; '.join(partial)})"
    return f"orders {told}; seeds {', '.join(map(str, seeds))}; {span} examples a task"


def _partial_methods(results: Sequence[Result]) -> list[str]:
    """Methods that some orders lack, each with those it has: their means are of fewer cells than others'."""
    orders: dict[str, set[str]] = {}
    for result in results:
        if not is_alone(result):
            orders.setdefault(result["title"], set()).add(result["cell"]["order"])
    every = set().union(*orders.values())
    return [
        f"{title}: {', '.join(sorted(own, key=by_number))} alone"
        for title, own in sorted(orders.items())
        if own != every
    ]


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
