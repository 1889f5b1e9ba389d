import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.cli import output
from slm.cli.output import draw_bar
from slm.errors import StoreError

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


def test_activity_is_shown_on_a_terminal_alone_and_is_gone_when_it_is_done(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")  # a dumb one cannot take anything back, so nothing is shown there
    for is_watched in (True, False):
        monkeypatch.setattr(output, "is_on_terminal", lambda is_watched=is_watched: is_watched)
        with output.show_activity("opening [notes]"):
            pass
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("opening [notes]" in shown.err) is is_watched
    assert shown.err == ""


def test_activity_passes_on_why_it_failed(monkeypatch):
    monkeypatch.setattr(output, "is_on_terminal", lambda: True)
    with pytest.raises(StoreError, match="is not a store"), output.show_activity("opening"):
        raise StoreError("this is not a store")
