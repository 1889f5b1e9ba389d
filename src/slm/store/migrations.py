"""The store's format version, and the steps that lead an older store to it.

A step is a function of the store's folder; it runs under the writer's lock, in the order of its key, can be
run again after being cut short, and writes ``store.json`` with its new number last.

1 to 2: the default of ``retrieval.pooling`` changed. A store of version 1 never wrote it down; its queries
are means.

2 to 3: what ``retrieval.pooling: ends`` reads changed, and so did the default temperature; the former reading
is now called ``split-ends``.

3 to 4: a store keeps a background, and its abstention reads it. A store of version 3 goes on without.

4 to 5: a digest of a task's keys stands in the task's row. In a store of version 4 it is taken of the keys as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from slm.errors import StoreError
from slm.store.manifest import read_manifest, write_manifest
from slm.store.tables import Tables

FORMAT_VERSION = 5


def _name_the_pooling(path: Path) -> None:
    """Write down that the queries of a store of version 1 are means."""
    manifest = read_manifest(path)
    retrieval = manifest.config.get("retrieval")
    settings = {"pooling": "mean", **(retrieval if isinstance(retrieval, dict) else {})}
    write_manifest(path, replace(manifest, config={**manifest.config, "retrieval": settings}), 2)


def _rename_the_pooling(path: Path) -> None:
    """Give the queries of a store of version 2 their present name, and keep its temperature."""
    manifest = read_manifest(path)
    retrieval = manifest.config.get("retrieval")
    settings = {"pooling": "ends", "temperature": 1.0, **(retrieval if isinstance(retrieval, dict) else {})}
    if settings["pooling"] == "ends":
        settings["pooling"] = "split-ends"
    write_manifest(path, replace(manifest, config={**manifest.config, "retrieval": settings}), 3)


def _go_without_background(path: Path) -> None:
    """Write down that a store of version 3 has no background."""
    manifest = read_manifest(path)
    retrieval = manifest.config.get("retrieval")
    settings = {**(retrieval if isinstance(retrieval, dict) else {}), "has_background": False}
    write_manifest(path, replace(manifest, config={**manifest.config, "retrieval": settings}), 4)


def _note_digests(path: Path) -> None:
    """Write down the digests of the keys of a store of version 4."""
    Tables(path / "catalogue").note_digests()
    write_manifest(path, read_manifest(path), 5)


MIGRATIONS: Mapping[int, Callable[[Path], None]] = {
    1: _name_the_pooling,
    2: _rename_the_pooling,
    3: _go_without_background,
    4: _note_digests,
}
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
