"""What a command that stores a task says when it does not come to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from slm.cli.output import print_failure
from slm.errors import SlmError

if TYPE_CHECKING:
    from slm.store import Store


@contextmanager
def admitting(store: Store, name: str, lack: str = "") -> Iterator[None]:
    """Let nobody think that nothing was stored, as interrupts say elsewhere, when this task was.

    Args:
        store: where.
        name: of the task.
        lack: what is then still missing, " but not measured" say.

    Raises:
        Exit: the block was interrupted when the task was stored already.
        SlmError: the block's own, which says with a ``lack`` that the task is stored.
    """
    try:
        yield
    except SlmError as error:
        if not lack:  # it says itself what is stored
            raise
        raise type(error)(f"{name} is stored{lack}: {error}") from None
    except KeyboardInterrupt:
        if all(record.name != name for record in store.tasks()):
            raise
        print_failure(f"interrupted, {name} is stored{lack}")
        raise typer.Exit(1) from None
