"""Knowledge leaving a store: tasks in fixed proportions, as a PEFT adapter or a merged checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.merge import Merge, merge, save_merged
from slm.errors import ConfigError, StoreError, TaskError
from slm.increments.increment import Increment, concatenate
from slm.retrieval.retriever import Retrieved
from slm.store import Store, TaskRecord
from slm.store.values import tensors_to_bytes, write_adapter, write_bytes

NOTES = "slm.json"
"""The file beside an export that names its tasks, weights, labels and heads."""

_NUM_SHOWN = 8
_TASK_TYPES = {
    BackboneKind.ENCODER: "FEATURE_EXTRACTION",
    BackboneKind.CAUSAL: "CAUSAL_LM",
    BackboneKind.SEQUENCE_TO_SEQUENCE: "SEQ_2_SEQ_LM",
}

Tasks = str | Sequence[str] | Mapping[str, float]
"""One task, several in equal parts, or each with its weight."""


@dataclass(frozen=True, slots=True)
class FixedMixture:
    """Tasks in fixed proportions: what retrieval decides, decided beforehand.

    Attributes:
        records: the tasks.
        weights: one per task, above 0, of sum 1.
        increment: Σ_k w_k · s_k · B_k A_k as one increment.
    """

    records: tuple[TaskRecord, ...]
    weights: tuple[float, ...]
    increment: Increment

    def retrieved(self, num_rows: int) -> Retrieved:
        """The same decision for every row, as if each task had one key and it had been certain."""
        size = len(self.records)
        weights = torch.tensor(self.weights, dtype=torch.float32).repeat(num_rows, 1)
        order = weights.argsort(dim=1, descending=True, stable=True)
        weights = weights.gather(1, order)
        return Retrieved(
            tasks=order,
            increments=torch.zeros_like(order),
            weights=weights,
            candidates=order,
            posterior=weights,
            distances=torch.zeros(num_rows, size),
            thresholds=torch.full((num_rows,), math.inf),
            margins=torch.full((num_rows,), math.inf),
            owners=torch.arange(size),
            is_contested=torch.zeros(num_rows, dtype=torch.bool),
            is_abstained=torch.zeros(num_rows, dtype=torch.bool),
        )


@dataclass(frozen=True, slots=True)
class MergedTasks:
    """A mixture that is in the weights of a backbone at present."""

    mixture: FixedMixture
    merge: Merge


def find_task(store: Store, name: str, known: Sequence[TaskRecord] | None) -> TaskRecord:
    """The task called ``name``, of all in a store or of those alone that a model knows.

    Raises:
        TaskError: there is none.
    """
    if known is None:
        return store.task(name)
    for record in known:
        if record.name == name:
            return record
    shown = ", ".join(record.name for record in known[:_NUM_SHOWN]) or "none"
    raise TaskError(
        f"no task {name!r} among the {len(known)} that this model is restricted to ({shown}"
        f"{', ...' if len(known) > _NUM_SHOWN else ''}): name one of them or take the whole model"
    )


def fix_mixture(store: Store, tasks: Tasks, known: Sequence[TaskRecord] | None = None) -> FixedMixture:
    """Read the tasks and put their increments together.

    Args:
        store: where the tasks are.
        tasks: one, several, or each with its weight.
        known: those that may be named; all in the store where they are not given.

    Raises:
        TaskError: a task is unknown, given twice, or has several increments, among which rows choose.
        ConfigError: the weights are not above 0 with the sum 1.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names or len(set(names)) != len(names):
        raise TaskError(
            f"tasks to put together must be at least one and each once, got {names}: correct them"
        )
    weights = list(tasks.values()) if isinstance(tasks, Mapping) else [1 / len(names)] * len(names)
    are_numbers = all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in weights)
    if (
        not are_numbers
        or not all(0 < w <= 1 for w in weights)
        or not math.isclose(sum(weights), 1, abs_tol=1e-6)
    ):
        shown = ", ".join(f"{n}={w!r}" for n, w in zip(names, weights, strict=True))
        raise ConfigError(f"weights must be above 0 with the sum 1, got {shown}: correct them")
    records = [find_task(store, name, known) for name in names]
    for record in records:
        if record.num_increments != 1:
            raise TaskError(
                f"task {record.name!r} has {record.num_increments} increments, among which each row chooses: "
                "only tasks of one increment can be merged or exported"
            )
    increments = [store.increment(record, 0) for record in records]
    return FixedMixture(tuple(records), tuple(weights), concatenate(increments, weights))


