"""Shares against a slow reference, and the invariants of a draw."""

from hypothesis import given, settings
from hypothesis import strategies as st

from slm.tasks.sampling import fold, rank, share_evenly, share_proportionally

SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 30), min_size=1)


def reference_even_shares(total: int, sizes: dict[str, int]) -> list[int]:
    """Deal one draw at a time to whoever has fewest and is not full; return the shares sorted."""
    shares = dict.fromkeys(sizes, 0)
    for _ in range(min(total, sum(sizes.values()))):
        shares[min((y for y in sizes if shares[y] < sizes[y]), key=lambda y: shares[y])] += 1
    return sorted(shares.values())


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 120))
def test_even_shares_equal_dealing_one_draw_at_a_time(sizes, total):
    shares = share_evenly(total, sizes)
    assert sorted(shares.values()) == reference_even_shares(total, sizes)
    assert all(shares[label] <= sizes[label] for label in sizes)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 120))
def test_proportional_shares_sum_to_the_total_and_stay_within_one_of_the_exact_share(sizes, total):
    shares = share_proportionally(total, sizes)
    num_labels = sum(size > 0 for size in sizes.values())
    assert sum(shares.values()) == min(total, sum(sizes.values()))
    for label, size in sizes.items():
        assert 0 <= shares[label] <= size
        if total >= num_labels and size > 0:
            assert shares[label] >= 1
    if num_labels <= total < sum(sizes.values()):
        rest, available = total - num_labels, sum(sizes.values()) - num_labels
        for label, size in sizes.items():
            exact = 1 + rest * (size - 1) / available if size else 0
            assert abs(shares[label] - exact) < 1


def test_proportional_shares_keep_three_to_one():
    assert share_proportionally(40, {"a": 300, "b": 100}) == {"a": 30, "b": 10}


def test_folding_removes_differences_of_case_and_white_space_only():
    assert fold("  Wer\nIST  da? ") == "wer ist da?"
    assert fold("wer ist da!") != fold("wer ist da?")


def test_the_rank_of_a_text_is_fixed_for_ever():
    # Another number here would silently move every split and every benchmark draw.
    assert rank(0, "hello").hex().startswith("f6c5c364cd6e8340")
    assert rank(1, "hello") != rank(0, "hello")
