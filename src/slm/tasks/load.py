"""Reading tasks and questions: JSONL, JSON, CSV, Parquet, Hugging Face data sets and plain lines."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from slm.errors import ConfigError, DataError
from slm.tasks.rows import Row, collect_labels, shown, to_examples, to_question
from slm.tasks.task import Example, Message, Task, TaskKind, check_name, draw

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_SUFFIXES_TEXT = ".csv, .json, .jsonl or .parquet"
PARQUET_COPY = "refs/convert/parquet"
"""Branch where the hub keeps its own copy of a data set, for many that are scripts the only readable form."""
_DATA_SET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A name that ends like this is a file that is meant, not a data set id.
_FILE_SUFFIX = re.compile(
    r"\.(csv|tsv|txt|jsonl?|ndjson|parquet|arrow|xlsx?|ya?ml|gz|zip|zst|bz2)", re.IGNORECASE
)


def load_task(
    name: str,
    source: str | Path,
    *,
    kind: TaskKind | str | None = None,
    test: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> Task:
    """Read a task from a file or a Hugging Face data set.

    Args:
        name: name of the task.
        source: path of a .csv, .json, .jsonl or .parquet file, or id of a data set such as "owner/name".
        kind: classification or generation; None reads it off the shape of the rows.
        test: where the test examples are, like source; of a data set its split "test" is read.
        split: which split of a data set to learn from; files have none.
        limit: most examples to keep, drawn in proportion to the labels; None keeps all.
        seed: chooses the draw.

    Raises:
        TaskError: the name is not allowed.
        DataError: the source or one of its rows cannot be used; the message names the line.
        ConfigError: the kind is unknown or the limit is below 1.
    """
    check_name(name)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}: raise it or leave it out")
    found, examples = to_examples(read_rows(source, split), kind, origin=str(source))
    labels = collect_labels(examples, found, origin=str(source))
    held_out = () if test is None else _read_test(test, found, labels)
    kept = tuple(examples) if limit is None else draw(tuple(examples), found, limit, seed)
    return Task(name, found, kept, labels, held_out)


def _read_test(source: str | Path, kind: TaskKind, labels: tuple[str, ...]) -> tuple[Example, ...]:
    rows = read_rows(source, "test")
    _, examples = to_examples(rows, kind, origin=str(source))
    for row, example in zip(rows, examples, strict=True):
        if labels and example.target not in labels:
            raise DataError(
                f"{row.place}: label {example.target!r} is none of those in the training data, "
                f"{', '.join(labels)}: mend it or delete the {row.unit}"
            )
    return tuple(examples)


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Read the rows of a file, or of a split of a Hugging Face data set.

    Raises:
        DataError: the source is missing, of an unknown type, or damaged.
    """
    if isinstance(source, str) and _is_data_set_id(source):
        return _read_data_set(source, split)
    path = Path(source)
    suffix = _check_file(path, SUFFIXES)
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    return list(readers[suffix](text, str(path)))


def read_questions(source: Path | TextIO) -> list[str | tuple[Message, ...]]:
    """Read what to ask: plain lines, or rows with a text, a prompt or messages.

    Args:
        source: a data file as for a task, a file of plain lines or of JSON objects, or an open stream.
            Blank lines are skipped, and an answer that a row holds is left out.

    Returns:
        The questions in order, at least one.

    Raises:
        DataError: the source cannot be read, has no question, or a row is not one.
    """
    if isinstance(source, Path):
        origin = str(source)
        if source.suffix.lower() in SUFFIXES:
            questions = [to_question(row) for row in read_rows(source)]
        else:
            _check_file(source, allowed=None)
            questions = _read_lines(_read_text(source), origin)
    else:
        origin = str(getattr(source, "name", "input"))
        try:
            text = source.read()
        except UnicodeDecodeError as error:
            raise DataError(_undecodable(error, origin)) from None
        questions = _read_lines(text.removeprefix("\ufeff"), origin)
    if not questions:
        raise DataError(f"{origin}: no questions found, at least 1 is needed: write one a line")
    return questions


def _read_lines(text: str, origin: str) -> list[str | tuple[Message, ...]]:
    if text.lstrip().startswith("{"):
        return [to_question(row) for row in _read_jsonl(text, origin)]
    return [line.strip() for line in text.split("\n") if line.strip()]


def _is_data_set_id(source: str) -> bool:
    if Path(source).exists() or _FILE_SUFFIX.fullmatch(Path(source).suffix):
        return False
    return _DATA_SET_ID.fullmatch(source) is not None


