"""The plane of a map, as plotly describes figures: regions, reaches, questions and keys."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from slm.bench.map.labels import Label, arrange_labels, shorten
from slm.bench.map.store_map import MappedQuestion, StoreMap
from slm.bench.map.style import HEIGHT_PX, INK, Figure, base_layout, rule
from slm.retrieval.plane import Place

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagram", "triangle-down", "star")
"""A task is known by colour and symbol together, so 56 tasks differ."""
MIN_WIDTH_PX = 620
"""Width for which labels are arranged; on a wider page they only move apart."""

_MARGINS_PX = {"l": 56, "r": 12, "t": 62, "b": 52}
_TEXT_LENGTH, _LINE_LENGTH = 160, 60
_NUM_LARGE = 60
"""Keys up to which marks are large."""

Looks = Mapping[str, tuple[str, str]]
"""Task -> colour and symbol."""


def draw_plane(drawn: StoreMap) -> Figure:
    """Regions, keys and questions of a map; colour and symbol say to which task they go."""
    looks = choose_looks(drawn)
    asked = [q for q in drawn.questions if not q.is_abstained]
    refused = [q for q in drawn.questions if q.is_abstained]
    wrong = [q for q in drawn.questions if q.is_misrouted]
    traces = [_region(name, outlines, looks[name][0]) for name, outlines in drawn.regions.items()]
    traces.append(_lines(drawn.borders, {"width": 2, "color": "#FFFFFF"}))
    traces += _reaches(drawn, looks)
    size = 7 if len(drawn.keys) <= _NUM_LARGE else 5
    if asked:
        marker = {
            "size": size,
            "color": [looks[q.nearest][0] for q in asked],
            "symbol": [looks[q.nearest][1] for q in asked],
            "line": {"width": 0.7, "color": INK},
            "opacity": 0.9,
        }
        traces += _points("question", asked, marker, {"size": size, "color": "#888888"})
    if refused:
        marker = {"size": 8, "symbol": "x-thin", "line": {"width": 2, "color": "#000000"}}
        traces += _points("abstained", refused, marker, marker)
    if wrong:
        marker = {"size": 15, "symbol": "circle-open", "color": "#B00020", "line": {"width": 2.5}}
        traces += _points("misrouted", wrong, marker, marker)
    traces += _keys(drawn, looks)
    return {"data": traces, "layout": _layout(drawn)}


def choose_looks(drawn: StoreMap) -> dict[str, tuple[str, str]]:
    """Colour and symbol per task: a colour comes again with another symbol, as far away as can be."""
    centres: dict[str, Place] = {}
    for name in drawn.tasks:
        own = [key.place for key in drawn.keys if key.task == name]
        centres[name] = (sum(x for x, _ in own) / len(own), sum(y for _, y in own) / len(own))
    looks: dict[str, tuple[str, str]] = {}
    users: dict[str, list[str]] = {colour: [] for colour in COLOURS}
    for name in drawn.tasks:
        fewest = min(map(len, users.values()))

        def room(colour: str, name: str = name) -> float:
            return min(
                (math.dist(centres[name], centres[other]) for other in users[colour]), default=math.inf
            )

        colour = max((c for c in COLOURS if len(users[c]) <= fewest + 1), key=room)
        looks[name] = colour, SYMBOLS[len(users[colour]) % len(SYMBOLS)]
        users[colour].append(name)
    return looks


def _region(name: str, cells: Iterable[Sequence[Place]], colour: str) -> Figure:
    """One task's region, all its cells in one trace; its own lines close the seams between them."""
    pale = _pale(colour)
    trace = _lines([[*cell, cell[0]] for cell in cells], {"width": 1, "color": pale})
    return trace | {"fill": "toself", "fillcolor": pale, "name": name}


def _reaches(drawn: StoreMap, looks: Looks) -> list[Figure]:
    """Outlines of how far keys reach; where they are only shadows they are hidden at first."""
    traces: list[Figure] = []
    for name in drawn.tasks:
        own = [outline for task, outline in drawn.reaches if task == name]
        if own:
            trace = _lines(own, {"width": 1.5, "dash": "dot", "color": looks[name][0]})
            trace |= {"name": "reach of a key", "legendgroup": "reach", "showlegend": not traces}
            traces.append(trace | {"visible": True if drawn.is_reach_exact else "legendonly"})
    return traces


def _points(name: str, asked: Sequence[MappedQuestion], marker: Figure, in_legend: Figure) -> list[Figure]:
    marks = _marks([q.place for q in asked], [tell_question(q) for q in asked], marker)
    return [marks | {"name": name, "legendgroup": name}, _entry(name, len(asked), in_legend)]


def _keys(drawn: StoreMap, looks: Looks) -> list[Figure]:
    numbers: dict[str, int] = {}
    hovers = []
    for key in drawn.keys:
        numbers[key.task] = numbers.get(key.task, 0) + 1
        limit = f"<br>refuses beyond {key.threshold:.2f}" if math.isfinite(key.threshold) else ""
        hovers.append(f"<b>key {numbers[key.task]} of {key.task}</b>{limit}")
    is_large = len(drawn.keys) <= _NUM_LARGE
    line = {"width": 2.5 if is_large else 1.5, "color": "#000000"}
    plain = {"size": 13 if is_large else 9, "color": "#BBBBBB", "line": line}
    marker = plain | {
        "color": [looks[key.task][0] for key in drawn.keys],
        "symbol": [looks[key.task][1] for key in drawn.keys],
    }
    marks = _marks([key.place for key in drawn.keys], hovers, marker)
    return [marks | {"name": "key", "legendgroup": "key"}, _entry("key", len(hovers), plain)]


