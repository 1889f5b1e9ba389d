"""The bank keeps what is in use, once, and nothing that is gone."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from slm.backbone import bank as bank_module
from slm.backbone.bank import Bank, Shelf, in_parts
from slm.backbone.reparameterize import Mixture, Reparameterizer
from slm.errors import CrowdedError, IncrementError
from slm.increments.increment import Increment, LowRankPair

LAYERS = {"a": nn.Linear(5, 3), "b": nn.Linear(3, 4)}


def increment(seed: int, rank: int = 2, names: tuple[str, ...] = ("a", "b")) -> Increment:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        name: LowRankPair(
            torch.randn(rank, LAYERS[name].in_features, generator=draw),
            torch.randn(LAYERS[name].out_features, rank, generator=draw),
        )
        for name in names
    }
    return Increment(pairs, rank, 3.0)


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, int]]:
    """Layer and number of increments of every write."""
    calls: list[tuple[str, int]] = []
    plain = Shelf.write

    def write(self, slots, increments):
        calls.append((self.name, len(increments)))
        plain(self, slots, increments)

    monkeypatch.setattr(Shelf, "write", write)
    return calls


def test_pairs_are_stacked_transposed_and_filled_up_with_zeros():
    bank, small, large = Bank(LAYERS), increment(0, rank=1, names=("a",)), increment(1, rank=3)
    first, second = bank.load([small, large])
    shelf = bank.shelves["a"]
    torch.testing.assert_close(shelf.down[first, :1], small.pairs["a"].A)
    torch.testing.assert_close(shelf.up[second], large.pairs["a"].B.T)
    assert not shelf.down[first, 1:].any()
    assert not bank.shelves["b"].up[first].any()
    assert bank.rank == 3


def test_what_is_there_already_is_neither_written_nor_moved(written):
    bank, increments = Bank(LAYERS), [increment(seed) for seed in range(4)]
    slots = bank.load(increments)
    address = bank.shelves["a"].down.data_ptr()
    del written[:]
    assert bank.load(increments[::-1]) == slots[::-1]
    assert bank.load([increments[2], increments[2]]) == [slots[2]] * 2
    assert not written
    other = increment(9)
    assert bank.load([increments[0], other])[0] == slots[0]
    assert written == [("a", 1), ("b", 1)]
    assert bank.shelves["a"].down.data_ptr() == address


def test_the_slot_of_an_increment_that_is_gone_is_taken_first():
    bank, increments = Bank(LAYERS), [increment(seed) for seed in range(4)]
    slots = bank.load(increments)
    del increments[2]
    gc.collect()
    assert bank.load([increment(9)]) == [slots[2]]
    kept = [increments[0], increments[1], increments[2]]
    assert bank.load(kept) == [slots[0], slots[1], slots[3]]


def test_room_grows_in_powers_of_two():
    bank = Bank(LAYERS)
    bank.load([increment(0)])
    sizes = [bank.num_slots]
    for count in (2, 3, 5, 4):
        bank.load([increment(seed) for seed in range(count)])
        sizes.append(bank.num_slots)
    assert sizes == [1, 2, 4, 8, 8]


def test_room_is_what_one_request_needs_or_twice_the_largest_never_most_slots_by_largest_rank():
    bank = Bank(LAYERS)
    many, twice, large = [increment(seed) for seed in range(8)], increment(8, rank=4), increment(9, rank=64)
    shapes = []
    for wanted in (many, [twice], many, [large], many[:2], many):
        slots = bank.load(wanted)
        shapes.append(tuple(bank.shelves["a"].down.shape[:2]))
        for slot, one in zip(slots, wanted, strict=True):
            assert torch.equal(bank.shelves["a"].down[slot, : one.rank], one.pairs["a"].A)
            assert not bank.shelves["a"].down[slot, one.rank :].any()
    assert shapes == [(8, 2), (8, 4), (8, 4), (1, 64), (2, 64), (8, 2)]
    for rank in (4, 8, 16, 32, 64):  # step by step it grows no further
        bank.load([increment(0, rank=rank)])
    assert bank.num_slots * bank.rank <= 2 * 64


def test_requests_that_take_turns_in_one_room_move_nothing():
    bank, many, one = Bank(LAYERS), [increment(seed) for seed in range(4)], increment(9, rank=4)
    bank.load([one])
    bank.load(many)
    address = bank.shelves["a"].down.data_ptr()
    for wanted in ([one], many) * 2:
        bank.load(wanted)
        assert bank.shelves["a"].down.data_ptr() == address


def test_a_large_rank_among_many_small_ones_is_refused_by_its_number(monkeypatch):
    bank, many, large = Bank(LAYERS), [increment(seed) for seed in range(8)], increment(9, rank=64)
    monkeypatch.setattr(bank_module, "MAX_FILLED_BYTES", 8 * 62 * 4 * (5 + 3 + 3 + 4) - 1)
    slots = bank.load(many)
    with pytest.raises(IncrementError, match=r"an increment of rank 64 in one batch with 8 others, of ranks"):
        bank.load([*many, large])
    assert bank.load(many) == slots
    assert bank.load([*many[:7], large])  # a few zeros less


@pytest.mark.parametrize("is_late", [False, True])
def test_layers_that_most_increments_lack_count_as_zeros_whenever_they_come(monkeypatch, is_late):
    bank, narrow, wide = Bank(LAYERS), [increment(seed, names=("a",)) for seed in range(5)], increment(9)
    limit = 4 * 2 * 4 * (3 + 4)  # bytes of 4 empty slots of rank 2 in layer b
    monkeypatch.setattr(bank_module, "MAX_FILLED_BYTES", limit)
    if is_late:
        bank.load(narrow)
    with pytest.raises(
        IncrementError, match=r"in one batch with 5 others, of ranks from 2 and layers from 1 on"
    ):
        bank.load([*narrow, wide])
    slots = bank.load([*narrow[:4], wide])
    assert bank.num_slots == 5
    torch.testing.assert_close(bank.shelves["b"].down[slots[4]], wide.pairs["b"].A)


def test_empty_slots_are_not_made_where_they_would_be_too_many_zeros(monkeypatch):
    bank, increments = Bank(LAYERS), [increment(seed) for seed in range(5)]
    monkeypatch.setattr(bank_module, "MAX_FILLED_BYTES", 0)
    bank.load(increments)
    assert bank.num_slots == 5


def test_a_layer_that_no_increment_changes_takes_no_memory():
    bank = Bank(LAYERS)
    bank.load([increment(0, names=("a",))])
    assert bank.shelves["b"].size_bytes == 0
    assert bank.size_bytes == bank.shelves["a"].size_bytes == 4 * 2 * (5 + 3)
    late = increment(1)
    (slot,) = bank.load([late])
    torch.testing.assert_close(bank.shelves["b"].down[slot], late.pairs["b"].A)


def test_a_large_bank_is_let_go_between_requests(monkeypatch):
    bank = Bank(LAYERS)
    bank.load([increment(0)])
    bank.trim()
    assert bank.size_bytes
    monkeypatch.setattr(bank_module, "KEPT_BYTES", 10)
    bank.trim()
    assert bank.size_bytes == 0


def test_a_large_bank_stays_from_one_mixture_to_the_next(monkeypatch):
    monkeypatch.setattr(bank_module, "KEPT_BYTES", 10)
    bound = Reparameterizer(nn.ModuleDict(copy.deepcopy(LAYERS)), ["a", "b"])
    mixture = Mixture([increment(0)], torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    bound.bind(mixture)
    held = bound.bank.shelves["a"].down
    bound.release()
    bound.bind(mixture)
    assert bound.bank.shelves["a"].down is held
    bound.rest()
    assert bound.bank.size_bytes == 0


def test_increments_that_crowd_the_bank_are_known_before_they_are_loaded(monkeypatch):
    bank = Bank(LAYERS)
    alike, large = [increment(seed) for seed in range(3)], increment(9, rank=16)
    monkeypatch.setattr(bank_module, "MAX_FILLED_BYTES", 1000)
    assert all(map(bank.fits, ([], alike, [large])))
    assert not bank.fits([*alike, large])
    with pytest.raises(CrowdedError):
        bank.load([*alike, large])


def test_rows_that_crowd_the_bank_are_taken_in_halves():
    taken = []

    def act(rows):
        if 3 in rows and len(rows) > 1:
            raise CrowdedError("too much")
        taken.append(list(rows))
        return [row * 10 for row in rows]

    assert in_parts([5, 1, 3, 2], act) == [50, 10, 30, 20]
    assert taken == [[5, 1], [3], [2]]
    with pytest.raises(CrowdedError):
        in_parts([3], lambda _: (_ for _ in ()).throw(CrowdedError("alone")))


def test_an_increment_that_does_not_fit_leaves_nothing_half_written():
    bank, good = Bank(LAYERS), increment(0)
    bank.load([good])
    wrong = Increment({"b": LowRankPair(torch.randn(2, 5), torch.randn(4, 2))}, 2, 1.0)
    with pytest.raises(IncrementError, match=r"at b maps 5 to 4 features, the layer 3 to 4: it belongs to"):
        bank.load([increment(1), wrong])
    assert bank.size_bytes == 0
    (slot,) = bank.load([good])
    torch.testing.assert_close(bank.shelves["a"].down[slot], good.pairs["a"].A)


def test_what_inference_put_there_serves_learning_too():
    bank = Bank(LAYERS)
    with torch.inference_mode():
        bank.load([increment(0)])
    bank.load([increment(1)])
    x = torch.randn(2, 5, requires_grad=True)
    (x @ bank.shelves["a"].down[0].T).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("has_kernel", [True, False])
def test_float16_pairs_stay_so_where_the_kernel_reads_them_and_while_all_are(monkeypatch, has_kernel):
    monkeypatch.setattr(bank_module, "row_kernel", lambda *_: print if has_kernel else None)
    bank, short, wide = Bank(LAYERS), increment(0).in_float16(), increment(1)
    bank.load([short])
    assert bank.shelves["a"].up.dtype == (torch.float16 if has_kernel else torch.float32)
    slots = bank.load([short, wide])
    down = bank.shelves["a"].down
    assert down.dtype == torch.float32
    for slot, one in zip(slots, (short, wide), strict=True):
        assert torch.equal(down[slot], one.pairs["a"].A.float())
    assert bank.load([short]) == slots[:1]  # nothing is written anew for a request of the short one alone


def test_beside_bfloat16_activations_all_pairs_are_bfloat16():
    bank = Bank({"a": nn.Linear(5, 3).bfloat16()})
    bank.load([increment(0, names=("a",)).in_float16()])
    assert bank.shelves["a"].down.dtype == torch.bfloat16
