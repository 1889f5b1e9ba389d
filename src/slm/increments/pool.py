"""The pool: increments in use stay near at hand under byte budgets, the least recently used leave first.

    disk    every increment of the store, read by memory map when it is asked for
    host    those asked for lately, in memory
    device  those asked for last, where the backbone computes; the host itself when that is the CPU

An increment on the device ages in the host's memory while only the device's copy is used, so under
pressure it is soon held once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Generic, TypeVar, final

import torch

from slm.errors import ConfigError
from slm.increments.increment import Increment

_V = TypeVar("_V")


@final
class ByteCache(Generic[_V]):
    """Values by key up to a number of bytes; the least recently used leave first.

    Args:
        budget_bytes: most bytes kept.
        size_of: bytes of a value.
        name: what a message calls the budget.

    Raises:
        ConfigError: the budget is negative.
    """

    def __init__(self, budget_bytes: int, size_of: Callable[[_V], int], name: str = "budget_bytes") -> None:
        if budget_bytes < 0:
            raise ConfigError(f"{name} must be 0 or more, got {budget_bytes}: raise it")
        self._budget_bytes = budget_bytes
        self._size_of = size_of
        self._kept: OrderedDict[Hashable, tuple[_V, int]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> _V | None:
        """The value of a key, which is now the most recently used; None when it is not kept."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: _V, needed: Collection[Hashable] = ()) -> None:
        """Keep a value if the budget allows it beside those ``needed``, which are not thrown out for it.

        One that is larger than the whole budget throws out nothing.
        """
        self.drop(key)
        size = self._size_of(value)
        if size > self._budget_bytes:
            return
        while self.size_bytes + size > self._budget_bytes:
            oldest = next((k for k in self._kept if k not in needed), None)
            if oldest is None:
                return
            self.drop(oldest)
        self._kept[key] = (value, size)
        self.size_bytes += size

    def drop(self, key: Hashable) -> None:
        """Let one key go, if it is there."""
        if key in self._kept:
            self.size_bytes -= self._kept.pop(key)[1]


@final
class IncrementPool:
    """Keeps increments by key, in memory and on the device.

    What one request needs is always handed out, even beyond the budgets; it is then not kept.

    Args:
        host_bytes: most bytes kept in memory.
        device: where increments are handed out.
        device_bytes: most bytes kept there; means nothing on the CPU.

    Raises:
        ConfigError: a budget is negative.
    """

    def __init__(
        self, host_bytes: int, device: torch.device | str = "cpu", device_bytes: int | None = None
    ) -> None:
        self._device = torch.device(device)
        self._host: ByteCache[Increment] = ByteCache(host_bytes, _size_of, "host_bytes")
        has_device = self._device.type != "cpu"
        self._near: ByteCache[Increment] | None = None
        if has_device:
            wanted = host_bytes if device_bytes is None else device_bytes
            self._near = ByteCache(wanted, _size_of, "device_bytes")
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of all increments kept in memory."""
        return self._host.size_bytes

    @property
    def device_size_bytes(self) -> int:
        """Bytes of all increments kept on the device; 0 where that is the CPU."""
        return self._near.size_bytes if self._near is not None else 0

    def __len__(self) -> int:
        return len(self._host)

    def get(self, wanted: Mapping[Hashable, Callable[[], Increment]]) -> list[Increment]:
        """The increments of some keys, in order, on the device; those not at hand are loaded.

        Args:
            wanted: key -> reads that increment from wherever it is kept.
        """
        with self._lock:
            return [self._one(key, load, wanted) for key, load in wanted.items()]

    def drop(self, key: Hashable) -> None:
        """Let one key go, if it is there."""
        with self._lock:
            self._host.drop(key)
            if self._near is not None:
                self._near.drop(key)

    def _one(self, key: Hashable, load: Callable[[], Increment], needed: Collection[Hashable]) -> Increment:
        near = self._near.get(key) if self._near is not None else None
        if near is not None:
            return near
        found = self._host.get(key)
        if found is None:
            found = load()
            self._host.put(key, found, needed)
        if self._near is not None:
            found = found.to(self._device)
            self._near.put(key, found, needed)
        return found


def _size_of(increment: Increment) -> int:
    return increment.size_bytes
