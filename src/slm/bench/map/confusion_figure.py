"""The confusion matrix of a map, as plotly describes figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slm.bench.map.labels import shorten
from slm.bench.map.store_map import Confusion
from slm.bench.map.style import Figure, base_layout, rule

NUM_WITH_SHARES, NUM_WITH_COUNTS, NUM_TICKS = 10, 31, 40
"""Rows and columns up to which cells hold shares, and counts, and up to which every line has its name."""

_SCALE = [[0, "#D55E00"], [0.5, "#FFFFFF"], [1, "#0072B2"]]
_NUM_IN_LARGE_TYPE = 13


def draw_confusion(confusion: Confusion) -> Figure:
    """Task of the question × task given; a row's shares are blue where they are right, orange where not."""
    columns = confusion.columns
    num_lines = max(len(confusion.rows), len(columns))
    is_large = num_lines > NUM_WITH_COUNTS
    shades, texts, hovers = _cells(confusion)
    heat = {
        "type": "heatmap",
        "z": shades,
        "zmin": -1,
        "zmax": 1,
        "colorscale": _SCALE,
        "showscale": False,
        "text": texts,
        "texttemplate": "" if is_large else "%{text}",
        "textfont": {"size": 12 if num_lines <= _NUM_IN_LARGE_TYPE else 9},
        "hovertext": hovers,
        "hoverinfo": "text",
        "xgap": 0 if is_large else 1,
        "ygap": 0 if is_large else 1,
    }
    sizes = [sum(line) for line in confusion.counts]
    names = [f"{shorten(row)} ({size})" for row, size in zip(confusion.rows, sizes, strict=True)]
    rules = [rule("x", len(columns) - 1.5)]
    if 0 < confusion.num_learned < len(confusion.rows):
        rules.append(rule("y", confusion.num_learned - 0.5))
    layout = base_layout({"l": 20, "r": 12, "t": 62, "b": 20}) | {
        "shapes": rules,
        "xaxis": _ticks([shorten(c) for c in columns], "task given") | {"tickangle": -60},
        "yaxis": _ticks(names, "task of the question (how many)") | {"autorange": "reversed"},
    }
    return {"data": [heat], "layout": layout}


def _cells(confusion: Confusion) -> tuple[list[list[float]], list[list[str]], list[list[str]]]:
    """Shade, text and hover of every cell."""
    columns, num_lines = confusion.columns, max(len(confusion.rows), len(confusion.columns))
    shades, texts, hovers = [], [], []
    for number, (row, counts) in enumerate(zip(confusion.rows, confusion.counts, strict=True)):
        shares = [count / sum(counts) for count in counts]
        right = row if number < confusion.num_learned else columns[-1]
        # The root keeps single mistakes visible.
        shades.append([s if c == right else -math.sqrt(s) for c, s in zip(columns, shares, strict=True)])
        cells = list(zip(columns, counts, shares, strict=True))
        texts.append([_cell(count, share, num_lines) for _, count, share in cells])
        hovers.append(
            [
                f"task {row}<br>given {column}<br>{count} of {sum(counts)} questions ({100 * share:.1f}%)"
                for column, count, share in cells
            ]
        )
    return shades, texts, hovers


def _cell(count: int, share: float, num_lines: int) -> str:
    if not count:
        return ""
    return f"{count}<br>{100 * share:.0f}%" if num_lines <= NUM_WITH_SHARES else str(count)


def _ticks(names: Sequence[str], title: str) -> Figure:
    """An axis of names, of very many only some, the last one always."""
    step = math.ceil(len(names) / NUM_TICKS)
    shown = [*range(0, len(names) - step, step), len(names) - 1]
    return {
        "tickvals": shown,
        "ticktext": [names[i] for i in shown],
        "tickfont": {"size": 12 if len(names) <= _NUM_IN_LARGE_TYPE else 10},
        "title": {"text": title, "standoff": 10},
        "automargin": True,
        "constrain": "domain",
        "showgrid": False,
        "zeroline": False,
    }
