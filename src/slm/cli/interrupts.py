"""What a command that stores a task says when it is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from slm.cli.output import print_failure

if TYPE_CHECKING:
    from slm.store import Store


@contextmanager
def admitting(store: Store, name: str, lack: str = "") -> Iterator[None]:
    """Let nobody hear that nothing was stored, as interrupts say elsewhere, when this task was.

    Args:
        store: where.
        name: of the task.
        lack: what is then still missing, " but not measured" say.

    Raises:
        Exit: the block was interrupted when the task was stored already.
    """
    try:
        yield
    except KeyboardInterrupt:
        if all(record.name != name for record in store.tasks()):
            raise
        print_failure(f"interrupted, {name} is stored{lack}")
        raise typer.Exit(1) from None
