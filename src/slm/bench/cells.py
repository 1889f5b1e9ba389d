"""The cells of a run, and the folder that holds their results: written once, never overwritten."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.errors import ConfigError, DataError

RUN_FILE = "run.json"
CELLS = "cells"

_OF_RUN = ("suite", "preset", "title", "about", "options", "digest", "bytes_per_task_of_1_percent")
_OF_CELL = (
    *("cell", "settings", "scores", "title", "tasks", "num_examples", "needs_task_id", "is_joint"),
    *("replayed_share", "learn_s", "size_bytes", "ask_s", "num_asked", "retrieve_s", "confusion"),
    *("num_refused", "time_s", "environment"),
)
_WITHIN = {"cell": ("method", "order", "seed", "per_label"), "environment": ("commit", "device")}
"""What a run and a cell always say, and what of it says more."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One stream lived through by one method.

    Attributes:
        method: name of a rival.
        order: name of an order of the suite.
        seed: of draw, initialisation and row order.
        per_label: examples of each label; None for as many in all as the preset says.
    """

    method: str
    order: str
    seed: int
    per_label: int | None = None

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        shots = "" if self.per_label is None else f"--shots-{self.per_label}"
        return f"{self.method}--order-{self.order}--seed-{self.seed}{shots}"


class RunFolder:
    """``run.json``, which says what is measured, and ``cells/*.json``, one for each finished cell.

    Args:
        path: the folder; made when :meth:`begin` is called.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, description: Mapping[str, Any]) -> None:
        """Start a run, or go on with the one that lies here.

        Args:
            description: what is measured; ``digest`` and ``data`` of it decide whether cells may lie side by
                side.

        Raises:
            ConfigError: results of something else lie here, or the folder cannot be written.
        """
        try:
            (self.path / CELLS).mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another runner may have been a moment faster
                _write_new(self.path / RUN_FILE, description)
                return
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}): choose another --out"
            ) from None
        held = _read(self.path / RUN_FILE)
        differing = [name for name in ("digest", "data", "backbone") if held.get(name) != description[name]]
        if held.get("outside_data", description.get("outside_data")) != description.get("outside_data"):
            differing.append("data of tasks outside")
        if differing:
            raise ConfigError(
                f"{self.path} holds results of suite {held.get('suite')}, preset {held.get('preset')}, which "
                f"differ in {' and '.join(differing)} from what is asked for: choose another --out"
            )

    def description(self) -> dict[str, Any]:
        """What the run measures.

        Raises:
            DataError: no run lies here, or its file is damaged.
        """
        found = _read(self.path / RUN_FILE)
        if missing := [name for name in _OF_RUN if name not in found]:
            raise DataError(
                f"{self.path / RUN_FILE} describes no run, it lacks {missing[0]}: delete it and run the same "
                "command again"
            )
        return found

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        return self._file(cell).exists()

    def keep(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Write the result of a cell; one that is there already stays.

        Raises:
            DataError: it holds a number that is not finite.
            ConfigError: it cannot be written.
        """
        if odd := _odd_number(result):
            raise DataError(
                f"its result has {odd}, which no table can hold: lower the method's learning rate, or leave "
                "the method out with --methods"
            )
        try:
            with contextlib.suppress(FileExistsError):
                _write_new(self._file(cell), result)
        except OSError as error:
            raise ConfigError(
                f"{self._file(cell)} cannot be written ({error.strerror}): see to the disk and run the same "
                "command again"
            ) from None

    def result(self, cell: Cell) -> dict[str, Any]:
        """What a finished cell says.

        Raises:
            DataError: its file is missing or damaged.
        """
        return _read_cell(self._file(cell))

    def results(self) -> list[dict[str, Any]]:
        """All finished cells, by name.

        Raises:
            DataError: a file is damaged.
        """
        return [_read_cell(file) for file in sorted((self.path / CELLS).glob("*.json"))]

    def _file(self, cell: Cell) -> Path:
        return self.path / CELLS / f"{cell.name}.json"


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()


def _write_new(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, and never over another."""
    with _beside(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        scratch.chmod(0o644)
        path.hardlink_to(scratch)


def _odd_number(value: Any, place: str = "") -> str | None:
    """The first number of a result that is not finite, with the names that lead to it."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place} {value}"
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    found = (_odd_number(part, f"{place}.{name}".lstrip(".")) for name, part in inner)
    return next((odd for odd in found if odd), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name the --out folder of `slm bench`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and run its cell again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no result: delete it and run its cell again")
    return found


def _read_cell(path: Path) -> dict[str, Any]:
    found = _read(path)
    missing = [name for name in _OF_CELL if name not in found]
    for whole, parts in _WITHIN.items():
        inner = found.get(whole)
        missing += [f"{whole}.{part}" for part in parts if not isinstance(inner, dict) or part not in inner]
    if missing:
        raise DataError(f"{path} is no result of a cell, it lacks {missing[0]}: delete it and run it again")
    return found
