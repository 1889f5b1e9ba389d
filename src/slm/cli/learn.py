"""``slm learn``: teach one task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import is_on_terminal, print_json, print_line

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
    is_truncating: IsTruncating = False,
    is_showing: Annotated[
        bool, typer.Option("--show", help="Print three examples as the model will see them, and stop.")
    ] = False,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep checkpoints here; the same command then resumes."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Teach one task: read its examples, fine-tune, and store it whole or not at all."""
    from slm.learning import show_examples
    from slm.model import ScalableLM
    from slm.tasks import load_task

    task = load_task(name, source, kind=kind, test=test, limit=limit, seed=seed or 0)
    model = ScalableLM.open(store)
    if is_showing:
        examples = show_examples(model, task)
        if as_json:
            return print_json({"task": name, "kind": task.kind.value, "examples": examples})
        return print_line("\n\n".join(examples))
    given: dict[str, Any] = {
        "seed": seed,
        "num_epochs": epochs,
        "checkpoint_folder": str(checkpoints) if checkpoints else None,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if is_truncating:
        settings["is_truncating"] = True
    report = model.learn(task, has_progress=is_on_terminal(), **settings).as_dict()
    report |= _measure(model, task)
    return print_json(report) if as_json else _print_report(report)


def _measure(model: ScalableLM, task: Task) -> dict[str, Any]:
    """The score of the task's test examples; over-long ones are cut, as the task is stored by now."""
    from slm.tasks import Stream

    if not task.test:
        return {"test_score": None, "test_metric": None}
    stream = Stream((task,))
    measured = model.evaluate(stream, is_truncating=True, has_progress=is_on_terminal())
    return {"test_score": measured.average, "test_metric": measured.metrics[0]}


def _print_report(report: dict[str, Any]) -> None:
    print_line(f"learned {report['task']} ({report['kind']}, {report['num_examples']} examples)")
    if report["test_score"] is not None:
        print_line(f"{report['test_metric']} {report['test_score']:.3f} on the test examples")
    if report["validation_score"] is not None:
        held_out = f"on {report['num_validation']} held-out examples"
        print_line(f"{report['validation_metric']} {report['validation_score']:.3f} {held_out}")
    took = f"{report['num_epochs']:g} epochs, {report['time_s']:.1f} s, {report['size_bytes'] / 1e6:.2f} MB"
    print_line(took, "dim")
