"""The ``catalogue`` database: the tables ``keys`` and ``tasks``, and the one write that commits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, final

import lancedb
import pyarrow as pa
import torch
from torch import Tensor

from slm.errors import StoreError
from slm.retrieval.keys import TaskKeys
from slm.store.records import FileRecord, TaskRecord
from slm.store.values import sync_folder

Result = TypeVar("Result")

# Marked as the table's key, `name` makes LanceDB itself refuse the second of two racing inserts.
_NAME = pa.field(
    "name", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"}
)
_FILES = pa.list_(pa.struct([("path", pa.string()), ("sha256", pa.string()), ("size_bytes", pa.int64())]))
TASKS_SCHEMA = pa.schema(
    [
        _NAME,
        ("sequence", pa.int64()),
        ("commit_id", pa.string()),
        ("kind", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("created", pa.string()),
        ("num_examples", pa.int64()),
        ("num_keys", pa.int64()),
        ("num_increments", pa.int64()),
        ("folder", pa.string()),
        ("files", _FILES),
        ("metadata", pa.string()),
        ("keys_sha256", pa.string()),
    ]
)
KEYS_SCHEMA = pa.schema(
    [
        ("commit_id", pa.string()),
        ("task", pa.string()),
        ("index", pa.int64()),
        ("increment", pa.int64()),
        ("count", pa.int64()),
        ("mean", pa.list_(pa.float64())),
        ("scales", pa.list_(pa.float64())),
        ("radius", pa.float64()),
    ]
)
# Everything LanceDB and Arrow are known to raise on a damaged, vanished or read-only table.
_TROUBLES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    pa.ArrowException,
)
# What an empty cell gives.
_NO_NUMBERS = (TypeError, struct.error)
_Files = Mapping[str, set[str]]
"""Names of files by their folder."""

# A writer tidying up may take an old version away under a reader; the next try sees the new one.
_NUM_TRIES = 4
# Versions younger than this stay, so that readers in other processes finish what they began.
_KEPT_FOR = timedelta(minutes=10)
# LanceDB warns about 0; after a task is forgotten nothing of it may stay in an older version.
_AT_ONCE = timedelta(milliseconds=1)

# Where in LanceDB's sources an error arose, which says nothing to a user.
_SOURCE_PLACE = re.compile(r",? ?\S+\.rs:\d+(:\d+)?")


@final
class Tables:
    """Both tables of one store; every read sees the newest version on disk.

    Attributes:
        folder: the database's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = [name for name in ("tasks", "keys") if not (folder / f"{name}.lance").is_dir()]
        if missing:
            raise StoreError(f"{folder} has no table {missing[0]!r}: restore the folder from a copy")
        database = lancedb.connect(folder, read_consistency_interval=timedelta(0))
        self._tasks = self._try(lambda: database.open_table("tasks"))
        self._keys = self._try(lambda: database.open_table("keys"))
        self._records: dict[str, TaskRecord] = {}  # by commit id; a row never changes
        self._synced: dict[str, _Files] = {}  # by table; what this process knows to be on the disk

    @classmethod
    def create(cls, folder: Path) -> Tables:
        """Make a database with both tables, empty, and wait until it is on the disk."""
        database = lancedb.connect(folder)
        database.create_table("tasks", schema=TASKS_SCHEMA)
        database.create_table("keys", schema=KEYS_SCHEMA)
        _sync_new(folder, {})
        return cls(folder)

    @property
    def version(self) -> int:
        """Version of the table ``tasks``: grows with every commit and every task forgotten."""
        return int(self._try(lambda: self._tasks.version))

    def tasks(self) -> list[TaskRecord]:
        """Every visible task in learning order.

        Raises:
            StoreError: the table is damaged.
        """

        def query() -> list[TaskRecord]:
            table = self._tasks.to_arrow()
            commit_ids = table["commit_id"].to_pylist()
            unseen = [i for i, commit_id in enumerate(commit_ids) if commit_id not in self._records]
            new = {
                row["commit_id"]: _record(row) for row in table.take(pa.array(unseen, pa.int64())).to_pylist()
            }
            known = self._records | new
            self._records = {commit_id: known[commit_id] for commit_id in commit_ids}
            return [known[commit_id] for commit_id in commit_ids]

        return sorted(self._try(query), key=lambda record: (record.sequence, record.commit_id))

    def key_rows(self, commit_ids: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Rows of the table ``keys`` by commit id, of these commits or, with None, of all."""
        if commit_ids is None or len(commit_ids) > 50:  # a long list costs more than a whole read

            def query() -> list[dict[str, Any]]:
                return list(self._keys.to_arrow().to_pylist())
        else:
            condition = _among(commit_ids)

            def query() -> list[dict[str, Any]]:
                return list(self._keys.search().where(condition).to_arrow().to_pylist())

        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self._try(query):
            rows.setdefault(row["commit_id"], []).append(row)
        return rows

    def add_keys(self, commit_id: str, task: str, keys: TaskKeys) -> str:
        """Append the rows of a task that is not visible yet, and wait until they are on the disk.

        Returns:
            Their sha256, see :func:`digest_of`.
        """
        columns = [keys.increments.tolist(), keys.counts.tolist(), keys.means.tolist()]
        names = ("commit_id", "task", "index", "increment", "count", "mean", "scales", "radius")
        rows = [
            dict(
                zip(names, (commit_id, task, index, *values, keys.scales.tolist(), keys.radius), strict=True)
            )
            for index, values in enumerate(zip(*columns, strict=True))
        ]
        self._write("keys", lambda: self._keys.add(pa.Table.from_pylist(rows, schema=KEYS_SCHEMA)))
        return digest_of(rows)

    def insert(self, record: TaskRecord) -> bool:
        """THE commit point: make a task visible, unless its name is visible already.

        Returns:
            Whether this call made it visible.
        """
        row = asdict(record) | {"metadata": json.dumps(dict(record.metadata))}
        merge = self._tasks.merge_insert("name").when_not_matched_insert_all()

        def execute() -> Any:
            return merge.execute(pa.Table.from_pylist([row], schema=TASKS_SCHEMA))

        return bool(self._write("tasks", execute).num_inserted_rows)

    def delete_task(self, record: TaskRecord) -> None:
        """The commit point of forgetting: make a task invisible."""
        self._write("tasks", lambda: self._tasks.delete(_among([record.commit_id])))

    def delete_keys(self, commit_ids: Sequence[str]) -> None:
        """Delete the key rows of these commits."""
        if commit_ids:
            self._write("keys", lambda: self._keys.delete(_among(commit_ids)))

    def note_digests(self) -> None:
        """Write down the digest of every task's keys where the tasks table has none yet, in one step."""
        if "keys_sha256" in self._try(lambda: self._tasks.schema.names):
            return
        digests: dict[str, str] = {}
        for commit_id, rows in self.key_rows().items():
            with suppress(*_NO_NUMBERS):  # a task whose keys are damaged stays one
                digests[commit_id] = digest_of(rows)

        def rewrite() -> None:
            rows = self._tasks.to_arrow().to_pylist()
            noted = [row | {"keys_sha256": digests.get(row["commit_id"], "")} for row in rows]
            self._tasks.add(pa.Table.from_pylist(noted, schema=TASKS_SCHEMA), mode="overwrite")

        self._write("tasks", rewrite)

    def erase_deleted(self) -> None:
        """Rewrite both tables and drop their past, so that no deleted row can be read from the disk."""
        for name, table, schema in (("tasks", self._tasks, TASKS_SCHEMA), ("keys", self._keys, KEYS_SCHEMA)):

            def rewrite(table: Any = table, schema: pa.Schema = schema) -> None:
                rows = pa.Table.from_pylist(table.to_arrow().to_pylist(), schema=schema)
                table.add(rows, mode="overwrite")
                time.sleep(2 * _AT_ONCE.total_seconds())  # let the version before it reach the age to go
                table.optimize(cleanup_older_than=_AT_ONCE)

            self._write(name, rewrite)

    def compact(self) -> None:
        """Join the small files of many commits into one, so that opening stays fast."""
        self._write("tasks", lambda: self._tasks.optimize(cleanup_older_than=_KEPT_FOR))
        self._write("keys", lambda: self._keys.optimize(cleanup_older_than=_KEPT_FOR))

    def _write(self, name: str, action: Callable[[], Result]) -> Result:
        try:
            result = action()
        except _TROUBLES as error:
            raise StoreError(
                f"{self.folder} cannot be written ({_first_line(error)}): see that the disk is neither "
                "full nor read-only"
            ) from error
        self._synced[name] = _sync_new(self.folder / f"{name}.lance", self._synced.get(name, {}))
        return result

    def _try(self, query: Callable[[], Result]) -> Result:
        for attempt in range(_NUM_TRIES):
            try:
                return query()
            except _TROUBLES as error:
                if attempt + 1 == _NUM_TRIES:
                    raise StoreError(
                        f"{self.folder} cannot be read ({_first_line(error)}): restore it from a copy"
                    ) from error
                time.sleep(0.02 * 2**attempt)
        raise AssertionError("unreachable")


def digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sha256, in hex, of all numbers in the rows of one task's keys, in whatever order they come."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row["index"]):
        mean, scales = row["mean"], row["scales"]
        digest.update(
            struct.pack(
                "<5q", *(row[name] for name in ("index", "increment", "count")), len(mean), len(scales)
            )
        )
        digest.update(struct.pack(f"<{len(mean) + len(scales) + 1}d", *mean, *scales, row["radius"]))
    return digest.hexdigest()


def keys_problem(record: TaskRecord, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the rows of a task's keys, and how to mend it; None where they are as written."""
    what = _damage(record, rows)
    if what is None:
        return None
    return (
        f"keys of task {record.name!r} are damaged ({what}): restore the catalogue from a copy or forget "
        "the task"
    )


def _damage(record: TaskRecord, rows: Sequence[Mapping[str, Any]]) -> str | None:
    try:
        numbers = sorted(row["index"] for row in rows)
        widths = {len(row["mean"]) for row in rows}
        is_whole = numbers == list(range(record.num_keys)) and len(widths) == 1
        if not is_whole or not all(0 <= row["increment"] < record.num_increments for row in rows):
            return f"{len(rows)} rows for {record.num_keys} keys"
        # No sum with NaN or infinity in it is finite. A radius may be infinite: such a task never abstains.
        is_finite = all(math.isfinite(sum(row["mean"]) + sum(row["scales"])) for row in rows)
        if not (is_finite and all(row["radius"] >= 0 for row in rows)):
            return "they hold NaN or infinity"
        return None if digest_of(rows) == record.keys_sha256 else "they are not what was written"
    except _NO_NUMBERS:
        return "numbers are missing"


def assemble_keys(record: TaskRecord, rows: list[dict[str, Any]], scatter: Tensor) -> TaskKeys:
    """A task's keys from its rows of the table ``keys`` and its (P,) float32 scatter.

    Raises:
        StoreError: rows are missing or altered.
    """
    problem = keys_problem(record, rows)
    if problem is not None:
        raise StoreError(problem)
    rows = sorted(rows, key=lambda row: row["index"])
    return TaskKeys(
        means=torch.tensor([row["mean"] for row in rows], dtype=torch.float64),
        counts=torch.tensor([row["count"] for row in rows], dtype=torch.int64),
        scatter=scatter,
        increments=torch.tensor([row["increment"] for row in rows], dtype=torch.int64),
        scales=torch.tensor(rows[0]["scales"], dtype=torch.float64),
        radius=rows[0]["radius"],
    )


def _record(row: dict[str, Any]) -> TaskRecord:
    metadata = json.loads(row["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("metadata of a task is no JSON object")
    labels, files = tuple(row["labels"]), tuple(FileRecord(**file) for file in row["files"])
    return TaskRecord(**(row | {"labels": labels, "files": files, "metadata": metadata}))


def _among(commit_ids: Sequence[str]) -> str:
    quoted = ", ".join("'" + commit_id.replace("'", "''") + "'" for commit_id in commit_ids)
    return f"commit_id IN ({quoted})" if quoted else "false"


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _SOURCE_PLACE.sub("", line)[:200]


def _sync_new(folder: Path, known: _Files) -> _Files:
    """Wait until all files below a folder but the known ones are on the disk, which LanceDB does not.

    Whoever wrote them: a table builds upon files of processes that may have been killed before they waited.
    No file is written into once it exists, but for a hint at the latest version, a ``.json``.

    Returns:
        What is known now.
    """
    found = {parent: set(names) for parent, _, names in os.walk(folder)}
    for parent, names in found.items():
        new = names - known.get(parent, set())
        hints = {name for name in names if name.endswith(".json")}
        for path in (Path(parent, name) for name in new | hints):
            with suppress(FileNotFoundError), path.open("r+b") as file:  # a temporary file of LanceDB's
                os.fsync(file.fileno())
        if new or parent not in known:
            sync_folder(Path(parent))
    return found
