"""The figures of a run, drawn by matplotlib: one look for the page and for picture files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from slm.bench.report import open_figure
from slm.bench.tables import Line, Result, is_alone, num_shots

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"
_NUM_WITH_VALUES = 8
_PANELS_PER_ROW = 4


def draw_figures(results: Sequence[Result], lines: Sequence[Line]) -> dict[str, Any]:
    """Every figure that the cells have something for, by file name.

    Args:
        results: cells of one run.
        lines: its leaderboard.
    """
    shown = [result for result in results if not is_alone(result)]
    titles = {line.method: line.title for line in lines}
    looks = {
        method: (_COLOURS[i % len(_COLOURS)], _MARKERS[(i // len(_COLOURS) + i) % len(_MARKERS)])
        for i, method in enumerate(sorted(titles))
    }
    rank = {line.method: place for place, line in enumerate(lines)}
    representative = sorted(_one_order(shown), key=lambda r: rank[r["cell"]["method"]])
    figures: dict[str, Any] = {}
    lived = [result for result in representative if not result["is_joint"] and len(result["tasks"]) > 1]
    if lived:
        figures["matrices"] = draw_matrices(lived)
        figures["curves"] = draw_curves(_shared_orders(shown) or lived, titles, looks)
    routed = [result for result in representative if result["confusion"] and len(result["tasks"]) > 1]
    if routed:
        figures["confusion"] = draw_confusions(routed)
    figures["costs"] = draw_costs([line for line in lines if line.per_label == lines[0].per_label], looks)
    if len({line.per_label for line in lines}) > 1:
        figures["shots"] = draw_shots(lines, looks)
    return figures


def draw_matrices(results: Sequence[Result]) -> Any:
    """Accuracy matrices side by side on one colour scale: row i after task i, column j is task j."""

    def draw(ax: Any, result: Result) -> Any:
        t = len(result["tasks"])
        values = [[100 * v for v in row] + [math.nan] * (t - len(row)) for row in result["scores"]]
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        if t <= _NUM_WITH_VALUES:
            for i, row in enumerate(values):
                for j, value in enumerate(row[: i + 1]):
                    colour = "black" if value > 60 else "white"
                    ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        _name_ticks(ax, result["tasks"])
        return image

    return _panels(results, draw, "score (%)", "task asked", "after learning")


def draw_confusions(results: Sequence[Result]) -> Any:
    """Routing of the test rows after the last task: row i the true task, column j the task routed to."""

    def draw(ax: Any, result: Result) -> Any:
        shares = [[100 * n / max(1, sum(row)) for n in row] for row in result["confusion"]]
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                if i != j and share >= 1:
                    ax.text(j, i, f"{share:.0f}", ha="center", va="center", color="#D55E00", fontsize=7)
        _name_ticks(ax, result["tasks"])
        return image

    return _panels(results, draw, "share of a task's rows (%)", "routed to", "true task")


def draw_curves(
    results: Sequence[Result], titles: Mapping[str, str], looks: Mapping[str, tuple[str, str]]
) -> Any:
    """Mean score of all tasks learned so far, against how many they are: forgetting is what falls.

    Tasks differ in difficulty, so a curve falls and rises with them; the distance between curves counts.
    """
    figure = open_figure(8.6, 4.6)
    ax = figure.subplots()
    for method in sorted(titles, key=titles.__getitem__):
        own = [r for r in results if r["cell"]["method"] == method and not r["is_joint"]]
        most = max((num_shots(r["cell"]["per_label"]) for r in own), default=None)
        own = [r for r in own if num_shots(r["cell"]["per_label"]) == most]
        if not own:
            continue
        means = [100 * fmean(fmean(r["scores"][i]) for r in own) for i in range(len(own[0]["scores"]))]
        colour, marker = looks[method]
        style = "--" if own[0]["needs_task_id"] else "-"
        steps = range(1, len(means) + 1)
        ax.plot(steps, means, style, color=colour, marker=marker, ms=4, lw=1.4, label=titles[method])
    ax.set_xlabel("tasks learned")
    ax.set_ylabel("mean score of the tasks learned (%)")
    ax.grid(color="0.92")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draw_costs(lines: Sequence[Line], looks: Mapping[str, tuple[str, str]]) -> Any:
    """Final average against bytes kept per task, and against the time to learn one."""
    figure = open_figure(11, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for line in lines:
        colour, marker = looks[line.method]
        face = "none" if line.is_bound else colour
        for ax, value in ((left, line.bytes_per_task / 1e6), (right, line.learn_s)):
            ax.errorbar(
                max(value, 1e-3),
                100 * line.average.mean,
                yerr=100 * (line.average.deviation or 0),
                fmt=marker,
                color=colour,
                markerfacecolor=face,
                ms=7,
                label=line.title if ax is right else None,
            )
    for ax, label in ((left, "megabytes kept per task"), (right, "seconds to learn a task")):
        ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.grid(color="0.92", which="both")
    left.set_ylabel("average after the last task (%)")
    right.legend(
        frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), title="hollow: bounds"
    )
    return figure


def draw_shots(lines: Sequence[Line], looks: Mapping[str, tuple[str, str]]) -> Any:
    """Final average against examples of each label."""
    figure = open_figure(7.6, 4.2)
    ax = figure.subplots()
    shots = sorted({line.per_label for line in lines}, key=num_shots)
    for method in sorted({line.method for line in lines}):
        own = sorted((x for x in lines if x.method == method), key=lambda x: num_shots(x.per_label))
        colour, marker = looks[method]
        places = [shots.index(line.per_label) for line in own]
        ax.plot(places, [100 * x.average.mean for x in own], color=colour, marker=marker, label=own[0].title)
    ax.set_xticks(range(len(shots)), [str(number or "all") for number in shots])
    ax.set_xlabel("examples of each label")
    ax.set_ylabel("average after the last task (%)")
    ax.grid(color="0.92")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _shared_orders(results: Sequence[Result]) -> list[Result]:
    """The cells of the orders that every method has; curves of other tasks first cannot be compared."""
    orders: dict[str, set[str]] = {}
    for result in results:
        if not result["is_joint"]:
            orders.setdefault(result["cell"]["method"], set()).add(result["cell"]["order"])
    shared = set.intersection(*orders.values())
    return [result for result in results if result["cell"]["order"] in shared]


def _one_order(results: Sequence[Result]) -> list[Result]:
    """One cell of each method, all of the order that most have: of the first seed, with the most examples."""
    methods: dict[str, set[str]] = {}
    for result in results:
        methods.setdefault(result["cell"]["order"], set()).add(result["cell"]["method"])
    order = max(sorted(methods), key=lambda name: len(methods[name]), default=None)
    chosen: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: (r["cell"]["seed"], -num_shots(r["cell"]["per_label"]))):
        if result["cell"]["order"] == order:
            chosen.setdefault(result["cell"]["method"], result)
    return list(chosen.values())


def _panels(results: Sequence[Result], draw: Any, label: str, x_label: str, y_label: str) -> Any:
    columns = min(_PANELS_PER_ROW, len(results))
    rows = math.ceil(len(results) / columns)
    size = 1.5 + 0.19 * max(len(result["tasks"]) for result in results)
    figure = open_figure(columns * size + 1.2, rows * (size + 0.35))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for place, result in enumerate(results):
        ax = grid[place // columns][place % columns]
        image = draw(ax, result)
        ax.set_title(result["title"], fontsize=9)
        if place % columns == 0:
            ax.set_ylabel(y_label)
        if place + columns >= len(results):
            ax.set_xlabel(x_label)
            ax.tick_params(labelbottom=True)
    for place in range(len(results), rows * columns):
        grid[place // columns][place % columns].set_axis_off()
    figure.colorbar(image, ax=grid, label=label, shrink=0.6, aspect=36, pad=0.01)
    return figure


def _name_ticks(ax: Any, names: Sequence[str]) -> None:
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
