"""Store: the knowledge of learned tasks on disk, which cannot lose or half-write a task.

    store.json           which backbone, which settings, which format; written once
    background.safetensors  statistics of texts that belong to no task; written once
    catalogue/           LanceDB tables `tasks` (one row per visible task) and `keys`
    tasks/<name>-<id>/   statistics, one PEFT adapter folder per increment, the head
    pooled/              a cache of the sum of all tasks' scatters
    writer.lock          held while writing; readers never wait

Learning a task writes its files and key rows first and makes it visible with one append to `tasks`;
forgetting deletes that row first. A writer killed at any moment leaves each task whole or invisible,
and nobody rewrites another task's files.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import final

import torch
from torch import Tensor

from slm.errors import StoreError, TaskError
from slm.increments.increment import Increment
from slm.retrieval.background import Background
from slm.retrieval.keys import TaskKeys
from slm.store.background import background_problems, read_background, write_background
from slm.store.folders import TaskFolders
from slm.store.lock import uninterrupted, writing
from slm.store.manifest import (
    Manifest,
    manifest_bytes,
    read_manifest,
    read_version,
    refuse_begun,
    write_manifest,
)
from slm.store.migrations import FORMAT_VERSION, pending_steps
from slm.store.records import TASKS_FOLDER, FileRecord, TaskKnowledge, TaskRecord, describe_task
from slm.store.sums import Snapshots, sum_exactly
from slm.store.tables import Tables, assemble_keys
from slm.store.upkeep import find_problems, remove_orphans

__all__ = ["FileRecord", "Manifest", "Store", "TaskKnowledge", "TaskRecord"]

_COMMITS_PER_COMPACTION = 32


@final
class Store:
    """A store folder, open. Reads always see the newest commit, whichever process made it.

    Attributes:
        path: the store's folder.
        manifest: the backbone and settings all its tasks share.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._tables = Tables(path / "catalogue")
        self._folders = TaskFolders(path)
        self._snapshots = Snapshots(path / "pooled")

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest, background: Background | None = None) -> Store:
        """Make an empty store in a new or empty folder.

        Args:
            path: the folder.
            manifest: what all its tasks will share.
            background: what it shall know of texts that belong to no task.

        Raises:
            StoreError: the folder is not empty or cannot be written, or the config is not plain JSON.
        """
        path = cls.check_place(path)
        manifest_bytes(path, manifest, FORMAT_VERSION)  # refuse what it cannot hold before a folder is made
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / TASKS_FOLDER).mkdir()
            (path / "pooled").mkdir()
            Tables.create(path / "catalogue")
            if background is not None:
                manifest = replace(manifest, background_sha256=write_background(path, background))
            write_manifest(path, manifest, FORMAT_VERSION)  # last: from here on it is a store
        except OSError as error:
            raise _no_place(path, error) from error
        return cls(path, manifest)

    @staticmethod
    def check_place(path: str | Path) -> Path:
        """The absolute path of a new or empty folder; nothing is written.

        Raises:
            StoreError: it holds something, is no folder or cannot be read.
        """
        path = Path(path).absolute()
        try:
            if path.exists() and any(path.iterdir()):
                refuse_begun(path)
                raise StoreError(f"{path} is not empty: open it if it is a store, or choose another folder")
        except OSError as error:
            raise _no_place(path, error) from error
        return path

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store; a folder without write permission will do for reading.

        Raises:
            StoreError: no such folder, no store, a newer format, or a damaged one.
        """
        path = Path(path).absolute()
        if pending_steps(read_version(path), path):
            with writing(path):
                for step in pending_steps(read_version(path), path):
                    step(path)
        return cls(path, read_manifest(path))

    @cached_property
    def background(self) -> Background | None:
        """What the store knows of texts that belong to no task; None where it keeps nothing.

        Raises:
            StoreError: the file is missing or altered.
        """
        return read_background(self.path, self.manifest)

    @property
    def version(self) -> int:
        """A number that grows with every commit and every forgetting, in any process."""
        return self._tables.version

    def tasks(self) -> list[TaskRecord]:
        """Every visible task in learning order.

        Raises:
            StoreError: the catalogue is damaged.
        """
        return self._tables.tasks()

    def task(self, name: str) -> TaskRecord:
        """The visible task called ``name``.

        Raises:
            TaskError: there is none.
        """
        return self.named([name])[0]

    def named(self, names: Sequence[str]) -> list[TaskRecord]:
        """The visible tasks of these names, in that order, from one reading of the catalogue.

        Raises:
            TaskError: there is none of a name.
            StoreError: the catalogue is damaged.
        """
        records = {record.name: record for record in self.tasks()}
        missing = [name for name in names if name not in records]
        if not missing:
            return [records[name] for name in names]
        name = missing[0]
        nearest = difflib.get_close_matches(name, records, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"slm tasks {self.path} lists them"
        raise TaskError(f"no task {name!r} among the {len(records)} tasks of {self.path}: {hint}")

    def check_writable(self, num_bytes: int) -> None:
        """Refuse to begin work whose result could not be committed; nothing is changed.

        Args:
            num_bytes: that the result takes.

        Raises:
            StoreError: the store cannot be written, another writer holds it, or the disk is too full.
        """
        with writing(self.path), TemporaryFile(dir=self.path / TASKS_FOLDER):
            num_free = shutil.disk_usage(self.path).free
        if num_free < num_bytes:
            raise StoreError(
                f"{self.path} has {num_free / 1e6:.1f} MB of disk left, at least {num_bytes / 1e6:.1f} MB "
                "are needed: make room"
            )

    def commit(
        self,
        name: str,
        kind: str,
        labels: Sequence[str],
        num_examples: int,
        knowledge: TaskKnowledge,
        metadata: Mapping[str, object] | None = None,
    ) -> TaskRecord:
        """Store a learned task, whole or not at all, and make it visible to every reader.

        An interrupt from the keyboard is put off until the task is stored.

        Raises:
            TaskError: the name is not allowed or taken, here or by a process that was faster.
            StoreError: the knowledge cannot be stored, or the store cannot be written.
        """
        record = describe_task(name, kind, labels, num_examples, knowledge, metadata or {})
        with writing(self.path):
            earlier = self.tasks()
            self._refuse_misfit(earlier, record, knowledge.keys)
            sequence = max((r.sequence for r in earlier), default=0) + 1
            with uninterrupted():
                files = self._folders.write(record, knowledge, self.manifest.backbone_source)
                record = self._publish(replace(record, sequence=sequence, files=files), knowledge.keys)
                self._tidy(earlier, record, knowledge.keys.scatter)
        return record

    def forget(self, name: str) -> TaskRecord:
        """Make a task invisible, then erase its keys and files; what is left is as if never learned.

        Raises:
            TaskError: there is no such task.
            StoreError: the store cannot be written.
        """
        with writing(self.path):
            record = self.task(name)
            before = [r.commit_id for r in self.tasks()]
            change: Tensor | None = None
            with suppress(StoreError):  # a damaged task can be forgotten; then the sum is added up anew
                change = -self._folders.scatter(record).double()
            with uninterrupted():
                self._erase(record, before, change)
        return record

    def keys(self, record: TaskRecord) -> TaskKeys:
        """Keys and statistics of one task.

        Raises:
            StoreError: the keys or the statistics are missing or damaged.
        """
        return self.all_keys([record])[0]

    def all_keys(self, records: Sequence[TaskRecord], has_scatter: bool = True) -> list[TaskKeys]:
        """Keys of many tasks by one query, in the order asked for.

        Args:
            records: which tasks.
            has_scatter: read the scatters too, one file per task; without, each is empty, (0,), and
                :meth:`scatter_sum` gives the only sum most readers need.

        Raises:
            StoreError: the keys or the statistics of a task are missing or damaged.
        """
        rows = self._tables.key_rows([record.commit_id for record in records])
        nothing = torch.zeros(0, dtype=torch.float32)
        return [
            assemble_keys(r, rows.get(r.commit_id, []), self._folders.scatter(r) if has_scatter else nothing)
            for r in records
        ]

    def scatter(self, record: TaskRecord) -> Tensor:
        """The packed scatter of one task, (P,) float32.

        Raises:
            StoreError: the file is missing, altered or does not hold one.
        """
        return self._folders.scatter(record)

    def increment(self, record: TaskRecord, index: int) -> Increment:
        """One of a task's increments.

        Raises:
            StoreError: there is no such increment, or a file is missing or altered.
            IncrementError: the files do not hold one increment.
        """
        return self._folders.increment(record, index)

    def head(self, record: TaskRecord) -> dict[str, Tensor] | None:
        """The task's own head, name -> tensor; None when it has none.

        Raises:
            StoreError: the file is missing or altered.
        """
        return self._folders.head(record)

    def size_bytes(self, record: TaskRecord) -> int:
        """Bytes of a task's files."""
        return sum(file.size_bytes for file in record.files)

    def scatter_sum(self, records: Sequence[TaskRecord]) -> Tensor:
        """The sum of these tasks' packed scatters, (P,) float64: exact, rounded once at the end.

        Hence the same bits in any order of tasks, and whether or not other tasks came and went.
        (0,) without tasks.

        Raises:
            StoreError: the statistics of a task are missing, damaged or of another size.
        """
        commit_ids = [record.commit_id for record in records]
        snapshot = self._snapshots.read(commit_ids)
        if snapshot is not None:
            return snapshot[0]
        high, low, is_exact = sum_exactly(lambda: self._folders.scatters(records))
        if is_exact and records and set(commit_ids) == {record.commit_id for record in self.tasks()}:
            self._snapshots.write(commit_ids, high, low)
            # Written without the lock: a task forgotten meanwhile must not stay in a sum.
            if set(commit_ids) != {record.commit_id for record in self.tasks()}:
                self._snapshots.remove(commit_ids)
        return high

    def check(self) -> list[str]:
        """One line for every missing, altered or left-over file and key; empty when all is well."""
        with ExitStack() as stack:
            with suppress(StoreError):  # a store that cannot be locked, being read-only, has no writer
                stack.enter_context(writing(self.path))  # whose commit would look like one cut short
            return [
                *background_problems(self.path, self.manifest),
                *find_problems(self._tables, self._folders, self._snapshots),
            ]

    def repair(self) -> list[str]:
        """Remove what writes cut short left behind, never a visible task; a line for each removal.

        Deleted rows that a forgetting cut short left on the disk are erased too, without a line.
        """
        with writing(self.path):
            return remove_orphans(self._tables, self._folders, self._snapshots)

    def _refuse_misfit(self, earlier: list[TaskRecord], record: TaskRecord, keys: TaskKeys) -> None:
        if any(r.name == record.name for r in earlier):
            raise _taken(record.name, self.path)
        if not earlier:
            return
        num_channels = self.all_keys(earlier[-1:], has_scatter=False)[0].num_channels
        if keys.num_channels != num_channels:
            raise StoreError(
                f"keys must have {num_channels} channels like those in {self.path}, got {keys.num_channels}: "
                "use the extractor the store was made with"
            )

    def _publish(self, record: TaskRecord, keys: TaskKeys) -> TaskRecord:
        """Write the key rows, then the row that makes the task visible; gives that row."""
        try:
            digest = self._tables.add_keys(record.commit_id, record.name, keys)
        except StoreError:
            self._folders.remove(record)
            raise
        # An error from here on may come after the row was written, so the files stay: `repair` tells.
        record = replace(record, keys_sha256=digest)
        if not self._tables.insert(record):
            self._tables.delete_keys([record.commit_id])
            self._folders.remove(record)
            raise _taken(record.name, self.path)
        return record

    def _erase(self, record: TaskRecord, before: list[str], change: Tensor | None) -> None:
        """Make a task invisible, then take away its part of the sum, its keys and its files."""
        self._tables.delete_task(record)
        after = [commit_id for commit_id in before if commit_id != record.commit_id]
        if change is None:
            self._snapshots.keep_only(after)
        else:
            self._snapshots.derive(before, after, change)
        self._tables.delete_keys([record.commit_id])
        with suppress(StoreError):  # a row that leads out of the store has no folder to remove
            self._folders.remove(record)
        self._tables.erase_deleted()

    def _tidy(self, earlier: list[TaskRecord], record: TaskRecord, scatter: Tensor) -> None:
        """Bring the snapshot and the tables' layout up to date; the task is safe already."""
        before = [r.commit_id for r in earlier]
        self._snapshots.derive(before, [*before, record.commit_id], scatter.detach().cpu().double())
        if record.sequence % _COMMITS_PER_COMPACTION == 0:
            with suppress(StoreError):  # only slower
                self._tables.compact()


def _no_place(path: Path, error: OSError) -> StoreError:
    return StoreError(f"no store can be made at {path} ({error.strerror}): choose another folder")


def _taken(name: str, path: Path) -> TaskError:
    return TaskError(f"task {name!r} is already in {path}: forget it first or choose another name")