def _check_file(path: Path, allowed: tuple[str, ...] | None) -> str:
    """Return the suffix of a file that can be read."""
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected one file ({_SUFFIXES_TEXT}): name the file inside it")
    suffix = path.suffix.lower()
    if allowed is not None and suffix not in allowed:
        raise DataError(
            f"{path} ends in {suffix!r}, allowed is {_SUFFIXES_TEXT}: convert the file or mend its name"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist, expected a file ({_SUFFIXES_TEXT}): check the path")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty, at least 1 row is needed: add rows")
    return suffix


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_undecodable(error, str(path))) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def _undecodable(error: UnicodeDecodeError, origin: str) -> str:
    before = error.object[: error.start]
    line, byte = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
    found = error.object[error.start]
    return f"{origin} line {line}, byte {byte}: 0x{found:02x} is not UTF-8: save the file as UTF-8"


def _read_jsonl(text: str, origin: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parse_json(line, f"{origin} line {number}")
        if not isinstance(value, Mapping):
            raise DataError(
                f'{origin} line {number}: expected one object such as {{"text": "...", "label": "..."}}, '
                f"got {shown(value)}: write one object a line"
            )
        yield Row(origin, "line", number, value)


def _read_json(text: str, origin: str) -> Iterator[Row]:
    values = _parse_json(text, origin)
    if not isinstance(values, list):
        raise DataError(
            f"{origin}: a .json file must hold a list of objects, got {shown(values)}: "
            "wrap the objects in [ ], or write one a line into a .jsonl file"
        )
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping):
            raise DataError(f"{origin} row {number}: expected an object, got {shown(value)}: mend the row")
        yield Row(origin, "row", number, value)


class _RepeatedNameError(ValueError):
    """A JSON object has two values of one name, of which Python would keep the second."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedNameError(_repeated([name for name, _ in pairs]))
    return found


def _repeated(names: Sequence[str]) -> str:
    """The first of the names that stands twice among them."""
    return next(name for number, name in enumerate(names) if name in names[:number])


def _parse_json(text: str, place: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        spot = f"column {error.colno}" if "line" in place else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: broken JSON at {spot} ({error.msg}): mend it or delete it") from None
    except _RepeatedNameError as error:
        raise DataError(f'{place}: "{error}" stands twice in one object: drop one of the two') from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: JSON that cannot be read ({error}): mend it or delete it") from None


def _read_csv(text: str, origin: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{origin} line {number}: broken CSV ({error}): mend the quotes, or save it as .jsonl"
            ) from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _check_header([cell.strip() for cell in cells], f"{origin} line {number}")
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{origin} line {number}: {len(cells)} fields found, the first line has {len(header)}: "
                'put texts with commas or line breaks in "double quotes"'
            )
        yield Row(origin, "line", number, dict(zip(header, cells, strict=True)))


def _check_header(names: list[str], place: str) -> list[str]:
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{place}: columns are separated by semicolons, only commas are read: save it so")
    if len(set(names)) < len(names):
        raise DataError(
            f'{place}: the column "{_repeated(names)}" stands twice: rename or drop one of the two'
        )
    return names


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path} is no readable Parquet file ({reason}): write it again") from None
    return [Row(str(path), "row", number, value) for number, value in enumerate(values, start=1)]


def open_data_set(
    source: str, split: str, configuration: str | None = None, revision: str | None = None
) -> Any:
    """Load one split of a Hugging Face data set.

    Args:
        source: its id, or a folder with its files.
        split: name, or a slice such as "train[:80%]".
        configuration: of a data set that has several.
        revision: branch or commit; None is the main branch. In the hub's own copy of data sets
            (:data:`PARQUET_COPY`) a configuration is a folder.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    elsewhere: dict[str, Any] = {}
    if revision is not None:
        elsewhere["revision"] = revision
    if revision == PARQUET_COPY:
        elsewhere["data_dir"], configuration = configuration, None
    try:
        return datasets.load_dataset(source, configuration, split=split, **elsewhere)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise DataError(
            f"data set {source} ({split}) cannot be loaded ({reason}): check the id, the split and the "
            f"connection, or give a file ({_SUFFIXES_TEXT})"
        ) from None


def _read_data_set(source: str, split: str) -> list[Row]:
    import datasets

    origin = f"data set {source} ({split})"
    data = open_data_set(source, split)
    names = {
        column: feature.names
        for column, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return [Row(origin, "row", n, _name_labels(row, names)) for n, row in enumerate(data, start=1)]


def _name_labels(row: Mapping[str, object], names: Mapping[str, list[str]]) -> dict[str, object]:
    named = dict(row)
    for column, known in names.items():
        value = row[column]
        # Data sets write -1 where a label is withheld.
        named[column] = known[value] if isinstance(value, int) and 0 <= value < len(known) else None
    return named
