"""From rows to examples: the shapes a row may have, and what is said about one that has none of them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from slm.checked import check_characters
from slm.errors import DataError
from slm.tasks.sampling import fold
from slm.tasks.task import Example, Message, TaskKind

# The columns that make a shape, and which of them ask and answer.
SHAPES = (("text", "label"), ("prompt", "completion"), ("messages",), ("instruction", "output"))
QUESTION_COLUMNS = ("text", "prompt", "messages", "instruction")
SHAPES_TEXT = "text + label, prompt + completion, messages, or instruction + output (input optional)"


class Row(NamedTuple):
    """One row and where it stands.

    Attributes:
        origin: file or data set it is from; empty for rows in memory.
        unit: what is counted: "line" or "row".
        number: where it stands, from 1.
        fields: its columns.
    """

    origin: str
    unit: str
    number: int
    fields: Mapping[str, object]

    @property
    def spot(self) -> str:
        """Where the row stands in its file."""
        return f"{self.unit} {self.number}"

    @property
    def place(self) -> str:
        """Where the row stands, with its file."""
        return f"{self.origin} {self.spot}".strip()


def to_examples(
    rows: Sequence[Row], kind: TaskKind | str | None, origin: str
) -> tuple[TaskKind, list[Example]]:
    """Turn rows into examples, in the shape of the first row.

    Args:
        rows: rows of one file.
        kind: classification or generation; None takes text + label as the first, all else as the second.
        origin: name of the file, for messages.

    Returns:
        The kind, given or found, and one example for each row.

    Raises:
        DataError: there are no rows, or a row does not fit.
        ConfigError: the kind is unknown.
    """
    given = None if kind is None else TaskKind.parse(kind)
    if not rows:
        raise DataError(f"{origin}: no rows found, at least 1 is needed: add rows such as {_SAMPLE}")
    shape = _recognise(rows[0])
    found = given or (TaskKind.CLASSIFICATION if shape == SHAPES[0] else TaskKind.GENERATION)
    pairs = [_pair(row, shape, rows[0]) for row in rows]
    answers = [answer for _, answer in pairs]
    if found is TaskKind.CLASSIFICATION:
        targets = _label_texts(rows, answers, column=shape[-1])
    else:
        targets = [_text(row, shape[-1], answer) for row, answer in zip(rows, answers, strict=True)]
    triples = zip(rows, pairs, targets, strict=True)
    return found, [Example(asked, y, row.place if row.origin else "") for row, (asked, _), y in triples]


def collect_labels(examples: Sequence[Example], kind: TaskKind, origin: str) -> tuple[str, ...]:
    """Return the sorted labels of a classification, and none for a generation.

    Raises:
        DataError: a classification has only one label, or two that look alike.
    """
    if kind is TaskKind.GENERATION:
        return ()
    _refuse_lookalikes(examples, origin)
    labels = tuple(sorted({example.target or "" for example in examples}))
    if len(labels) < 2:
        raise DataError(
            f"{origin}: every row has the label {labels[0]!r}, a classification needs at least 2 labels: "
            'add rows of another label or set kind to "generation"'
        )
    return labels


def _refuse_lookalikes(examples: Sequence[Example], origin: str) -> None:
    """Two spellings of one label would silently be two classes."""
    places: dict[str, str] = {}
    for number, example in enumerate(examples, start=1):
        places.setdefault(example.target or "", example.place or f"{origin}, row {number}")
    for first, label in _lookalikes(places):
        raise DataError(
            f"{places[label]}: label {label!r} differs from {first!r} only in case, blanks or Unicode form, "
            "and they would be two labels: write them alike, or change one of them"
        )


def _lookalikes(labels: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every label after one that it looks like."""
    first_of: dict[str, str] = {}
    for label in labels:
        first = first_of.setdefault(fold(unicodedata.normalize("NFC", label)), label)
        if first != label:
            yield first, label


def check_labels(labels: Sequence[str], what: str) -> None:
    """Refuse labels that no file of rows can give: each is text without blanks around it, none like another.

    Args:
        labels: that come from elsewhere than rows.
        what: how to call them in an error.

    Raises:
        DataError: one is not such a text, or looks like another.
    """
    for label in labels:
        if not isinstance(label, str) or not label.strip() or label != label.strip():
            raise DataError(
                f"{what}: each must be text that is not blank, without blanks around it, got {shown(label)}: "
                "mend it"
            )
        check_characters(label, f"{what}: {shown(label)}")
    for first, label in _lookalikes(labels):
        raise DataError(
            f"{what}: {label!r} differs from {first!r} only in case, blanks or Unicode form: "
            "change one of them"
        )


