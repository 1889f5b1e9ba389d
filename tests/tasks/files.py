"""Writing small data files and reading back what loading says about them."""

import json
from pathlib import Path

import pytest

from slm.errors import DataError
from slm.tasks import Task

SHAPES = "text + label, prompt + completion, messages, or instruction + output (input optional)"
GOOD = {"text": "a", "label": "x"}
PAIR = {"prompt": "a", "completion": "b"}
NO_ROWS = 'no rows found, at least 1 is needed: add rows such as {"text": "...", "label": "..."}'


def write(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows))


def message_of(path: str | Path, **options) -> str:
    """Return what loading says, with the path cut down to its name."""
    with pytest.raises(DataError) as caught:
        Task.load("t", path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(Path(path).parent) + "/", "") if isinstance(path, Path) else text
