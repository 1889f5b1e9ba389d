"""``slm explain``: show how DTKR chose the knowledge for one question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.opening import open_model
from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import draw_bar, name_weights, print_json, print_line, print_table

if TYPE_CHECKING:
    from slm.answer import Candidate, Explanation

EXAMPLES = (
    'slm explain notes "A film that never ends, and should."',
    'slm explain notes "How far away is the moon?" --json',
)

NUM_SHOWN = 12
"""How many of the nearest tasks are drawn."""

_STYLES = {"used": "green", "in reach": "", "too far": "dim"}


def explain(
    store: StoreFolder,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to explain.", show_default=False)],
    is_truncating: IsTruncating = False,
    as_json: AsJson = False,
) -> None:
    """Show for one question how near every task is, which are refused, and what each is worth."""
    explanation = open_model(store).explain(question, is_truncating=is_truncating)
    return print_json(explanation.as_dict()) if as_json else _print_decision(explanation)


def _print_decision(explanation: Explanation) -> None:
    shown = explanation.candidates[:NUM_SHOWN]
    if not shown:
        return print_line("abstained: the store has no task yet", "yellow")
    print_table(
        ("task", "distance | threshold", "distance", "threshold", "posterior", "weight", "verdict"),
        [(c.task, bar, *_numbers(c)) for c, bar in zip(shown, _bars(shown), strict=True)],
        num_texts=2,
        styles=[_STYLES[_verdict(c)] for c in shown],
        has_bars=True,
    )
    num_left_out = len(explanation.candidates) - len(shown)
    if num_left_out:
        print_line(f"{num_left_out} farther tasks are left out, --json has them all", "dim")
    if explanation.is_contested:
        print_line(f"two tasks claimed it, a runoff between them decided for {shown[0].task}")
    nearest = shown[0]
    reach = f"{nearest.distance:.3f}, its threshold is {nearest.threshold:.3f}"
    if explanation.is_abstained:
        return print_line(f"abstained: {nearest.task} is nearest and too far: {reach}", "yellow")
    used = sorted(
        ((c.task, c.weight) for c in explanation.candidates if c.weight > 0), key=lambda item: -item[1]
    )
    print_line(f"answers with {name_weights(used)}")


def _verdict(candidate: Candidate) -> str:
    if candidate.weight > 0:
        return "used"
    return "too far" if candidate.distance > candidate.threshold else "in reach"


def _numbers(candidate: Candidate) -> tuple[str, ...]:
    near = f"{candidate.distance:.3f}", f"{candidate.threshold:.3f}"
    return *near, f"{candidate.probability:.2f}", f"{candidate.weight:.2f}", _verdict(candidate)


def _bars(candidates: Sequence[Candidate]) -> list[str]:
    """Distances as bars that start at 0, or at the smallest, and end at the largest of those shown.

    The scale is a square root, as distances are squares: far tasks would press near ones into one column.
    """
    ends = [v for c in candidates for v in (c.distance, c.threshold) if math.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, *ends])

    def place(value: float) -> float:
        return math.sqrt(min(max((value - low) / (high - low or 1.0), 0.0), 1.0))

    return [draw_bar(place(c.distance), place(c.threshold)) for c in candidates]
