"""Increments, and several of them as one."""

from __future__ import annotations

import pytest
import torch

from slm.errors import IncrementError
from slm.increments.increment import Increment, LowRankPair, concatenate, unify


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


def drawn(rank: int, alpha: float, names: str, seed: int) -> Increment:
    random = torch.Generator().manual_seed(seed)
    pairs = {
        n: LowRankPair(torch.randn(rank, 4, generator=random), torch.randn(3, rank, generator=random))
        for n in names
    }
    return Increment(pairs, rank, alpha)


def change(increment: Increment, name: str) -> torch.Tensor:
    """The full weight change s · B A of a layer, zero where there is none."""
    if name not in increment.pairs:
        return torch.zeros(3, 4, dtype=torch.float64)
    pair = increment.pairs[name]
    return increment.scale * pair.B.double() @ pair.A.double()


def test_a_mixture_is_one_increment_whose_change_is_the_weighted_sum():
    parts = [drawn(2, 7.0, "ab", 0), drawn(5, 3.0, "bc", 1), drawn(1, 1.0, "a", 2)]
    weights = [0.5, 0.3, 0.2]
    mixed = concatenate(parts, weights)
    assert (mixed.rank, mixed.scale) == (8, 1.0)
    for name in "abc":
        expected = sum(w * change(part, name) for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(change(mixed, name), expected, rtol=1e-6, atol=1e-6)


def test_a_single_increment_of_full_weight_is_its_own_mixture():
    part = drawn(2, 7.0, "ab", 0)
    assert concatenate([part], [1.0]) is part


def test_pairs_of_different_ranks_and_scales_become_one_increment_with_the_same_changes():
    pairs = {n: drawn(r, 1.0, n, r).pairs[n] for n, r in (("a", 1), ("b", 4), ("c", 2), ("d", 4))}
    scales = {"a": 0.5, "b": 2.0, "c": 3.7, "d": 2.0}
    found = unify(pairs, scales)
    assert (found.rank, found.scale) == (4, 2.0)
    assert found.pairs["b"].B is pairs["b"].B  # the most common scale is kept to the bit
    for name, pair in pairs.items():
        expected = scales[name] * pair.B.double() @ pair.A.double()
        torch.testing.assert_close(change(found, name), expected, rtol=1e-6, atol=1e-6)


def test_scales_of_zero_stay_zero():
    pairs = {n: drawn(2, 1.0, n, 0).pairs[n] for n in "ab"}
    assert not change(unify(pairs, {"a": 0.0, "b": 0.0}), "a").any()
    mixed = unify(pairs, {"a": 0.0, "b": 1.5})
    assert not change(mixed, "a").any()
    assert change(mixed, "b").any()


def test_in_float16_every_value_is_rounded_once_unless_one_is_too_large():
    wide = drawn(3, 5.0, "ab", 0)
    short = wide.in_float16()
    assert (short.rank, short.alpha, short.size_bytes) == (3, 5.0, wide.size_bytes // 2)
    for name, pair in wide.pairs.items():
        assert torch.equal(short.pairs[name].A, pair.A.half())
        assert torch.equal(short.pairs[name].B, pair.B.half())
    assert increment(65504.0).in_float16().pairs["layer"].A.dtype == torch.float16
    large = increment(-7e4)
    assert large.in_float16() is large


def test_a_mixture_of_float16_increments_is_folded_in_float32():
    one, other = drawn(2, 3.0, "a", 0).in_float16(), drawn(3, 5.0, "a", 1).in_float16()
    mixed = concatenate([one, other], [0.3, 0.7])
    expected = sum(
        w * x.scale * x.pairs["a"].B.double() @ x.pairs["a"].A.double() for x, w in ((one, 0.3), (other, 0.7))
    )
    torch.testing.assert_close(change(mixed, "a"), expected, atol=1e-6, rtol=1e-6)