def to_question(row: Row) -> str | tuple[Message, ...]:
    """Return what a row asks: its text, prompt or instruction, or its conversation up to the answer.

    Raises:
        DataError: the row has none of these columns, more than one, or a blank text.
    """
    present = [column for column in QUESTION_COLUMNS if column in row.fields]
    if len(present) != 1:
        raise DataError(
            f"{row.place}: expected one of the columns text, prompt, messages and instruction, "
            f"got {_columns(row)}: rename or drop columns"
        )
    value = row.fields[present[0]]
    if present[0] != "messages":
        return _question(row, present[0], value)
    messages = _messages(row, value)
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    return _asked(row, messages)


_SAMPLE = '{"text": "...", "label": "..."}'


def _recognise(first: Row) -> tuple[str, ...]:
    fitting = [shape for shape in SHAPES if all(column in first.fields for column in shape)]
    if len(fitting) == 1:
        return fitting[0]
    problem = "no known shape" if not fitting else "more than one shape"
    raise DataError(
        f"{first.place}: columns {_columns(first)} have {problem}, allowed is {SHAPES_TEXT}: "
        "rename or drop columns"
    )


def _pair(row: Row, shape: tuple[str, ...], first: Row) -> tuple[str | tuple[Message, ...], object]:
    missing = [column for column in shape if column not in row.fields]
    if missing:
        raise DataError(
            f'{row.place}: column "{missing[0]}" is missing (found {_columns(row)}), every row needs the '
            f"columns of {first.spot}: add it or delete the {row.unit}"
        )
    if shape == ("messages",):
        messages = _messages(row, row.fields["messages"])
        if messages[-1].role != "assistant":
            raise DataError(
                f'{row.place}: the last message must be of the role "assistant", as it is the answer to '
                f'learn, got "{messages[-1].role}": add the answer or delete the {row.unit}'
            )
        return _asked(row, messages[:-1]), messages[-1].content
    return _question(row, shape[0], row.fields[shape[0]]), row.fields[shape[1]]


def _question(row: Row, column: str, value: object) -> str:
    """A row's question as one text: an instruction with the input it may have."""
    context = row.fields.get("input") if column == "instruction" else None
    if context is None or context == "":
        return _text(row, column, value)
    return f"{_text(row, column, value)}\n\n{_text(row, 'input', context)}"


def _asked(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not any(message.role == "user" for message in messages):
        raise DataError(
            f'{row.place}: at least one message of the role "user" is needed before the answer: '
            f"add the question or delete the {row.unit}"
        )
    return messages


def _messages(row: Row, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f'{row.place}: "messages" must be a list of objects with role and content, '
            f"got {shown(value)}: mend it or delete the {row.unit}"
        )
    messages = []
    for number, item in enumerate(value, start=1):
        place = f"{row.place}, message {number}"
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            raise DataError(f"{place}: must be an object with role and content, got {shown(item)}: mend it")
        try:
            messages.append(Message(item["role"], item["content"]))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        _text(row, "content", item["content"])
    return tuple(messages)


def _text(row: Row, column: str, value: object) -> str:
    wanted = f'{row.place}: "{column}" must be text that is not blank, got'
    if not isinstance(value, str):
        raise DataError(f"{wanted} {shown(value)}: fill it in as text or delete the {row.unit}")
    if not value.strip():
        raise DataError(f"{wanted} {shown(value)}: fill it in or delete the {row.unit}")
    check_characters(value, f'{row.place}: "{column}"')
    return value


def _label_texts(rows: Sequence[Row], answers: Sequence[object], column: str) -> list[str]:
    values = [_plain(answer) for answer in answers]
    first = type(values[0])
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, str):
            _text(row, column, value)
        elif not isinstance(value, int):
            raise DataError(
                f'{row.place}: "{column}" must be text, a whole number or true/false, '
                f"got {shown(value)}: mend it or delete the {row.unit}"
            )
        if type(value) is not first:
            raise DataError(
                f"{row.place}: two label types, {rows[0].spot} has {shown(values[0])} and {row.spot} has "
                f"{shown(value)}, allowed is one type for the whole file: write every label as text"
            )
    return [value.strip() if isinstance(value, str) else str(value) for value in values]


def _plain(value: Any) -> object:
    """A value as Python's own, where it is a number or a truth value of NumPy or torch."""
    return value.item() if getattr(value, "shape", None) == () else value


def shown(value: object) -> str:
    """Return a value as a message shows it: short, on one line, with its type where that helps."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "nothing (null or NaN)"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _columns(row: Row) -> str:
    return ", ".join(str(column) for column in row.fields) or "none"
