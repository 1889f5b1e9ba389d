"""The pool keeps what is in use near at hand, and never more than it may."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm.errors import ConfigError
from slm.increments.increment import Increment, LowRankPair
from slm.increments.pool import IncrementPool


def increment(value: float = 1.0, rank: int = 2) -> Increment:
    return Increment({"layer": LowRankPair(torch.full((rank, 4), value), torch.zeros(3, rank))}, rank, 8.0)


def test_the_pool_loads_once_and_drops_the_least_recently_used():
    size = increment().size_bytes
    loaded = []

    def load(name: str) -> Increment:
        loaded.append(name)
        return increment()

    pool = IncrementPool(2 * size)
    want = lambda *names: pool.get({name: partial(load, name) for name in names})  # noqa: E731
    want("a", "b")
    want("a")
    want("c")  # b is the least recently used
    want("a", "b")
    assert loaded == ["a", "b", "c", "b"]
    assert pool.size_bytes <= 2 * size


def test_one_request_is_served_even_beyond_the_budget():
    pool = IncrementPool(0)
    assert len(pool.get({"a": increment, "b": increment})) == 2
    assert len(pool) == 0


def test_what_is_larger_than_the_whole_budget_throws_out_nothing():
    pool = IncrementPool(2 * increment().size_bytes)
    pool.get({"a": increment, "b": increment})
    assert pool.get({"large": partial(increment, rank=5)})[0].rank == 5
    reads = []
    pool.get({key: partial(reads.append, key) for key in "ab"})
    assert reads == []


def test_a_negative_budget_is_refused():
    with pytest.raises(ConfigError, match=r"host_bytes must be 0 or more, got -1"):
        IncrementPool(-1)
    with pytest.raises(ConfigError, match=r"device_bytes must be 0 or more, got -2"):
        IncrementPool(1, "meta", -2)


def test_what_a_request_needs_is_not_thrown_out_for_the_rest_of_it():
    pool = IncrementPool(2 * increment().size_bytes)
    pool.get({"a": increment, "b": increment})
    pool.get({"b": increment, "c": increment})
    kept = []
    pool.get({key: partial(kept.append, key) for key in "bc"})
    assert kept == []


REQUESTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), max_size=40)


@given(requests=REQUESTS, host=st.integers(0, 900), near=st.integers(0, 900))
def test_budgets_hold_after_every_request_and_everybody_gets_what_they_asked_for(requests, host, near):
    """Ranks 1 to 10 make sizes of 28 to 280 bytes; `meta` stands for a device that is not the host."""
    pools = IncrementPool(host), IncrementPool(host, "meta", near)
    for names in requests:
        for pool in pools:
            found = pool.get({n: partial(increment, float(n), n + 1) for n in names})
            assert [i.rank for i in found] == [n + 1 for n in names]
            assert pool.size_bytes <= host
            assert pool.device_size_bytes <= near
        pools[0].drop(names[0])
    assert pools[0].size_bytes == sum(i.size_bytes for i, _ in pools[0]._host._kept.values())


class _Device:
    """A pool in front of a slow disk: counts what is read."""

    def __init__(self, host: int, near: int) -> None:
        self.pool = IncrementPool(host, "meta", near)
        self.reads: list[str] = []

    def ask(self, *names: str) -> None:
        self.pool.get({name: partial(self._read, name) for name in names})

    def _read(self, name: str) -> Increment:
        self.reads.append(name)
        return increment()


def test_what_left_the_device_comes_back_from_memory_and_what_left_memory_from_disk():
    size = increment().size_bytes
    device = _Device(host=2 * size, near=size)
    device.ask("a")
    device.ask("b")
    assert (device.pool.size_bytes, device.pool.device_size_bytes) == (2 * size, size)
    device.ask("a")  # from memory
    assert device.reads == ["a", "b"]
    device.ask("c")
    device.ask("b")  # it was the oldest in memory
    assert device.reads == ["a", "b", "c", "b"]
