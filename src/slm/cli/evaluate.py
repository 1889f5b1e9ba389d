"""``slm evaluate``: measure a store on test examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.opening import open_model
from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import is_on_terminal, print_json, print_line, print_table

if TYPE_CHECKING:
    from slm.evaluation import Evaluation

EXAMPLES = (
    "slm evaluate notes data --plot matrix.png",
    "slm evaluate notes data --tasks film-sentiment,question-topics --limit 100 --json",
)


def evaluate(
    store: StoreFolder,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA_FOLDER", help="Holds NAME/train.jsonl and NAME/test.jsonl.", show_default=False
        ),
    ],
    names: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,...", help="Only these tasks.", show_default="all")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Ask at most N test rows of each task.")
    ] = None,
    is_truncating: IsTruncating = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the accuracy matrix into this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a store answers, after each task it learned and now."""
    from slm.tasks import Stream

    chosen = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    stream = Stream.load(data, chosen)
    model = open_model(store)
    evaluation = model.evaluate(
        stream, limit=limit, is_truncating=is_truncating, has_progress=is_on_terminal()
    )
    if plot is not None:
        from slm.bench.report import Panel, plot_matrices

        plot_matrices([Panel(f"slm, {store}", evaluation.tasks, evaluation.scores)], plot)
    return print_json(evaluation.as_dict()) if as_json else _print_evaluation(evaluation)


def _print_evaluation(evaluation: Evaluation) -> None:
    scores = ("first", "last", "oracle", "misrouting")
    print_table(
        ("task", "metric", "rows", "first", "last", "oracle", "misrouted"),
        [
            (row["task"], row["metric"], str(row["num_rows"]), *(f"{row[name]:.3f}" for name in scores))
            for row in evaluation.rows()
        ],
        num_texts=2,
    )
    values = {
        "average": evaluation.average,
        "forgetting": evaluation.forgetting,
        "backward transfer": evaluation.backward_transfer,
        "forward transfer": evaluation.forward_transfer,
        "oracle gap": evaluation.oracle_gap,
        "misrouting": evaluation.misrouting,
        "false refusals": evaluation.false_refusal_rate,
    }
    known = [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
    print_line(f"\n{', '.join(known)}")
