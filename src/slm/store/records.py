"""What the catalogue says of a task, and what a task's knowledge is before it is stored."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.checked import half_character
from slm.errors import StoreError, TaskError
from slm.increments.increment import Increment
from slm.retrieval.keys import TaskKeys
from slm.store.manifest import utc_now

TASKS_FOLDER = "tasks"
STATISTICS_FILE = "statistics.safetensors"
HEAD_FILE = "head.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a task.

    Attributes:
        path: relative to the task's folder, with forward slashes.
        sha256: of the file's bytes, in hex.
        size_bytes: length of the file.
    """

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One visible task: its row of the catalogue.

    Attributes:
        name: unique in the store.
        sequence: place in the order of learning; only its order means something.
        commit_id: 32 hex digits, unique for ever, also when a name is learned again.
        kind: what sort of task it is, as the tasks room names it.
        labels: the task's labels, empty when it has none.
        created: when it was learned, ISO 8601 in UTC.
        num_examples: examples it was learned from.
        num_keys: keys in the keys table.
        num_increments: increment folders.
        folder: relative to the store, with forward slashes.
        files: every file of the folder.
        metadata: whatever the learner wants to remember, plain JSON values.
        keys_sha256: of the task's rows in the keys table, in hex.
    """

    name: str
    sequence: int
    commit_id: str
    kind: str
    labels: tuple[str, ...]
    created: str
    num_examples: int
    num_keys: int
    num_increments: int
    folder: str
    files: tuple[FileRecord, ...]
    metadata: Mapping[str, object]
    keys_sha256: str = ""

    @property
    def has_head(self) -> bool:
        """Whether the task brings a head of its own."""
        return any(file.path == HEAD_FILE for file in self.files)


@dataclass(frozen=True, slots=True)
class TaskKnowledge:
    """All that is kept of a learned task.

    Attributes:
        keys: keys and what is remembered of the rows behind them (DTKR).
        increments: the low-rank changes the keys point to (JARe), at least one.
        head: name -> tensor of the task's own head; None when it answers through the backbone's.
    """

    keys: TaskKeys
    increments: tuple[Increment, ...]
    head: Mapping[str, Tensor] | None = None


def describe_task(
    name: str,
    kind: str,
    labels: Sequence[str],
    num_examples: int,
    knowledge: TaskKnowledge,
    metadata: Mapping[str, object],
) -> TaskRecord:
    """The record of a task about to be stored, checked; its place and its files are still to come.

    Raises:
        TaskError: the name is not allowed.
        StoreError: something cannot be stored, or not be read back as a usable task.
    """
    check_name(name)
    check_knowledge(knowledge)
    are_texts = not isinstance(labels, str) and all(
        isinstance(text, str) and half_character(text) is None for text in (kind, *labels)
    )
    if not are_texts or type(num_examples) is not int or num_examples < 0:
        raise StoreError(
            f"task {name!r} cannot be stored with kind {kind!r}, {num_examples!r} examples and these labels: "
            "kind is a text, labels are a list of texts without half characters, examples are counted from 0"
        )
    commit_id = uuid.uuid4().hex
    return TaskRecord(
        name=name,
        sequence=0,
        commit_id=commit_id,
        kind=kind,
        labels=tuple(labels),
        created=utc_now(),
        num_examples=num_examples,
        num_keys=knowledge.keys.num_keys,
        num_increments=len(knowledge.increments),
        folder=folder_of(name, commit_id),
        files=(),
        metadata=plain_metadata(name, metadata),
    )


def folder_of(name: str, commit_id: str) -> str:
    """Where a task's files are, relative to the store; the commit id keeps a name learned again apart."""
    return f"{TASKS_FOLDER}/{name}-{commit_id[:8]}"


def check_name(name: str) -> None:
    """Refuse a task name that cannot safely become part of a folder's name.

    Raises:
        TaskError: the name is not allowed.
    """
    if not _NAME.fullmatch(name):
        raise TaskError(
            f"task name {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )


def plain_metadata(name: str, metadata: Mapping[str, object]) -> dict[str, object]:
    """The metadata of task ``name`` as it will be read back.

    Raises:
        StoreError: a value cannot be held by JSON.
    """
    try:
        plain: dict[str, object] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"metadata of task {name!r} cannot be written as JSON ({error}): use plain, finite values"
        ) from error
    return plain


def check_knowledge(knowledge: TaskKnowledge) -> None:
    """Refuse keys, increments or a head that could not be read back as a usable task.

    Raises:
        StoreError: a shape, a dtype or a value is wrong.
    """
    keys, where = knowledge.keys, "knowledge of the task cannot be stored: "
    if not knowledge.increments:
        raise StoreError(where + "it has no increment; give at least one, which may be empty")
    if keys.means.ndim != 2 or keys.num_keys < 1:
        raise StoreError(where + f"means must be (N, C) with N at least 1, got {tuple(keys.means.shape)}")
    num_keys, num_channels = keys.num_keys, keys.num_channels
    packed = num_channels * (num_channels + 1) // 2
    _check_tensor(where + "means", keys.means, (num_keys, num_channels), torch.float64)
    _check_tensor(where + "counts", keys.counts, (num_keys,), torch.int64)
    _check_tensor(where + "increments", keys.increments, (num_keys,), torch.int64)
    if keys.scatter.shape != (0,):  # the cosine form keeps none
        _check_tensor(where + "scatter", keys.scatter, (packed,), torch.float32)
    if bool((keys.counts < 0).any()):
        raise StoreError(where + f"counts must not be negative, got {int(keys.counts.min())}")
    last = len(knowledge.increments) - 1
    if bool(((keys.increments < 0) | (keys.increments > last)).any()):
        raise StoreError(where + f"keys must name increments 0..{last}, got {keys.increments.tolist()}")
    _check_tensor(where + "scales", keys.scales, tuple(keys.scales.shape), torch.float64)
    if not keys.radius >= 0:
        raise StoreError(where + f"radius must be 0 or more, got {keys.radius}")
    for name, tensor in (knowledge.head or {}).items():
        _check_tensor(where + f"head {name!r}", tensor, tuple(tensor.shape), tensor.dtype)


def _check_tensor(what: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise StoreError(f"{what} must be {tuple(shape)} {dtype}, got {found}: convert it first")
    if not bool(torch.isfinite(tensor).all()):
        raise StoreError(f"{what} holds NaN or infinity: learn the task again")
