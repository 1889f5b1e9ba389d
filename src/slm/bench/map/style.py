"""What both figures of a map have in common, as plotly describes figures."""

from __future__ import annotations

from typing import Any

Figure = dict[str, Any]
"""A figure, or a part of one."""

INK = "#222222"
HEIGHT_PX = 640
"""Of each figure."""


def base_layout(margins: Figure) -> Figure:
    """Type, size and hover of a figure; plotly's template, which is large, is left out."""
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "height": HEIGHT_PX,
        "hoverlabel": {"align": "left", "bgcolor": "#FFFFFF"},
        "hovermode": "closest",
        "margin": margins,
        "plot_bgcolor": "#FFFFFF",
        "template": {},
    }


def rule(axis: str, value: float) -> Figure:
    """A line right across the figure, where ``axis`` ("x" or "y") has this value."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", "line": {"color": INK, "width": 1.5}} | ends
