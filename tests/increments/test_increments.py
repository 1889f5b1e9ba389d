"""Increments and the pool."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from slm.errors import ConfigError, IncrementError
from slm.increments.increment import Increment, LowRankPair
from slm.increments.pool import IncrementPool


def increment(value: float = 1.0, rank: int = 2) -> Increment:
    return Increment({"layer": LowRankPair(torch.full((rank, 4), value), torch.zeros(3, rank))}, rank, 8.0)


def test_the_scale_is_alpha_over_rank():
    assert increment(rank=2).scale == 4.0


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(IncrementError, match=r"needs A \(R, I\) and B \(O, R\), got \(2, 4\) and \(3, 5\)"):
        LowRankPair(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(IncrementError, match=r"rank 3 holds a pair of rank 2 at layer"):
        Increment(increment().pairs, 3, 8.0)
    with pytest.raises(IncrementError, match=r"holds NaN or infinity at layer: it cannot be used"):
        increment(float("nan"))


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


def test_a_negative_budget_is_refused():
    with pytest.raises(ConfigError, match=r"budget_bytes must be 0 or more, got -1"):
        IncrementPool(-1)
