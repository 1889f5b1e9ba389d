"""The page of a map: whole by itself, and deaf to what questions say."""

from __future__ import annotations

import dataclasses
import errno
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slm.bench.map.page import check_map_file, write_map
from slm.errors import ConfigError
from tests.bench.map.test_figures import QUESTION, map_of

HOSTILE = "</script><script>alert('caught')</script><img src=x onerror=alert('caught')>"


class Parts(HTMLParser):
    """Tags with their attributes, scripts, and the words between tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.cdata_elem == "script" else self.words).append(data)


def read(path: Path) -> Parts:
    return Parts(path.read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file_and_may_ask_nothing_of_the_network(tmp_path):
    parts = read(write_map(map_of(3, (QUESTION,)), tmp_path / "new" / "map.html", "Map of notes"))
    assert not [tag for tag, attributes in parts.tags if {"src", "href"} & set(attributes)]
    assert not {"link", "iframe", "img", "object", "embed"} & {tag for tag, _ in parts.tags}
    policy = next(a["content"] for t, a in parts.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline'")
    assert {attributes.get("id") for _, attributes in parts.tags} >= {"map", "matrix"}
    library = max(parts.scripts, key=len)
    assert "plotly.js v" in library[:200]
    assert sum("plotly.js v" in script[:200] for script in parts.scripts) == 1


def test_hostile_questions_and_titles_add_no_tag(tmp_path):
    plain = read(write_map(map_of(3, (QUESTION,)), tmp_path / "plain.html", "Map"))
    evil = dataclasses.replace(QUESTION, text=HOSTILE)
    path = write_map(map_of(3, (evil,)), tmp_path / "evil.html", f"Map </title>{HOSTILE}")
    parts = read(path)
    assert parts.tags == plain.tags
    assert not any("alert('caught')</script" in script for script in parts.scripts)
    assert "<script>alert('caught')" in "".join(parts.words)  # the title, as words
    assert "<script>alert" not in path.read_text(encoding="utf-8")


def test_the_page_says_what_the_map_cannot_show(tmp_path):
    text = " ".join(read(write_map(map_of(9, (QUESTION,)), tmp_path / "map.html", "Map")).words)
    assert "The keys differ in 8 directions." in text
    assert "hold 50% of their squared distances" in text
    assert "a projection of the decision" in text
    assert "100.0% lie in the region of their nearest task" in re.sub(r"\s+", " ", text)
    exact = map_of(3, (QUESTION,), is_exact=True, is_reach_exact=True)
    text = " ".join(read(write_map(exact, tmp_path / "map.html", "Map")).words)
    assert "the regions are exact" in text
    assert "Outside the dotted outline of its nearest key a question is refused" in text
    flat = map_of(2, (QUESTION,), num_axes=1, is_exact=True, reaches=())
    text = " ".join(read(write_map(flat, tmp_path / "map.html", "Map")).words)
    assert "the height says how far a question is beyond the threshold" in text


def test_the_most_frequent_mistakes_are_listed_by_name(tmp_path):
    wrong = [dataclasses.replace(QUESTION, task=f"t{i}") for i in range(1, 20) for _ in range(i)]
    parts = read(write_map(map_of(20, (QUESTION, *wrong)), tmp_path / "map.html", "Map"))
    words = [word.strip() for word in parts.words if word.strip()]
    first = words.index("questions", words.index("Most frequent mistakes")) + 1
    assert words[first : first + 6] == ["t19", "t0", "19 of 19", "t18", "t0", "18 of 18"]
    assert "7 rarer ones are left out." in words
    right = read(write_map(map_of(2, (QUESTION,)), tmp_path / "map.html", "Map"))
    assert any("There is no mistake." in word for word in right.words)


def test_without_labelled_questions_there_is_no_matrix(tmp_path):
    for questions in ((), (dataclasses.replace(QUESTION, task=None),)):
        parts = read(write_map(map_of(3, questions), tmp_path / "map.html", "Map"))
        assert "matrix" not in {attributes.get("id") for _, attributes in parts.tags}
        assert "Confusion matrix" not in parts.words


def test_the_same_map_gives_the_same_bytes(tmp_path):
    one, other = (write_map(map_of(4, (QUESTION,)), tmp_path / name, "Map") for name in ("a.html", "b.html"))
    assert one.read_bytes() == other.read_bytes()


def test_text_that_utf_8_cannot_say_does_not_stop_the_page(tmp_path):
    odd = dataclasses.replace(QUESTION, text="half a character \ud83d and \u2028 a line")
    assert write_map(map_of(2, (odd,)), tmp_path / "map.html", "Map \ud83d").stat().st_size > 1_000_000


def test_a_full_disk_leaves_the_older_page_and_no_debris(tmp_path, monkeypatch):
    def fill(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fill)
    (tmp_path / "old.html").write_text("kept")
    for name in ("old.html", "new.html"):
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
            write_map(map_of(2), tmp_path / name, "Map")
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "kept"


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"map\.png is no \.html file, which a map is: name one, such as"):
        check_map_file(tmp_path / "map.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    mend = r"\): name a file in a folder you may write to$"
    with pytest.raises(ConfigError, match=rf"file/map\.html cannot be written \(Not a directory{mend}"):
        check_map_file(tmp_path / "file" / "map.html")
    with pytest.raises(ConfigError, match=rf"folder\.html cannot be written \(Is a directory{mend}"):
        check_map_file(tmp_path / "folder.html")
    with pytest.raises(ConfigError, match=rf"folder\.html cannot be written \(Is a directory{mend}"):
        write_map(map_of(2), tmp_path / "folder.html", "Map")
    check_map_file(tmp_path / "map.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html"]
    (tmp_path / "kept.html").write_text("kept")
    check_map_file(tmp_path / "kept.html")
    assert (tmp_path / "kept.html").read_text() == "kept"
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    with pytest.raises(ConfigError, match=r"^maps need plotly: pip install 'scalable-lm\[bench\]'$"):
        check_map_file(tmp_path / "map.html")