def merge_tasks(
    backbone: Backbone, store: Store, tasks: Tasks, known: Sequence[TaskRecord] | None = None
) -> MergedTasks:
    """Bake tasks into a backbone; hold its lock.

    Args:
        backbone: frozen.
        store: where the tasks are.
        tasks: one, several, or each with its weight.
        known: those that may be named; all in the store where they are not given.

    Raises:
        TaskError: a task is unknown or cannot be merged.
        ConfigError: the weights are not above 0 with the sum 1.
        BackboneError: something is merged already, or a layer cannot be merged into.
    """
    mixture = fix_mixture(store, tasks, known)
    return MergedTasks(mixture, merge(backbone, mixture.increment))


def export_tasks(
    backbone: Backbone,
    store: Store,
    tasks: Tasks,
    folder: str | Path,
    is_merged: bool,
    known: Sequence[TaskRecord] | None = None,
) -> list[str]:
    """Write tasks into a new or empty folder, whole or not at all; hold the backbone's lock.

    Args:
        backbone: frozen, and again so afterwards.
        store: where the tasks are.
        tasks: one, several, or each with its weight.
        folder: where to write; links are followed.
        is_merged: a whole transformers checkpoint instead of a PEFT adapter.
        known: those that may be named; all in the store where they are not given.

    Returns:
        The files written, by name.

    Raises:
        TaskError: a task is unknown or cannot be exported.
        ConfigError: the weights are not above 0 with the sum 1.
        StoreError: the folder is not empty or cannot be written.
        BackboneError: a layer cannot be merged into.
    """
    mixture = fix_mixture(store, tasks, known)
    folder = Path(os.path.realpath(folder))
    with _appearing(folder) as aside:
        if is_merged:
            aside.mkdir()
            save_merged(backbone, mixture.increment, aside)
        else:
            write_adapter(aside, mixture.increment, backbone.source, _TASK_TYPES.get(backbone.kind))
        _write_notes(backbone, store, mixture, aside, is_merged)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_notes(
    backbone: Backbone, store: Store, mixture: FixedMixture, folder: Path, is_merged: bool
) -> None:
    """Write what the weights alone do not say: tasks, labels, and an encoder's heads."""
    tasks = []
    for number, (record, weight) in enumerate(zip(mixture.records, mixture.weights, strict=True)):
        head = store.head(record)
        file = "head.safetensors" if len(mixture.records) == 1 else f"head-{number}.safetensors"
        if head is not None:
            write_bytes(folder / file, tensors_to_bytes(head))
        tasks.append(
            {
                "name": record.name,
                "weight": weight,
                "kind": record.kind,
                "labels": list(record.labels),
                "head": None if head is None else file,
            }
        )
    notes = {
        "backbone": backbone.source,
        "backbone_fingerprint": backbone.fingerprint,
        "is_merged": is_merged,
        "prompt_format": backbone.renderer.prompt_format,
        "tasks": tasks,
    }
    write_bytes(folder / NOTES, (json.dumps(notes, indent=2) + "\n").encode())


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Within the block a place aside; after it the folder is there whole, or as it was."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} exists and is not empty: choose a new folder")
        is_fixed = folder.is_dir() and (folder.is_mount() or not os.access(folder.parent, os.W_OK))
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder if is_fixed else folder.parent))
        try:
            yield scratch / "export"
            _put(scratch / "export", folder, is_fixed)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StoreError(f"nothing can be written at {folder} ({reason}): choose another folder") from error


def _put(made: Path, folder: Path, is_fixed: bool) -> None:
    """Make what was made the folder, or move it into a folder that cannot be replaced."""
    if not is_fixed:
        try:
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:  # of a mount point that does not look like one
                raise
    moved: list[Path] = []
    try:
        for path in sorted(made.iterdir()):
            target = folder / path.name
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            moved.append(target)
            shutil.move(path, target)
    except BaseException:
        for target in moved:
            if target.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
        raise
