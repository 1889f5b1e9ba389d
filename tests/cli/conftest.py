"""One store with one task that all tests of the commands share, and ``slm`` as a function."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from slm.cli.main import main

GOOD = (
    "a joy from start to end",
    "warm, funny and clever",
    "the best film this year",
    "lovely acting and music",
    "I laughed and cried",
    "a small wonder",
    "brilliant and moving",
    "a delight for everyone",
    "superb in every scene",
    "charming and wise",
    "a triumph of cinema",
    "I would watch it again",
)
BAD = (
    "a dull and tired mess",
    "boring beyond belief",
    "the worst film this year",
    "wooden acting, awful script",
    "I walked out early",
    "a waste of money",
    "painfully unfunny",
    "a disaster for everyone",
    "terrible in every scene",
    "stupid and loud",
    "a failure of cinema",
    "I want my time back",
)


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Slm = Callable[..., Result]


class Terminal(io.TextIOWrapper):
    """A standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


def film_rows() -> list[dict[str, str]]:
    pairs = zip(GOOD, BAD, strict=True)
    return [{"text": t, "label": y} for pair in pairs for t, y in zip(pair, ("good", "bad"), strict=True)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``slm`` sets for its process is taken back after each test; nothing asks the network."""
    from slm.cli import process

    for name, value in process._QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOMP_SPINCOUNT", process._SPINS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SLM_DEBUG", raising=False)


@pytest.fixture
def slm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Slm:
    """``slm`` in this process; ``stdin`` is what it reads."""

    def run(*arguments: object, stdin: bytes = b"", is_terminal: bool = False) -> Result:
        kind = Terminal if is_terminal else io.TextIOWrapper
        monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(stdin)))
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: ``films`` with 24 examples."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "films" / "train.jsonl", film_rows())
    write_rows(folder / "films" / "test.jsonl", film_rows()[:6])
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A store of MiniLM that has learned ``films``; no test changes it."""
    folder = tmp_path_factory.mktemp("stores") / "notes"
    assert main(["init", str(folder), "--json", "--set", "learning.num_epochs=2"]) == 0
    assert main(["learn", str(folder), "films", str(data / "films" / "train.jsonl"), "--json"]) == 0
    return folder
