"""Names beside points without one lying on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_CHARACTER_PX, _LINE_PX, _MARK_PX = 7.0, 17.0, 9.0
"""Width of a character and height of a line of 12 px type, and half the width of a mark, generously."""
_GAPS_PX = (20, 34, 52, 74)
_TURNS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_LONGEST = 24


@dataclass(frozen=True, slots=True)
class Label:
    """A name and the point that it names, in pixels; y grows downwards."""

    text: str
    x: float
    y: float


def arrange_labels(
    labels: Sequence[Label], marks: Sequence[tuple[float, float]], window: Box
) -> list[tuple[Label, tuple[float, float]]]:
    """Where the middle of each label goes, relative to its point.

    Labels take the first free place near their point, one after the other; one that finds none is left out.

    Args:
        labels: in order of importance.
        marks: points that no label may cover.
        window: what labels must stay in.
    """
    taken = [_box(x, y, _MARK_PX, _MARK_PX) for x, y in marks]
    placed = []
    for label in labels:
        half_width, half_height = _CHARACTER_PX * len(label.text) / 2 + 2, _LINE_PX / 2
        for gap in _GAPS_PX:
            for turn_x, turn_y in _TURNS:
                dx = turn_x * (gap - _GAPS_PX[0] + _MARK_PX + 6 + half_width)
                dy = turn_y * (gap if turn_x == 0 else gap * 0.8)
                box = _box(label.x + dx, label.y + dy, half_width, half_height)
                if _is_inside(box, window) and not any(_overlaps(box, other) for other in taken):
                    break
            else:
                continue
            taken.append(box)
            placed.append((label, (dx, dy)))
            break
    return placed


def shorten(name: str) -> str:
    """A long name with its middle left out, as beginnings and ends tell names apart."""
    if len(name) <= _LONGEST:
        return name
    half = (_LONGEST - 1) // 2
    return f"{name[: _LONGEST - 1 - half]}…{name[-half:]}"


def _box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _is_inside(box: Box, window: Box) -> bool:
    return box[0] >= window[0] and box[1] >= window[1] and box[2] <= window[2] and box[3] <= window[3]


def _overlaps(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
