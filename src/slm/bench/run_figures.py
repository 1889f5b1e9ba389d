"""The figures of a run, drawn by matplotlib: one look for the page and for picture files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from slm.bench.report import open_figure
from slm.bench.tables import Line, Result, is_alone, num_shots, shared_cells, side_by_side

_PANELS_PER_ROW = 4
_WIDEST = 14.4
"""Inches of panels side by side: more would be shrunk on most screens."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a method is drawn, the same in every figure of every run.

    Attributes:
        colour: of line and marker.
        marker: its shape, hollow for bounds.
        is_bound: bounds are dashed and thin.
        width: of its line.
        layer: what is drawn over what.
    """

    colour: str
    marker: str
    is_bound: bool = False
    width: float = 1.3
    layer: int = 2

    @property
    def style(self) -> dict[str, Any]:
        """Arguments of matplotlib for a line."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": "white" if self.is_bound else self.colour,
            "markersize": 10 if self.marker == "*" else 5.5,
            "linestyle": (0, (5, 2)) if self.is_bound else "-",
            "linewidth": self.width,
            "zorder": self.layer,
        }


LOOKS = {
    "frozen": Look("#707070", "x"),
    "sequential": Look("#CC79A7", "v"),
    "sequential-lora": Look("#7818C0", "<"),
    "replay-1": Look("#486030", "p"),
    "replay-10": Look("#D55E00", "P"),
    "ewc": Look("#780060", "X"),
    "l2p": Look("#C0A860", "h"),
    "o-lora": Look("#300078", ">"),
    "progressive-prompts": Look("#999999", "v", is_bound=True, width=0.9, layer=1),
    "mean-key": Look("#E69F00", "^", layer=3),
    "slm-cosine": Look("#009E73", "s", layer=3),
    "slm-cosine-voting": Look("#77AA99", "s", is_bound=True, width=0.9, layer=1),
    "slm": Look("#0072B2", "o", width=3.0, layer=6),
    "slm-never-abstaining": Look("#56B4E9", "D", layer=4),
    "oracle": Look("#000000", "*", is_bound=True, width=1.8, layer=5),
    "joint": Look("#777777", "P", is_bound=True, width=0.9, layer=1),
    "joint-wide": Look("#AA9988", "X", is_bound=True, width=0.9, layer=1),
}
"""Of every method in ``slm.bench.baselines``."""

_UNKNOWN = Look("#444444", "d")


def look_of(method: str) -> Look:
    """The look of a method; that of all others for one that the package has no more."""
    return LOOKS.get(method, _UNKNOWN)


def draw_figures(results: Sequence[Result], lines: Sequence[Line]) -> dict[str, Any]:
    """Every figure that the cells have something for, by file name.

    Where the numbers of examples differ, all but the last are of that of :func:`side_by_side`.

    Args:
        results: cells of one run.
        lines: its leaderboard.
    """
    shown = [result for result in results if not is_alone(result)]
    titles = {line.method: line.title for line in lines}
    rank = {method: place for place, method in enumerate(titles)}
    beside = sorted(side_by_side(shown), key=lambda r: rank[r["cell"]["method"]])
    figures: dict[str, Any] = {}
    lived = [result for result in beside if not result["is_joint"] and len(result["tasks"]) > 1]
    if lived:
        figures["matrices"] = draw_matrices(lived)
        figures["curves"] = draw_curves(shared_cells(shown), titles)
    routed = [result for result in beside if result["confusion"] and len(result["tasks"]) > 1]
    if routed:
        figures["confusion"] = draw_confusions(routed)
    per_label = beside[0]["cell"]["per_label"]
    figures["costs"] = draw_costs([line for line in lines if line.per_label == per_label])
    if len({line.per_label for line in lines}) > 1:
        figures["shots"] = draw_shots(lines)
    return figures


def draw_matrices(results: Sequence[Result]) -> Any:
    """Accuracy matrices side by side on one colour scale: row i after task i, column j is task j."""

    def draw(ax: Any, result: Result) -> Any:
        t = len(result["tasks"])
        values = [[100 * v for v in row] + [math.nan] * (t - len(row)) for row in result["scores"]]
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row[: i + 1]):
                colour = "black" if value > 60 else "white"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
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

    return _panels(results, draw, "rows of the task (%)", "routed to", "true task")


