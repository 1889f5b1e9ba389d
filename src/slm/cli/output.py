"""What the commands print: JSON for programs, text for people, one line for every failure."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_ENDLESS = 10_000
"""Columns that no table needs."""


def print_json(value: object) -> None:
    """Print one JSON document, at once and in ASCII, so that no terminal's encoding can break it."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_line(text: str = "", style: str | None = None) -> None:
    """Print text as it is: never wrapped, brackets are no markup, and off a terminal nothing changes."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)
    else:
        sys.stdout.write(f"{text}\n")


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    num_texts: int = 1,
    styles: Sequence[str] | None = None,
    has_bars: bool = False,
) -> None:
    """Print a table; the first ``num_texts`` columns are texts, the others numbers.

    Off a terminal no column is cut short, however long the lines become; ``styles``, one a row, are unseen.
    On a terminal that is too narrow all texts are folded, the first column to no less than a quarter of it;
    with ``has_bars`` the other texts are bars, which are cut short instead.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(header):
        is_text = number < num_texts
        table.add_column(title, justify="left" if is_text else "right", no_wrap=number == 0 or not is_text)
    for number, (first, *others) in enumerate(cells):
        name = Text(first, no_wrap=False, overflow="fold")
        texts = [Text(cell, no_wrap=has_bars, overflow=None if has_bars else "fold") for cell in others]
        table.add_row(name, *texts, style=styles[number] if styles else None)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_ENDLESS)
    elif console.measure(table, options=console.options.update(width=_ENDLESS)).maximum > console.width:
        longest = max(len(row[0]) for row in [header, *cells])
        table.columns[0].width = min(longest, console.width // 4)
    console.print(table)


def print_failure(message: str) -> None:
    """Print why a command failed, as one line on standard error."""
    sys.stderr.write(f"slm: {' '.join(message.splitlines())}\n")


def print_report(report: Mapping[str, Any]) -> None:
    """Print what learning a task took and gave, from its report as plain values."""
    print_line(f"learned {report['task']} ({report['kind']}, {report['num_examples']} examples)")
    for part, number in (("test", ""), ("validation", f"{report['num_validation']} ")):
        if report[f"{part}_score"] is not None:
            score = f"{report[f'{part}_metric']} {report[f'{part}_score']:.3f}"
            print_line(f"{score} on {number}{part} examples")
    if report["started_from"]:
        print_line(f"started from {', '.join(report['started_from'])}", "dim")
    history = report["key_history"]
    if history:
        print_line(
            f"key loss {history['losses'][0]:.3f} at first, {history['losses'][-1]:.3f} at last", "dim"
        )
    size = f"{report['size_bytes'] / 1e6:.2f} MB"
    print_line(f"{report['num_epochs']:g} epochs, {report['time_s']:.1f} s, {size}", "dim")


def draw_bar(share: float, mark: float, num_columns: int = 20) -> str:
    """A bar of a length in 0..1 with a mark on its way, "███|░░": solid to the mark and pale beyond it.

    Blanks fill it up to ``num_columns``. It is drawn in ASCII where standard output has no blocks. The mark
    stands on the right side of the bar's end however near the two are.
    """
    solid, pale, line = "█░│" if _can_print("█░│") else "#.|"
    end, place = (min(num_columns - 1, max(0, round(value * (num_columns - 1)))) for value in (share, mark))
    if share > mark:
        end = max(end, min(place + 1, num_columns - 1))
        place = min(place, end - 1)
    cells = [solid if i < place else pale for i in range(end + (share > mark))]
    cells += [" "] * (num_columns - len(cells))
    cells[place] = line
    return "".join(cells)


def _can_print(text: str) -> bool:
    """Whether standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def name_weights(tasks: Iterable[tuple[str, float]]) -> str:
    """Tasks and what each gave, as "film 0.93, news 0.07"."""
    return ", ".join(f"{name} {weight:.2f}" for name, weight in tasks)


def is_on_terminal() -> bool:
    """Whether somebody watches standard error, where progress bars go."""
    return sys.stderr.isatty()


@contextmanager
def show_activity(what: str) -> Iterator[None]:
    """Show on a terminal's standard error that something goes on, until it is done; elsewhere nothing."""
    if not is_on_terminal():
        yield
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True, force_terminal=True).status(escape(what)):
        yield


def _finite(value: Any) -> Any:
    """The value with null where a number is NaN or infinite, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
