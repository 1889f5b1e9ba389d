"""Folders that live as long as a cell is computed, and what is left of those of killed cells."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """An empty folder within ``place``, gone after the block; it is locked as long as it is in use."""
    place.mkdir(parents=True, exist_ok=True)
    folder = place / uuid.uuid4().hex
    lock = folder.with_suffix(".lock")
    with FileLock(lock):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def clear_scratch(place: Path) -> None:
    """Remove the folders within ``place`` that are not in use: whoever made them was killed."""
    for lock in place.glob("*.lock"):
        with suppress(Timeout, OSError), FileLock(lock, timeout=0):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
