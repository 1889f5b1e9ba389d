from hypothesis import given
from hypothesis import strategies as st

from slm.cli.output import draw_bar

SHARES = st.floats(0, 1)


@given(SHARES, SHARES, st.integers(2, 40))
def test_a_bar_passes_its_mark_exactly_when_it_is_longer(share, mark, num_columns):
    bar = draw_bar(share, mark, num_columns)
    assert len(bar) == num_columns
    near, far = bar.split("│")
    assert set(near) <= {"█", " "}
    assert near == near.rstrip().ljust(len(near))
    assert ("░" in far) == (share > mark)


def test_a_bar_is_as_long_as_its_share():
    assert draw_bar(0.5, 1.0, 11) == "█████     │"
    assert draw_bar(1.0, 0.5, 11) == "█████│░░░░░"
    assert draw_bar(0.0, 0.0, 3) == "│  "
