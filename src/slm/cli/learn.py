"""``slm learn``: teach one task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.interrupts import admitting
from slm.cli.opening import open_model
from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import is_on_terminal, print_json, print_line, print_report

if TYPE_CHECKING:
    from slm.model import ScalableLM
    from slm.tasks import Task

EXAMPLES = (
    "slm learn notes film-sentiment films.jsonl --test films-test.jsonl",
    "slm learn notes film-sentiment films.jsonl --show",
)


def learn(
    store: StoreFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call the task.", show_default=False)],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .jsonl, .json, .csv or .parquet file, or a data set id.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(help="classification or generation; otherwise read off the rows.", show_default=False),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Examples to measure the task on afterwards.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Learn at most N examples.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Chooses the draw and the training.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Most passes over the examples.")] = None,
    start: Annotated[str | None, typer.Option(help="none, or retrieved: from earlier tasks.")] = None,
    is_truncating: IsTruncating = False,
    is_showing: Annotated[
        bool, typer.Option("--show", help="Print three examples as the model will see them, and stop.")
    ] = False,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep checkpoints here; the same command then resumes."),
    ] = None,
    key_plot: Annotated[
        Path | None,
        typer.Option("--plot-keys", metavar="FILE", help="Draw how the loss of learned keys fell."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Teach one task: read its examples, fine-tune, and store it whole or not at all."""
    from slm.tasks import load_task

    task = load_task(name, source, kind=kind, test=test, limit=limit, seed=seed or 0)
    model = open_model(store, is_learning=True)
    from slm.bench.keys import check_key_plot, plot_key_losses
    from slm.learning import show_examples

    if is_showing:
        examples = show_examples(model, task)
        if as_json:
            return print_json({"task": name, "kind": task.kind.value, "examples": examples})
        return print_line("\n\n".join(examples))
    if key_plot is not None:
        check_key_plot(model.config.retrieval, key_plot)
    given: dict[str, Any] = {"seed": seed, "num_epochs": epochs, "start": start}
    given["checkpoint_folder"] = str(checkpoints) if checkpoints else None
    given["is_truncating"] = is_truncating or None  # False leaves it to the store's settings
    settings = {key: value for key, value in given.items() if value is not None}
    with admitting(model.store, name):
        learned = model.learn(task, has_progress=is_on_terminal(), **settings)
        if key_plot is not None and learned.key_history is not None:
            plot_key_losses({name: learned.key_history}, key_plot)
    report = learned.as_dict() | _measure(model, task)
    return print_json(report) if as_json else print_report(report)


def _measure(model: ScalableLM, task: Task) -> dict[str, Any]:
    """The score of the task's test examples; over-long ones are cut, as the task is stored by now."""
    if not task.test:
        return {"test_score": None, "test_metric": None}
    from slm.tasks import Stream

    with admitting(model.store, task.name, " but not measured"):
        measured = model.evaluate(Stream((task,)), is_truncating=True, has_progress=is_on_terminal())
    return {"test_score": measured.average, "test_metric": measured.metrics[0]}
