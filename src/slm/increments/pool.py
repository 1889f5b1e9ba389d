"""The pool: increments in use stay in memory under a byte budget, the least recently used leave first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from slm.errors import ConfigError
from slm.increments.increment import Increment


class IncrementPool:
    """Keeps increments by key.

    Args:
        budget_bytes: most bytes kept; what one request needs is always handed out, even beyond it.

    Raises:
        ConfigError: the budget is negative.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ConfigError(f"budget_bytes must be 0 or more, got {budget_bytes}")
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[Hashable, Increment] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of all increments kept."""
        return sum(increment.size_bytes for increment in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, wanted: Mapping[Hashable, Callable[[], Increment]]) -> list[Increment]:
        """The increments of some keys, in order; those not in memory are loaded.

        Args:
            wanted: key -> reads that increment from wherever it is kept.
        """
        with self._lock:
            found = []
            for key, load in wanted.items():
                if key in self._kept:
                    self._kept.move_to_end(key)
                else:
                    self._kept[key] = load()
                found.append(self._kept[key])
            while self._kept and self.size_bytes > self._budget_bytes:
                self._kept.popitem(last=False)
            return found

    def drop(self, key: Hashable) -> None:
        """Forget one key, if it is there."""
        with self._lock:
            self._kept.pop(key, None)