def draw_curves(results: Sequence[Result], titles: Mapping[str, str]) -> Any:
    """Mean score of all tasks learned so far, against how many they are: forgetting is what falls.

    Tasks differ in difficulty, so a curve falls and rises with them; the distance between curves counts.
    """
    from matplotlib.ticker import MaxNLocator

    figure = open_figure(8.6, 4.8)
    ax = figure.subplots()
    for method, title in titles.items():
        own = [r for r in results if r["cell"]["method"] == method]
        if not own:
            continue
        means = [100 * fmean(fmean(r["scores"][i]) for r in own) for i in range(len(own[0]["scores"]))]
        ax.plot(range(1, len(means) + 1), means, label=title, **look_of(method).style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(left=0.5)
    ax.set_xlabel("tasks learned")
    ax.set_ylabel("mean score of the tasks learned (%)")
    ax.grid(color="0.92")
    _explain(ax, "dashed: bounds")
    return figure


def draw_costs(lines: Sequence[Line]) -> Any:
    """Final average against bytes kept per task, and against the time to learn one."""
    figure = open_figure(11, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    megabytes = [line.bytes_per_task / 1e6 for line in lines]
    # Learning nothing takes microseconds, which is no time.
    seconds = [round(line.learn_s.mean, 3) for line in lines]
    for line, size, time in zip(lines, megabytes, seconds, strict=True):
        for ax, value, spread in ((left, size, None), (right, time, line.learn_s.deviation)):
            ax.errorbar(
                value,
                100 * line.average.mean,
                xerr=spread,
                yerr=100 * (line.average.deviation or 0),
                label=line.title,
                **{**look_of(line.method).style, "linestyle": "none", "linewidth": 1},
            )
    _plain_scale(left, megabytes)
    _plain_scale(right, seconds)
    left.set_xlabel("megabytes kept per task")
    right.set_xlabel("seconds to learn a task")
    left.set_ylabel("average after the last task (%)")
    for ax in (left, right):
        ax.grid(color="0.92")
    _explain(right, "hollow: bounds")
    return figure


def draw_shots(lines: Sequence[Line]) -> Any:
    """Final average against examples of each label."""
    figure = open_figure(7.6, 4.2)
    ax = figure.subplots()
    shots = sorted({line.per_label for line in lines}, key=num_shots)
    for method in dict.fromkeys(line.method for line in lines):
        own = sorted((x for x in lines if x.method == method), key=lambda x: num_shots(x.per_label))
        places = [shots.index(line.per_label) for line in own]
        averages = [100 * line.average.mean for line in own]
        ax.plot(places, averages, label=own[0].title, **look_of(method).style)
    ax.set_xticks(range(len(shots)), [str(number or "all") for number in shots])
    ax.set_xlabel("examples of each label")
    ax.set_ylabel("average after the last task (%)")
    ax.grid(color="0.92")
    _explain(ax, "dashed: bounds")
    return figure


def _plain_scale(ax: Any, values: Sequence[float]) -> None:
    """A few plain numbers on the x axis, from zero; logarithmic above them where values span decades."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    known = [value for value in values if value > 0]
    if not known or max(known) <= 10 * min(known):
        end = ax.dataLim.x1 or 1
        ax.set_xlim(-0.03 * end if len(known) < len(values) else 0, 1.08 * end)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        return
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    ticks = [10.0**power for power in range(low, high + 1)]
    ax.set_xscale("symlog", linthresh=ticks[0], linscale=0.4)
    ax.set_xlim(-0.2 * ticks[0] if len(known) < len(values) else 0.8 * ticks[0], 1.25 * ticks[-1])
    ax.set_xticks([0.0, *ticks] if len(known) < len(values) else ticks)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _explain(ax: Any, title: str) -> None:
    """The legend, beside the axes."""
    handles, labels = ax.get_legend_handles_labels()
    # Of a point with bars, the point alone.
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    legend = ax.legend(handles, labels, title=title, frameon=False, fontsize=8, alignment="left")
    legend.set_loc("center left")
    legend.set_bbox_to_anchor((1.01, 0.5))


def _panels(results: Sequence[Result], draw: Any, label: str, x_label: str, y_label: str) -> Any:
    size = 1.6 + 0.21 * max(len(result["tasks"]) for result in results)
    columns = min(_PANELS_PER_ROW, len(results), int(_WIDEST / size) or 1)
    rows = math.ceil(len(results) / columns)
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
    bar = figure.colorbar(image, ax=grid, shrink=1 / rows, aspect=30, pad=0.01, anchor=(0, 1))
    bar.set_label(label, fontsize=8)
    return figure


def _name_ticks(ax: Any, names: Sequence[str]) -> None:
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
