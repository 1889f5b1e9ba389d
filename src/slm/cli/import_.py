"""``slm import``: take an adapter trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.interrupts import admitting
from slm.cli.opening import open_model
from slm.cli.options import AsJson, IsTruncating, StoreFolder
from slm.cli.output import print_json, print_line

EXAMPLES = (
    "slm import notes film-adapter --examples films.jsonl",
    "slm import notes film-adapter --examples films.jsonl --name films --labels bad,good",
)


def import_(
    store: StoreFolder,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A PEFT LoRA adapter.", show_default=False)
    ],
    examples: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Examples of what is asked of it, from which it is found.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What to call the task; otherwise as the folder.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="classification or generation; otherwise read off the rows.", show_default=False),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Labels of an encoder's head, by row.", show_default=False),
    ] = None,
    is_truncating: IsTruncating = False,
    as_json: AsJson = False,
) -> None:
    """Take a LoRA adapter trained elsewhere as a task, without training: keys come from its examples."""
    from slm.tasks import load_task

    task = load_task(name or folder.resolve().name, examples, kind=kind)
    given = [label.strip() for label in labels.split(",")] if labels else []
    model = open_model(store, is_learning=True)
    with admitting(model.store, task.name):
        report = model.import_adapter(folder, task, labels=given, is_truncating=is_truncating).as_dict()
    if as_json:
        return print_json(report)
    print_line(f"imported {report['task']} ({report['kind']}, found by {report['num_examples']} examples)")
    if report["left_out"]:
        print_line(f"left out {', '.join(report['left_out'])}: head.safetensors names labels instead")
    size = f"{report['size_bytes'] / 1e6:.2f} MB"
    print_line(f"rank {report['rank']} on {report['num_layers']} layers, {size}", "dim")
