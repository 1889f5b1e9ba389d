"""Every row shape, and what is said about each way a row can be wrong."""

import numpy as np
import pytest
import torch

from slm.tasks import Example, Message, Task, TaskKind

from .files import GOOD, NO_ROWS, PAIR, SHAPES, lines, message_of, write


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "2+2=", "completion": " 4", "extra": 1}, Example("2+2=", " 4")),
        ({"instruction": "Add", "input": "2, 2", "output": "4"}, Example("Add\n\n2, 2", "4")),
        ({"instruction": "Add", "input": "", "output": "4"}, Example("Add", "4")),
        ({"instruction": "Add", "output": "4"}, Example("Add", "4")),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
            Example((Message("system", "Be brief."), Message("user", "Hi")), "Hello"),
        ),
    ],
)
def test_every_shape_but_text_and_label_is_a_generation(tmp_path, row, example):
    task = Task.load("t", write(tmp_path, lines(row)))
    assert task == Task("t", TaskKind.GENERATION, (example,))


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        (np.array([3, 1]), ("1", "3")),
        (np.array([True, False]), ("False", "True")),
        (np.array(["no", "yes"]), ("no", "yes")),
        (torch.tensor([3, 1]), ("1", "3")),
    ],
)
def test_labels_of_an_array_are_those_of_a_list(labels, texts):
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    assert Task.from_rows("t", rows).labels == texts
    assert {type(example.target) for example in Task.from_rows("t", rows).examples} == {str}


