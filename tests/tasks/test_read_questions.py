"""What `slm ask` may be given: lines, rows, streams."""

import io
import json
import subprocess
import sys

import pytest

from slm.errors import DataError
from slm.tasks import Message, Task, read_questions

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_plain_lines_are_questions_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_bytes(b"\xef\xbb\xbfWho?\r\n\r\n  And why? \n")
    assert read_questions(path) == ["Who?", "And why?"]
    assert read_questions(io.StringIO("\ufeffWho?\r\n\r\n  And why? \n")) == ["Who?", "And why?"]


def test_rows_are_questions_without_their_answers(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"prompt": " b"}, {"messages": TALK}, {"messages": TALK[:1]}]
    content = "\n".join(map(json.dumps, rows))
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    talk = (Message("user", "Hi"),)
    assert read_questions(path) == ["a", " b", talk, talk]
    assert read_questions(io.StringIO(content)) == ["a", " b", talk, talk]


def test_an_instruction_is_asked_as_it_is_learned():
    row = {"instruction": "Translate", "input": "bonjour", "output": "hello"}
    (learned,) = Task.from_rows("t", [row]).examples
    for asked in (row, {"instruction": "Translate", "input": "bonjour"}):
        assert read_questions(io.StringIO(json.dumps(asked))) == [learned.prompt]
    assert read_questions(io.StringIO('{"instruction": "Sing", "input": ""}')) == ["Sing"]
    assert read_questions(io.StringIO('{"text": "hi", "input": "x"}')) == ["hi"]


def test_a_table_of_texts_is_read_as_rows(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("text\nWho?\n")
    assert read_questions(path) == ["Who?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "input: no questions found, at least 1 is needed: write one a line"),
        (
            '{"question": "a"}',
            "input line 1: expected one of the columns text, prompt, messages and instruction, got question: "
            "rename or drop columns",
        ),
        (
            '{"text": "a"}\n{"text": ""}',
            "input line 2: \"text\" must be text that is not blank, got '': fill it in or delete the line",
        ),
        (
            '{"text": "a"}\nplain',
            "input line 2: broken JSON at column 1 (Expecting value): mend it or delete it",
        ),
    ],
)
def test_a_stream_that_asks_nothing_is_refused(content, message):
    with pytest.raises(DataError) as caught:
        read_questions(io.StringIO(content))
    assert str(caught.value) == message


def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert str(caught.value) == f"{path} line 2, byte 3: 0xef is not UTF-8: save the file as UTF-8"
    with path.open(encoding="utf-8") as stream, pytest.raises(DataError) as caught:
        read_questions(stream)
    assert str(caught.value) == f"{path} line 2, byte 3: 0xef is not UTF-8: save the file as UTF-8"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"questions\.txt does not exist"):
        read_questions(tmp_path / "questions.txt")


def test_the_room_imports_no_heavy_library():
    heavy = "torch transformers datasets pyarrow yaml pandas numpy"
    code = f"import sys, slm.tasks; print([m for m in '{heavy}'.split() if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
