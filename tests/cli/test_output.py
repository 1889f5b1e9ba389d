import re

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


NAMES = ("question-topics-of-a-long-name-that-no-quarter-of-a-terminal-holds", "film-sentiment")


def print_wide_table() -> None:
    rows = [
        (name, draw_bar(0.5, 0.9), "classification", "10.250", "12.100", "0.93", "used") for name in NAMES
    ]
    header = ("task", "distance | threshold", "kind", "distance", "threshold", "posterior", "verdict")
    output.print_table(header, rows, num_texts=3, has_bars=True)


def test_a_table_in_a_pipe_is_cut_nowhere(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_wide_table()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines[1:], NAMES, strict=True):
        assert line.split()[0] == name
        assert line.rstrip().endswith("used")
        assert draw_bar(0.5, 0.9) in line


def test_a_table_on_a_narrow_terminal_keeps_its_first_column_and_its_numbers(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    print_wide_table()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = plain.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("question"))
    assert "".join(line[:20].rstrip() for line in lines[start:-1]) == NAMES[0]
    assert lines[-1].startswith("film-sentiment ")
    assert "10.250" in lines[-1]
    assert lines[-1].rstrip().endswith("used")


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
