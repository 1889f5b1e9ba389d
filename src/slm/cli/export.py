"""``slm export``: write tasks for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slm.cli.opening import open_model
from slm.cli.options import AsJson, StoreFolder
from slm.cli.output import print_json, print_line
from slm.errors import ConfigError

EXAMPLES = (
    "slm export notes film-sentiment -o film-adapter --format peft",
    "slm export notes billing=0.7 legal=0.3 -o billing-and-legal --merged",
)


class Format(StrEnum):
    """What is written."""

    PEFT = "peft"
    MERGED = "merged"


def export(
    store: StoreFolder,
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...",
            help="One task, several in equal parts, or each as NAME=WEIGHT with the sum 1.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.", show_default=False)
    ],
    format_: Annotated[
        Format, typer.Option("--format", help="A PEFT adapter, or whole merged weights.")
    ] = Format.PEFT,
    is_merged: Annotated[bool, typer.Option("--merged", help="Short for --format merged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write tasks as a PEFT adapter, or baked into a checkpoint that transformers loads."""
    chosen = parse_weights(tasks)
    wants_merged = is_merged or format_ is Format.MERGED
    files = open_model(store).export(chosen, output, is_merged=wants_merged)
    if as_json:
        return print_json(
            {"folder": str(output), "format": "merged" if wants_merged else "peft", "files": files}
        )
    print_line(f"wrote {', '.join(chosen)} to {output}")
    print_line(", ".join(files), "dim")


def parse_weights(tasks: Sequence[str]) -> list[str] | dict[str, float]:
    """Names, or weights by name where they are given.

    Raises:
        ConfigError: a weight is no number, a name comes twice, or only some tasks have a weight.
    """
    split = [task.partition("=") for task in tasks]
    if len({name for name, _, _ in split}) != len(split):
        raise ConfigError(f"tasks {', '.join(tasks)} name one twice: give each once")
    if not any(equals for _, equals, _ in split):
        return list(tasks)
    try:
        return {name: float(weight) for name, _, weight in split}
    except ValueError:
        raise ConfigError(
            f"tasks {', '.join(tasks)} have weights that are no numbers: write each as NAME=WEIGHT, "
            "such as billing=0.7 legal=0.3, or none"
        ) from None
