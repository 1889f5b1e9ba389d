"""``slm forget``: remove one task."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slm.cli.options import AsJson, StoreFolder
from slm.cli.output import print_json, print_line

EXAMPLES = ("slm forget notes film-sentiment", "slm forget notes film-sentiment --yes --json")


def forget(
    store: StoreFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task to remove.", show_default=False)],
    is_sure: Annotated[
        bool, typer.Option("--yes", help="Do not ask; off a terminal nothing is asked.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a task for good; the others answer as if it had never been learned."""
    from slm.store import Store

    opened = Store.open(store)
    record = opened.task(name)
    if not is_sure and sys.stdin.isatty():
        # Not typer.confirm: it writes to standard output, which belongs to the result.
        sys.stderr.write(f"Forget {name} ({record.num_examples} examples) for good? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            sys.stderr.write("slm: nothing was forgotten\n")
            raise typer.Exit(1)
    opened.forget(name)
    left = [kept.name for kept in opened.tasks()]
    if as_json:
        return print_json({"forgotten": name, "tasks": left})
    print_line(f"forgot {name}, {', '.join(left) or 'nothing'} is left")
