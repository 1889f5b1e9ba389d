"""The writer's lock: one writer per store at a time, in this or any process; readers never wait.

And what a writer has begun is not left half done by an interrupt from the keyboard.
"""

from __future__ import annotations

import signal
import threading
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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off an interrupt from the keyboard (SIGINT) to the end of the block, which must be short.

    Only the main thread is ever interrupted; elsewhere nothing is done.
    """
    is_main = threading.current_thread() is threading.main_thread()
    earlier = signal.getsignal(signal.SIGINT) if is_main else None
    if earlier is None:  # another thread, or a handler that Python did not set and cannot set again
        yield
        return
    num_interrupts = 0

    def count(*_: object) -> None:
        nonlocal num_interrupts
        num_interrupts += 1

    signal.signal(signal.SIGINT, count)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
        if num_interrupts:
            signal.raise_signal(signal.SIGINT)
