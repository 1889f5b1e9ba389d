"""Taking an adapter trained elsewhere: prepare and commit, without the fine-tuning (method section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.targets import LINEAR, find_stacks
from slm.errors import ConfigError, DataError, IncrementError
from slm.exchange import NOTES
from slm.learning.learner import check_learnable, prepare
from slm.model import ScalableLM
from slm.retrieval.features import first_bent_block
from slm.store import TaskKnowledge
from slm.store.adapters import PeftAdapter, read_peft_adapter
from slm.store.foreign import open_foreign, read_floats
from slm.store.peft_settings import read_json_object
from slm.store.records import HEAD_FILE
from slm.tasks import Task
from slm.tasks.rows import check_labels

# What transformers' classifiers put around a backbone: nothing of it is in the last hidden states.
_CLASSIFIER = ("classifier", "pre_classifier", "score", "head", "pooler")


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was taken from an adapter.

    Attributes:
        task: its name in the store.
        kind: classification or generation.
        num_examples: examples its keys were computed from.
        rank: of its increment; the largest where layers differed.
        num_layers: linear layers it changes.
        size_bytes: bytes the task takes in the store.
        left_out: modules of a transformers classifier that it changes too, which slm has no use for.
    """

    task: str
    kind: str
    num_examples: int
    rank: int
    num_layers: int
    size_bytes: int
    left_out: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


def import_adapter(
    model: ScalableLM,
    folder: Path,
    task: Task,
    *,
    labels: Sequence[str] = (),
    is_truncating: bool = False,
) -> ImportReport:
    """Make the knowledge of a task out of an adapter; nothing is visible in the store before the last step.

    Args:
        model: the model that takes it.
        folder: a PEFT adapter, LoRA or AdaLoRA; for an encoder with a head, as ``docs/adapters.md`` says.
        task: its name, and examples its keys are computed from.
        labels: of an encoder's head, one per row of its weight; needed where the folder does not say them.
        is_truncating: cut the middle out of over-long examples instead of refusing them.

    Raises:
        TaskError: the name is taken, or the backbone cannot answer this kind of task.
        StoreError: a file of the adapter cannot be read.
        IncrementError: it is no LoRA adapter, does not fit, or its head cannot be used.
        DataError: an example cannot be used, or has a label the head does not know.
        ConfigError: labels were given for a causal backbone.
    """
    check_learnable(model, task)
    backbone = model.backbone
    shapes = {name: layer.shape for name, layer in backbone.reparameterizer.layers.items()}
    prefix = backbone.model.base_model_prefix
    is_encoder = backbone.kind is BackboneKind.ENCODER
    unused = (*_CLASSIFIER, f"{prefix}.pooler") if is_encoder else ()
    adapter = read_peft_adapter(folder, shapes, prefix, _shared_layers(backbone), unused)
    head: dict[str, Tensor] | None = None
    if is_encoder:
        labels, head = _read_head(folder, adapter, task, labels, backbone.num_channels)
    else:
        _refuse_labels(labels)
        labels = task.labels
    config = dataclasses.replace(model.config.learning, is_truncating=is_truncating)
    keys = prepare(model, task, config).keys
    # Learned keys own an increment each; an adapter is one, so all of them own that.
    keys = dataclasses.replace(keys, increments=torch.zeros_like(keys.increments))
    first = first_bent_block(model.config.retrieval, backbone.num_layers)
    reached = backbone.bendable(first)
    metadata = {
        "imported_from": str(adapter.settings.get("base_model_name_or_path") or ""),
        "needs_two_passes": not reached.issuperset(adapter.increment.pairs),
    }
    knowledge = TaskKnowledge(keys, (adapter.increment,), head)
    record = model.store.commit(task.name, task.kind.value, labels, len(task.examples), knowledge, metadata)
    return ImportReport(
        task=task.name,
        kind=task.kind.value,
        num_examples=len(task.examples),
        rank=adapter.increment.rank,
        num_layers=len(adapter.increment.pairs),
        size_bytes=model.store.size_bytes(record),
        left_out=adapter.left_out,
    )


def _shared_layers(backbone: Backbone) -> set[str]:
    """Linear layers of blocks that the backbone leaves as they are: not each row has an input of its own."""
    layers = backbone.reparameterizer.layers
    wrapped = {layer.base for layer in layers.values()}
    return {
        f"{name}.{path}"
        for name, stack in find_stacks(backbone.model)
        for path, module in stack.named_modules()
        if isinstance(module, LINEAR) and module not in wrapped
    }


def _refuse_labels(labels: Sequence[str]) -> None:
    if labels:
        raise ConfigError(
            f"labels are those of an encoder's head, got {_listed(labels)} for a causal backbone, which "
            "reads them off the examples: leave them out"
        )


def _read_head(
    folder: Path, adapter: PeftAdapter, task: Task, labels: Sequence[str], num_channels: int
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Labels and head of an encoder's adapter, from the files beside it."""
    file = folder / HEAD_FILE
    if file.is_symlink() or not file.is_file():
        own = f" (its own {_listed(adapter.left_out)} reads something else)" if adapter.left_out else ""
        raise IncrementError(
            f"{folder} has no {HEAD_FILE}, without which an encoder cannot name a label{own}: "
            "give weight (Y, C) and bias (Y,) of a head that reads mean hidden states"
        )
    found = tuple(labels) or _noted_labels(folder / NOTES)
    check_labels(found, f"labels of the head of {folder}")
    shapes = {"weight": [len(found), num_channels], "bias": [len(found)]}
    with open_foreign(file) as opened:
        sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        if sizes != shapes:
            raise IncrementError(
                f"{file} holds {sizes}, a head for the labels {_listed(found) or '(none given)'} "
                f"holds {shapes}: give its labels in the order of its rows (--labels)"
            )
        head = {name: part.float() for name, part in read_floats(opened, shapes, str(file)).items()}
    unknown = sorted(set(task.labels) - set(found))
    if unknown or len(set(found)) != len(found):
        raise DataError(
            f"the head of {folder} names {_listed(found)}, the examples have {_listed(task.labels)}: "
            "each label must be one of the head's, and each of those there once"
        )
    return found, head


def _listed(labels: Sequence[str]) -> str:
    """Labels for a message, without any signs that a terminal would obey."""
    return ", ".join(map(repr, labels))


def _noted_labels(file: Path) -> tuple[str, ...]:
    """The labels that an export of slm names beside its adapter; none where there is no such note."""
    if file.is_symlink() or not file.is_file():
        return ()
    tasks = read_json_object(file).get("tasks")
    first = tasks[0] if isinstance(tasks, list) and len(tasks) == 1 else None
    labels = first.get("labels") if isinstance(first, dict) else None
    is_usable = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    return tuple(labels) if is_usable and labels else ()
