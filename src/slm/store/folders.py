"""Task folders: made aside and renamed into place, read with their digests checked, removed whole."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, final

import torch
from torch import Tensor

from slm.errors import StoreError
from slm.increments.increment import Increment
from slm.store.records import (
    HEAD_FILE,
    STATISTICS_FILE,
    TASKS_FOLDER,
    FileRecord,
    TaskKnowledge,
    TaskRecord,
    folder_of,
)
from slm.store.values import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    bytes_to_tensors,
    load_increment,
    parse_config,
    sync_folder,
    tensors_to_bytes,
    write_adapter,
    write_bytes,
)

_TEMPORARY = ".tmp-"


@final
class TaskFolders:
    """The ``tasks`` folder of the store at ``root``.

    Attributes:
        root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[tuple[str, str]] = set()  # (commit_id, path) whose digest was right once

    def write(
        self, record: TaskRecord, knowledge: TaskKnowledge, backbone_source: str
    ) -> tuple[FileRecord, ...]:
        """Write ``knowledge`` beside its place, sync it, rename it into place; return its files."""
        temporary = self.root / TASKS_FOLDER / f"{_TEMPORARY}{record.commit_id}"
        try:
            temporary.mkdir()
            write_bytes(temporary / STATISTICS_FILE, tensors_to_bytes({"scatter": knowledge.keys.scatter}))
            for index, increment in enumerate(knowledge.increments):
                write_adapter(temporary / f"increment-{index}", increment, backbone_source)
            if knowledge.head is not None:
                write_bytes(temporary / HEAD_FILE, tensors_to_bytes(knowledge.head))
            sync_folder(temporary)
            files = tuple(file_record(temporary, path) for path in sorted(files_below(temporary)))
            temporary.rename(self._place(record))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self.root / TASKS_FOLDER)
        return files

    def scatter(self, record: TaskRecord) -> Tensor:
        """The packed scatter of a task, (P,) float32.

        Raises:
            StoreError: the file is missing, altered or does not hold one.
        """
        where = f"{record.folder}/{STATISTICS_FILE}"
        scatter = bytes_to_tensors(self.read(record, STATISTICS_FILE), where).get("scatter")
        if scatter is None or scatter.ndim != 1 or scatter.dtype != torch.float32:
            raise StoreError(f"{where} has no (P,) float32 scatter: restore it from a copy")
        return scatter

    def scatters(self, records: Sequence[TaskRecord]) -> Iterator[Tensor]:
        """The packed scatters of some tasks one after the other, each (P,) float32.

        Raises:
            StoreError: one is missing, altered or not as long as those before it.
        """
        size = None
        for record in records:
            scatter = self.scatter(record)
            size = len(scatter) if size is None else size
            if len(scatter) != size:
                raise StoreError(
                    f"statistics of task {record.name!r} have {len(scatter)} entries, "
                    f"those before it {size}: {_remedy(record)}"
                )
            yield scatter

    def increment(self, record: TaskRecord, index: int) -> Increment:
        """Increment ``index`` of a task.

        Raises:
            StoreError: the index is out of range, or a file is missing or altered.
            IncrementError: the files do not hold one increment.
        """
        if not 0 <= index < record.num_increments:
            raise StoreError(
                f"increment index must be in 0..{record.num_increments - 1} (increments of task "
                f"{record.name!r}), got {index}: choose one of them"
            )
        folder = f"increment-{index}"
        where = f"{record.folder}/{folder}"

        def settings() -> tuple[int, float]:  # stores made before 0.2 keep them in this file only
            path = f"{folder}/{ADAPTER_CONFIG}"
            return parse_config(self.read(record, path), f"{where}/{ADAPTER_CONFIG}")

        with self._checked(record, f"{folder}/{ADAPTER_MODEL}") as file:
            return load_increment(file, f"{where}/{ADAPTER_MODEL}", settings)

    def head(self, record: TaskRecord) -> dict[str, Tensor] | None:
        """The head of a task, name -> tensor; None when it has none."""
        if not record.has_head:
            return None
        return bytes_to_tensors(self.read(record, HEAD_FILE), f"{record.folder}/{HEAD_FILE}")

    def read(self, record: TaskRecord, path: str, is_forced: bool = False) -> bytes:
        """The bytes of a task's file; its digest is checked the first time, or when forced.

        Raises:
            StoreError: the file is not listed, lies outside the store, is missing or altered.
        """
        listed = self._listed(record, path)
        name = f"{record.folder}/{path}"
        with _reporting(record, name):
            place = self._place(record, path)
            data = place.read_bytes() if place.stat().st_size == listed.size_bytes else None
        if data is None:
            raise StoreError(f"{name} has been altered (its size is wrong): {_remedy(record)}")
        if is_forced or (record.commit_id, path) not in self._verified:
            self._verify(record, listed, data)
        return data

    @contextlib.contextmanager
    def _checked(self, record: TaskRecord, path: str) -> Iterator[Path]:
        """The place of a task's file, for a reader that maps it; checked as :meth:`read` does.

        The digest is taken over a memory map the first time, so the disk is read once and nothing is
        copied. That the file was not exchanged between the check and the end of the block is checked too.
        """
        listed = self._listed(record, path)
        name = f"{record.folder}/{path}"
        with _reporting(record, name):
            place = self._place(record, path)
            before = _identity(place)
            if before.size_bytes != listed.size_bytes or not before.size_bytes:  # nothing cannot be mapped
                raise StoreError(f"{name} has been altered (its size is wrong): {_remedy(record)}")
            if (record.commit_id, path) not in self._verified:
                with (
                    place.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
                ):
                    self._verify(record, listed, data)
            yield place
            if _identity(place) != before:
                raise StoreError(f"{name} was exchanged while it was read: {_remedy(record)}")

    def _verify(self, record: TaskRecord, listed: FileRecord, data: bytes | mmap.mmap) -> None:
        if hashlib.sha256(data).hexdigest() != listed.sha256:
            name = f"{record.folder}/{listed.path}"
            raise StoreError(f"{name} has been altered (its sha256 is wrong): {_remedy(record)}")
        self._verified.add((record.commit_id, listed.path))

    def _listed(self, record: TaskRecord, path: str) -> FileRecord:
        listed = next((file for file in record.files if file.path == path), None)
        if listed is None:
            raise StoreError(f"task {record.name!r} lists no file {path!r}: its catalogue row is damaged")
        return listed

    def remove(self, record: TaskRecord) -> None:
        """Remove a task's folder with all it holds; nothing happens when it is gone."""
        remove_entry(self._place(record))

    def orphans(self, records: list[TaskRecord]) -> list[Path]:
        """What lies in ``tasks`` and belongs to no visible task."""
        known = {self.root / record.folder for record in records}
        return sorted(entry for entry in (self.root / TASKS_FOLDER).iterdir() if entry not in known)

    def strays(self, record: TaskRecord) -> list[str]:
        """Files in a task's folder that its row does not list, relative to it."""
        return sorted(set(files_below(self._place(record))) - {file.path for file in record.files})

    def _place(self, record: TaskRecord, path: str = "") -> Path:
        """Where a task's folder, or a file of it, really is; refused when the row leads elsewhere."""
        pure = PurePosixPath(record.folder, path)
        is_odd = any(mark in str(pure) for mark in ("\\", ":", "\0")) or ".." in pure.parts
        is_own = record.folder == folder_of(record.name, record.commit_id) and len(pure.parts) >= 2
        is_below = pure.is_relative_to(record.folder)  # an absolute path would replace the folder
        place, root = self.root / pure, self.root.resolve()
        if is_odd or not is_own or not is_below or place.resolve() != root / pure:  # or a link on the way
            raise StoreError(
                f"the catalogue lists {str(pure)!r} for task {record.name!r}, which is not its own place in "
                "the store: restore the catalogue from a copy or forget the task"
            )
        return place


class _Identity(NamedTuple):
    """What changes when a file is exchanged or written to."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int


def _identity(file: Path) -> _Identity:
    found = file.stat()
    return _Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextlib.contextmanager
def _reporting(record: TaskRecord, name: str) -> Iterator[None]:
    """Within the block, what the file system refuses becomes one line about the file ``name``."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{name} is missing: {_remedy(record)}") from error
    except OSError as error:
        raise StoreError(f"{name} cannot be read ({error.strerror}): {_remedy(record)}") from error


def remove_entry(entry: Path) -> None:
    """Remove a folder with all it holds, or a file, or a link but not what it points to."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
    sync_folder(entry.parent)


def file_record(folder: Path, path: str) -> FileRecord:
    """Digest and size of one file of a task's folder."""
    data = (folder / path).read_bytes()
    return FileRecord(path, hashlib.sha256(data).hexdigest(), len(data))


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, relative to it, with forward slashes."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()]


def _remedy(record: TaskRecord) -> str:
    return f"restore it from a copy or forget the task {record.name!r}"
