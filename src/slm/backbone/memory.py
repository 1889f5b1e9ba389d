"""Memory that a pass frees is kept for the next pass, which would otherwise get new pages from the system.

A pass over a batch allocates and frees hundreds of blocks of some MiB. glibc hands such blocks back at once,
and the system clears every page again when it is touched; ``benchmarks/freed_memory.py`` measures what that
costs learning and answering on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from types import MappingProxyType

_SIZES = {"MALLOC_MMAP_THRESHOLD_": (-3, 256 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30)}
# Weights are larger blocks and still go back when a backbone is let go.

ENVIRONMENT: Mapping[str, str] = MappingProxyType({name: str(size) for name, (_, size) in _SIZES.items()})
"""The same for a process that is started with these variables."""


def keep_freed_memory() -> bool:
    """Keep up to 1 GiB of freed memory, in blocks below 256 MiB, for the rest of the process.

    ``slm`` does so when it starts. A program of your own may, before it loads a backbone on a CPU. Nothing
    happens where the C library is not glibc, or where the environment already says how it allocates.

    Returns:
        Whether it was set.
    """
    is_told = any(name.startswith("MALLOC_") for name in os.environ)
    if is_told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or platform.libc_ver()[0] != "glibc":
        return False
    return all(ctypes.CDLL(None).mallopt(number, size) for number, size in _SIZES.values())