def test_a_given_kind_overrides_the_shape(tmp_path):
    path = write(tmp_path, lines({"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "y"}))
    assert Task.load("t", path, kind="classification").labels == ("x", "y")
    reviews = write(tmp_path, lines({"text": "a", "label": "good"}))
    assert Task.load("t", reviews, kind=TaskKind.GENERATION).examples == (Example("a", "good"),)


@pytest.mark.parametrize(("labels", "texts"), [([1, 0], ("1", "0")), ([True, False], ("True", "False"))])
def test_whole_numbers_and_truth_values_become_text(tmp_path, labels, texts):
    path = write(tmp_path, lines(*({"text": f"t{label}", "label": label} for label in labels)))
    task = Task.load("t", path)
    assert tuple(example.target for example in task.examples) == texts
    assert task.labels == tuple(sorted(texts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl is empty, at least 1 row is needed: add rows"),
        (
            "\n \n",
            f"data.jsonl: {NO_ROWS}",
        ),
        (
            lines(GOOD) + '\n{"text": "b", "label"}',
            "data.jsonl line 2: broken JSON at column 22 (Expecting ':' delimiter): mend it or delete it",
        ),
        (
            lines(GOOD) + "\n\n[1, 2]",
            'data.jsonl line 3: expected one object such as {"text": "...", "label": "..."}, got '
            "[1, 2] (list): "
            "write one object a line",
        ),
        (
            lines({"sentence": "a", "label": "b"}),
            f"data.jsonl line 1: columns sentence, label have no known shape, allowed is {SHAPES}: "
            "rename or drop columns",
        ),
        (
            lines(GOOD | PAIR),
            "data.jsonl line 1: columns text, label, prompt, completion have more than one shape, "
            f"allowed is {SHAPES}: rename or drop columns",
        ),
        (
            lines(GOOD, {"text": "b"}),
            'data.jsonl line 2: column "label" is missing (found text), every row needs the '
            "columns of line 1: "
            "add it or delete the line",
        ),
        (
            lines(GOOD, {"text": " ", "label": "y"}),
            "data.jsonl line 2: \"text\" must be text that is not blank, got ' ': fill it in or "
            "delete the line",
        ),
        (
            lines({"text": 12, "label": "y"}),
            'data.jsonl line 1: "text" must be text that is not blank, got 12 (int): '
            "fill it in as text or delete the line",
        ),
        (
            lines({"text": None, "label": "y"}),
            'data.jsonl line 1: "text" must be text that is not blank, got nothing (null or NaN): '
            "fill it in as text or delete the line",
        ),
        (
            '{"text": "a", "label": NaN}',
            'data.jsonl line 1: "label" must be text, a whole number or true/false, '
            "got nothing (null or NaN): mend it or delete the line",
        ),
        (
            lines(GOOD, {"text": "b", "label": 1.5}),
            'data.jsonl line 2: "label" must be text, a whole number or true/false, got 1.5 (float): '
            "mend it or delete the line",
        ),
        (
            lines(GOOD, {"text": "b", "label": ""}),
            "data.jsonl line 2: \"label\" must be text that is not blank, got '': fill it in or "
            "delete the line",
        ),
        (
            lines(GOOD, GOOD, {"text": "b", "label": 3}),
            "data.jsonl line 3: two label types, line 1 has 'x' and line 3 has 3 (int), allowed "
            "is one type for "
            "the whole file: write every label as text",
        ),
        (
            lines({"text": "a", "label": 1}, {"text": "b", "label": True}),
            "data.jsonl line 2: two label types, line 1 has 1 (int) and line 2 has True (bool), "
            "allowed is one "
            "type for the whole file: write every label as text",
        ),
        (
            lines(GOOD, GOOD),
            "data.jsonl: every row has the label 'x', a classification needs at least 2 labels: add rows of "
            'another label or set kind to "generation"',
        ),
        (
            lines(GOOD, {"text": "b", "label": "spam"}, {"text": "c", "label": "Spam"}),
            "data.jsonl line 3: label 'Spam' differs from 'spam' only in case, blanks or Unicode "
            "form, and they would be two labels: write them alike, or change one of them",
        ),
        (
            lines({"text": "b", "label": "too  late"}, {"text": "c", "label": "too late"}),
            "data.jsonl line 2: label 'too late' differs from 'too  late' only in case, blanks or Unicode "
            "form, and they would be two labels: write them alike, or change one of them",
        ),
        (
            lines({"text": "b", "label": "caf\u00e9"}, {"text": "c", "label": "cafe\u0301"}),
            "data.jsonl line 2: label 'cafe\u0301' differs from 'caf\u00e9' only in case, blanks or Unicode "
            "form, and they would be two labels: write them alike, or change one of them",
        ),
        (
            lines({"prompt": "a", "completion": 4}),
            'data.jsonl line 1: "completion" must be text that is not blank, got 4 (int): '
            "fill it in as text or delete the line",
        ),
        (
            lines({"prompt": "half \ud83d", "completion": "b"}),
            'data.jsonl line 1: "prompt" holds half a character (U+D83D): remove it',
        ),
        (
            b'{"text": "a", "label": "b"}\n{"text": "caf\xe9"}',
            "data.jsonl line 2, byte 14: 0xe9 is not UTF-8: save the file as UTF-8",
        ),
        (b"\xff\xfe{", "data.jsonl line 1, byte 1: 0xff is not UTF-8: save the file as UTF-8"),
    ],
)
def test_a_wrong_jsonl_file_is_refused_with_line_cause_and_mend(tmp_path, content, message):
    assert message_of(write(tmp_path, content)) == message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            "Hi",
            "\"messages\" must be a list of objects with role and content, got 'Hi': mend it or "
            "delete the line",
        ),
        (
            [],
            '"messages" must be a list of objects with role and content, got [] (list): mend it '
            "or delete the line",
        ),
        (
            [{"role": "user", "content": "Hi"}],
            'the last message must be of the role "assistant", as it is the answer to learn, got "user": '
            "add the answer or delete the line",
        ),
        (
            [{"role": "assistant", "content": "Hi"}],
            'at least one message of the role "user" is needed before the answer: '
            "add the question or delete the line",
        ),
        (["Hi"], "message 1: must be an object with role and content, got 'Hi': mend it"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hi"}],
            "message 2: role must be system, user or assistant, got 'bot': use one of these",
        ),
        (
            [{"role": "user", "content": None}],
            "message 1: content must be text that is not blank, got None: fill it in",
        ),
    ],
)
def test_a_wrong_conversation_is_refused(tmp_path, messages, message):
    text = message_of(write(tmp_path, lines({"messages": messages})))
    assert text.removeprefix("data.jsonl line 1: ").removeprefix("data.jsonl line 1, ") == message