def _marks(places: Sequence[Place], hovers: Sequence[str], marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [_rounded(x) for x, _ in places],
        "y": [_rounded(y) for _, y in places],
        "marker": marker,
        "hovertext": hovers,
        "hoverinfo": "text",
        "showlegend": False,
    }


def _entry(name: str, count: int, marker: Figure) -> Figure:
    """An entry of the legend by itself, as marks of many colours have none that stands for all."""
    entry = {"type": "scatter", "mode": "markers", "x": [None], "y": [None], "marker": marker}
    return entry | {"name": f"{name} ({count})", "legendgroup": name}


def _lines(lines: Iterable[Sequence[Place]], line: Figure) -> Figure:
    """Lines one after the other in one trace, with gaps between them."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for places in lines:
        xs += [*(_rounded(x) for x, _ in places), None]
        ys += [*(_rounded(y) for _, y in places), None]
    trace = {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": line}
    return trace | {"hoverinfo": "skip", "showlegend": False}


def _layout(drawn: StoreMap) -> Figure:
    (left, right), (low, high) = _view(drawn)
    across, upwards = _titles(drawn)
    axis = {
        "automargin": True,
        "linecolor": "#999999",
        "mirror": True,
        "showgrid": False,
        "ticks": "outside",
        "zeroline": False,
    }
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "bgcolor": "rgba(0,0,0,0)"}
    layout = base_layout(_MARGINS_PX) | {
        "annotations": _names(drawn, (left, right), (low, high)),
        "legend": legend,
        "xaxis": axis | {"range": [left, right], "title": {"text": across, "standoff": 8}},
        "yaxis": axis | {"range": [low, high], "title": {"text": upwards, "standoff": 8}},
    }
    if drawn.num_axes == 2:
        layout["yaxis"]["scaleanchor"] = "x"  # distances are distances in every direction
    elif drawn.is_abstaining:
        layout["shapes"] = [rule("y", 0.0)]
    if not drawn.num_axes:
        layout["xaxis"]["showticklabels"] = False
    return layout


def _names(drawn: StoreMap, across: Place, upwards: Place) -> list[Figure]:
    """The name of every task beside its first key, where there is room for it."""
    step_x = (across[1] - across[0]) / (MIN_WIDTH_PX - _MARGINS_PX["l"] - _MARGINS_PX["r"])
    step_y = (upwards[1] - upwards[0]) / (HEIGHT_PX - _MARGINS_PX["t"] - _MARGINS_PX["b"])
    if drawn.num_axes == 2:
        step_x = step_y = max(step_x, step_y)
    marks = [(key.place[0] / step_x, -key.place[1] / step_y) for key in drawn.keys]
    labels: dict[str, Label] = {}
    for key, (x, y) in zip(drawn.keys, marks, strict=True):
        labels.setdefault(key.task, Label(shorten(key.task), x, y))
    window = across[0] / step_x, -upwards[1] / step_y, across[1] / step_x, -upwards[0] / step_y
    return [
        {
            "x": label.x * step_x,
            "y": -label.y * step_y,
            "text": label.text,
            "ax": dx,
            "ay": dy,
            "bgcolor": "rgba(255,255,255,0.82)",
            "borderpad": 1,
            "arrowhead": 0,
            "arrowwidth": 1,
            "arrowcolor": "#555555",
            "standoff": 7,
        }
        for label, (dx, dy) in arrange_labels(list(labels.values()), marks, window)
    ]


def _titles(drawn: StoreMap) -> tuple[str, str]:
    if drawn.num_axes == 2:
        return "first direction", "second direction"
    beyond = "distance − threshold (above 0 is refused)" if drawn.is_abstaining else "distance to the key"
    across = (
        "the one direction in which the keys differ" if drawn.num_axes else "questions, one beside the other"
    )
    return across, beyond


def _view(drawn: StoreMap) -> tuple[Place, Place]:
    """The part of the plane that is shown first: all keys and questions, with some room around."""
    places = [*(key.place for key in drawn.keys), *(question.place for question in drawn.questions)]
    if drawn.is_reach_exact:
        places += [place for _, outline in drawn.reaches for place in outline]
    if drawn.num_axes < 2 and drawn.is_abstaining:
        places.append((places[0][0], 0.0))  # the threshold is always in view
    across, upwards = (_span([place[i] for place in places]) for i in (0, 1))
    return across, upwards


def _span(values: Sequence[float]) -> Place:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def tell_question(question: MappedQuestion) -> str:
    """What is shown of a question under the pointer; its words are made harmless."""
    words = " ".join(question.text.split())
    if len(words) > _TEXT_LENGTH:
        words = words[: _TEXT_LENGTH - 1] + "…"
    strange = "" if question.is_of_store else " (not learned)"
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in question.weights)
    limit = f", threshold {question.threshold:.2f}" if math.isfinite(question.threshold) else ""
    told = [
        *(f"<b>{html.escape(line, quote=False)}</b>" for line in textwrap.wrap(words, _LINE_LENGTH)),
        f"task: {question.task or 'not said'}{strange}",
        f"nearest: {question.nearest}" + (" (misrouted)" if question.is_misrouted else ""),
        f"weights: {weights}" if weights else "abstained: no task's knowledge was used",
        f"distance {question.distance:.2f}{limit}",
    ]
    if question.region != question.nearest:
        told.append(f"drawn in the region of {question.region}")
    return "<br>".join(told)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _pale(colour: str) -> str:
    """The colour mixed with white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - 0.26 * (255 - part)):02X}" for part in parts)
