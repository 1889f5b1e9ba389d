"""``slm explain``: show how DTKR chose the knowledge for one question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import draw_bar, name_weights, print_json, print_line, print_table

if TYPE_CHECKING:
    from slm.answer import Candidate, Explanation

EXAMPLES = (
    'slm explain notes "A film that never ends, and should."',
    'slm explain notes "How far away is the moon?" --json',
)


def explain(
    store: StoreFolder,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to explain.", show_default=False)],
    is_truncating: IsTruncating = False,
    as_json: AsJson = False,
) -> None:
    """Show for one question how near every task is, which are refused, and what each is worth."""
    from slm.model import ScalableLM

    explanation = ScalableLM.open(store).explain(question, is_truncating=is_truncating)
    return print_json(explanation.as_dict()) if as_json else _print_decision(explanation)


def _print_decision(explanation: Explanation) -> None:
    candidates = explanation.candidates
    if not candidates:
        return print_line("abstained: the store has no task yet", "yellow")
    print_table(
        ("task", "probability", "", "distance", "threshold", "weight"),
        [(c.task, draw_bar(c.probability), *_numbers(c)) for c in candidates],
        num_texts=2,
    )
    if explanation.is_abstained:
        return print_line("abstained: every task is farther away than its threshold", "yellow")
    used = sorted(((c.task, c.weight) for c in candidates if c.weight > 0), key=lambda item: -item[1])
    print_line(f"answers with {name_weights(used)}")


def _numbers(candidate: Candidate) -> tuple[str, str, str, str]:
    near = f"{candidate.distance:.3f}", f"{candidate.threshold:.3f}"
    return f"{candidate.probability:.2f}", *near, f"{candidate.weight:.2f}"
