"""The writer's lock: one writer per store at a time, in this or any process; readers never wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from slm.errors import StoreError

LOCK_TIMEOUT_S = 60.0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the lock of the store at ``path``; the system lets go of it when a process dies.

    Raises:
        StoreError: another writer held it too long, or the disk refuses a write.
    """
    try:
        with FileLock(path / "writer.lock", timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise StoreError(
            f"{path} has been locked by another writer for {LOCK_TIMEOUT_S:g} s: let it finish or stop it"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}): "
            "see that the disk is neither full nor read-only"
        ) from error
