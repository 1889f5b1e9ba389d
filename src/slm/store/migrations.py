"""The store's format version, and the steps that lead an older store to it.

Version 1 is the first, so there is no step yet. A step is a function of the store's folder; it runs
under the writer's lock, in the order of its key, can be run again after being cut short, and writes
``store.json`` with its new number last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from slm.errors import StoreError

FORMAT_VERSION = 1

MIGRATIONS: Mapping[int, Callable[[Path], None]] = {}
"""Version found on disk -> the step that turns it into the next version."""


def pending_steps(version: int, path: Path) -> list[Callable[[Path], None]]:
    """Steps from ``version`` to :data:`FORMAT_VERSION`, in order; empty when the store is current.

    Raises:
        StoreError: the store is newer than this program, or too old for it.
    """
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has store format {version}, this slm reads up to {FORMAT_VERSION}: upgrade scalable-lm"
        )
    steps = range(version, FORMAT_VERSION)
    if version < 1 or any(step not in MIGRATIONS for step in steps):
        raise StoreError(
            f"{path} has store format {version}, this slm reads 1..{FORMAT_VERSION}: "
            "restore store.json from a copy"
        )
    return [MIGRATIONS[step] for step in steps]
