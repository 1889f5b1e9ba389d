from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.store.sums import Snapshots, sum_exactly

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
COLUMNS = st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=12)


def _sum(rows):
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return sum_exactly(lambda: tensors)


@settings(deadline=None)
@given(COLUMNS)
def test_a_sum_is_the_exact_sum_rounded_once(rows):
    high, low, _ = _sum(rows)
    assert high.tolist() == [math.fsum(column) for column in zip(*rows, strict=True)]
    assert high.dtype == low.dtype == torch.float64


@settings(deadline=None)
@given(COLUMNS, st.randoms())
def test_a_sum_does_not_depend_on_the_order(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert torch.equal(_sum(rows)[0], _sum(shuffled)[0])


def test_addends_too_far_apart_for_106_bits_are_still_summed_exactly_and_said_so():
    high, _, is_exact = _sum([(1e30, 1.0), (1.0, 2.0), (1e-30, 3.0), (-1e30, 4.0), (-1.0, 5.0)])
    assert high.tolist() == [float(torch.tensor(1e-30)), 15.0]
    assert not is_exact


def test_no_addend_gives_an_empty_sum():
    high, low, is_exact = sum_exactly(lambda: [])
    assert (high.shape, low.shape, is_exact) == ((0,), (0,), True)


@settings(deadline=None)
@given(COLUMNS, st.tuples(FLOATS, FLOATS, FLOATS))
def test_taking_away_what_came_gives_back_the_same_bits(tmp_path_factory, rows, newcomer):
    snapshots = Snapshots(tmp_path_factory.mktemp("pooled"))
    high, low, is_exact = _sum(rows)
    change = torch.tensor(newcomer, dtype=torch.float32).double()
    if not is_exact:
        return
    snapshots.write(["a"], high, low)
    snapshots.derive(["a"], ["a", "b"], change)
    snapshots.derive(["b", "a"], ["a"], -change)
    found = snapshots.read(["a"])
    assert found is None or torch.equal(found[0], high)


def test_a_snapshot_is_found_for_its_own_tasks_only_and_replaces_the_one_before(tmp_path):
    snapshots, one = Snapshots(tmp_path), torch.ones(3, dtype=torch.float64)
    snapshots.derive([], ["a"], one)
    snapshots.derive(["a"], ["a", "b"], one)
    assert snapshots.read(["a"]) is None
    assert snapshots.read(["b", "a"])[0].tolist() == [2.0, 2.0, 2.0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_snapshot_with_one_flipped_bit_is_as_good_as_none(tmp_path):
    snapshots = Snapshots(tmp_path)
    snapshots.derive([], ["a"], torch.ones(3, dtype=torch.float64))
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = snapshots.read(["a"])
        assert found is None or found[0].tolist() == [1.0, 1.0, 1.0]
