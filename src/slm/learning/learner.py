"""Learning one task: prepare, fine-tune, commit (method section 4)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate import PartialState
from jaxtyping import Float, Int
from torch import Tensor

from slm.backbone.backbone import BackboneKind
from slm.config import LearningConfig, RetrievalConfig
from slm.errors import ConfigError, DataError, TaskError
from slm.fitting import check_start
from slm.learning.learnable import Learnable
from slm.learning.trainer import TrainingRow, fit, validation_score
from slm.learning.transfer import Start, begin_from, choose_start
from slm.model import ScalableLM
from slm.retrieval.cosine import KeyHistory, learn_cosine_keys
from slm.retrieval.keys import TaskKeys, cluster, join_single, learn_keys, most_keys
from slm.retrieval.retriever import Retriever
from slm.store import TaskKnowledge
from slm.tasks import Example, Task, TaskKind
from slm.tasks.sampling import fold


@dataclass(frozen=True, slots=True)
class LearningReport:
    """What learning a task took and gave.

    Attributes:
        task: its name.
        kind: classification or generation.
        num_examples: examples it was taught.
        num_validation: of these, kept for early stopping.
        num_epochs: epochs run.
        time_s: seconds from the first token to the commit.
        validation_score: on the validation split; None where there was none.
        validation_metric: ``accuracy`` (encoder) or ``token accuracy`` (others).
        size_bytes: bytes the task takes in the store.
        key_history: how the loss of its keys fell; None for keys in closed form.
        started_from: weights of the earlier tasks it started from, by name; empty where it was learned alone.
    """

    task: str
    kind: str
    num_examples: int
    num_validation: int
    num_epochs: float
    time_s: float
    validation_score: float | None
    validation_metric: str
    size_bytes: int
    key_history: KeyHistory | None = None
    started_from: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the preparation stage gives (method section 4, step 1).

    Attributes:
        queries: (B, C) float32, one per training row.
        keys: the task's keys, frozen from here on.
        weights: (B, U) float32, how much of each of the task's U increments every training row is given.
        history: how the loss of the keys fell; None for keys in closed form.
    """

    queries: Tensor
    keys: TaskKeys
    weights: Tensor
    history: KeyHistory | None


def learn_task(
    model: ScalableLM, task: Task, *, on_step: Callable[[int, int], None] | None = None, **settings: Any
) -> LearningReport:
    """Teach a model one task; nothing is visible in the store before the last step, and then all of it.

    Args:
        model: the model; only its backbone and settings are used, and with ``start: retrieved`` its
            increments and keys, never another task's data.
        task: examples with answers.
        on_step: is told the optimizer steps done and of how many, after every step.
        **settings: fields of :class:`LearningConfig` that differ from the store's defaults.

    Raises:
        TaskError: the name is taken, or the backbone cannot learn this kind of task.
        DataError: a row is empty or too long; the message gives its number.
        LearningError: the loss is not finite.
        ConfigError: a setting is unknown or out of range, or checkpoints cannot be kept where they shall be.
        StoreError: the store cannot be written, or has no room for the task.
    """
    begun = time.perf_counter()
    config = LearningConfig.from_mapping({**model.config.learning.as_dict(), **settings})
    config = dataclasses.replace(config, batch_size=config.rows_per_step(len(task.examples)))
    check_learnable(model, task)
    if config.start == "retrieved":
        check_start(model.backbone)
    model.store.check_writable(_smallest_size(model))
    _check_checkpoints(config.checkpoint_folder)
    rows = training_rows(model, task, task.examples, config)
    prepared = prepare(model, task, config)
    train, validation, queries = _split(task, rows, prepared, config)
    learnable = Learnable(
        model.backbone,
        model.targets,
        model.config.increments,
        config,
        len(task.labels),
        prepared.weights.shape[1],
    )
    start = _begin(model, task, learnable, queries, train) if config.start == "retrieved" else None
    started = start.as_metadata() if start else {}
    apart = _with_own_checkpoints(model, task, config, started)
    result = fit(learnable, model.backbone, train, validation, apart, f"learning {task.name}", on_step)
    score = validation_score(learnable, model.backbone, validation)
    # Nothing here may vary from run to run: the same seed gives the same bytes.
    metadata = {
        "learning": _knowledge_settings(config),
        "validation_score": score,
        "num_epochs": result.num_epochs,
        **started,
        **({"key_history": dataclasses.asdict(prepared.history)} if prepared.history else {}),
    }
    _commit(model, task, prepared.keys, learnable, metadata)
    _remove_checkpoints(apart)
    is_encoder = model.backbone.kind is BackboneKind.ENCODER
    return LearningReport(
        task=task.name,
        kind=task.kind.value,
        num_examples=len(rows),
        num_validation=len(validation),
        num_epochs=result.num_epochs,
        time_s=time.perf_counter() - begun,
        validation_score=score,
        validation_metric="accuracy" if is_encoder else "token accuracy",
        size_bytes=model.store.size_bytes(model.store.task(task.name)),
        key_history=prepared.history,
        started_from=start.sources if start else {},
    )


def _split(
    task: Task, rows: Sequence[TrainingRow], prepared: Prepared, config: LearningConfig
) -> tuple[list[TrainingRow], list[TrainingRow], Float[Tensor, "B C"]]:
    """Rows that are learned from, rows that stop it early, and the queries, (B, C), of the former."""
    held = {id(example) for example in task.split(config.validation_share, config.seed)[1]}
    train: list[TrainingRow] = []
    validation: list[TrainingRow] = []
    learned_from = []
    for i, (row, example) in enumerate(zip(rows, task.examples, strict=True)):
        weighted = dataclasses.replace(row, weights=tuple(prepared.weights[i].tolist()))
        if id(example) in held:
            validation.append(weighted)
        else:
            train.append(weighted)
            learned_from.append(i)
    return train, validation, prepared.queries[learned_from]


def _begin(
    model: ScalableLM,
    task: Task,
    learnable: Learnable,
    queries: Float[Tensor, "B C"],
    rows: Sequence[TrainingRow],
) -> Start:
    """Start new increments from earlier ones where the task's own rows say that this helps."""
    start = choose_start(model, queries, rows, len(task.labels))
    if start.increment is not None and start.probe is not None:
        begin_from(learnable, start.increment, start.probe)
    return start


def _commit(
    model: ScalableLM, task: Task, keys: TaskKeys, learnable: Learnable, metadata: Mapping[str, Any]
) -> None:
    """Make all of a task visible in one step, by one of the processes that learned it (step 3)."""
    processes = PartialState()
    if processes.is_main_process:
        increments = tuple(increment.in_float16() for increment in learnable.increments())
        knowledge = TaskKnowledge(keys, increments, learnable.head_tensors())
        model.store.commit(task.name, task.kind.value, task.labels, len(task.examples), knowledge, metadata)
    processes.wait_for_everyone()


def _remove_checkpoints(config: LearningConfig) -> None:
    """What is committed is not to be resumed: learned again, it would go on beyond its early stop."""
    if config.checkpoint_folder is not None and PartialState().is_main_process:
        shutil.rmtree(config.checkpoint_folder, ignore_errors=True)


def prepare(model: ScalableLM, task: Task, config: LearningConfig) -> Prepared:
    """Keys of a task, from the frozen extractor alone, and its rows' weights (method section 4, step 1)."""
    queries = model.queries([_prompt(e) for e in task.examples], is_truncating=config.is_truncating)
    retrieval = model.config.retrieval
    if retrieval.form == "gaussian":
        assigned = _assign(queries, task, retrieval.keys_per_task, config.seed)
        distinct = _distinct(task, assigned)
        keys = learn_keys(queries[distinct], assigned[distinct])
        return Prepared(queries, keys, torch.ones(len(queries), 1), None)
    keys, history = learn_cosine_keys(queries, retrieval.cosine, retrieval.top_k, config.seed)
    return Prepared(queries, keys, own_weights(queries, keys, retrieval), history)


def own_weights(queries: Tensor, keys: TaskKeys, config: RetrievalConfig) -> Tensor:
    """(B, U) float32: each row retrieves among the keys of its own task, never abstaining (step 2)."""
    retriever = Retriever((keys,), keys.scatter.double(), dataclasses.replace(config, is_abstaining=False))
    retrieved = retriever(queries)
    weights = torch.zeros(len(queries), int(keys.increments.max()) + 1)
    return weights.scatter_add(1, retrieved.increments, retrieved.weights)


def training_rows(
    model: ScalableLM, task: Task, examples: Sequence[Example], config: LearningConfig
) -> list[TrainingRow]:
    """Tokenize examples with their answers.

    Raises:
        DataError: a row is empty or too long.
    """
    number = {label: i for i, label in enumerate(task.labels)}
    is_encoder = model.backbone.kind is BackboneKind.ENCODER
    rows = []
    for i, example in enumerate(examples, start=1):
        where = f"example {i} of task {task.name!r}" + (f" ({example.place})" if example.place else "")
        if example.target is None:
            raise DataError(f"{where} has no answer: give one or leave it out")
        row = model.backbone.row(
            _prompt(example),
            None if is_encoder else example.target,
            is_truncating=config.is_truncating,
            where=where,
        )
        rows.append(TrainingRow(row, number.get(example.target, 0)))
    return rows


def show_examples(model: ScalableLM, task: Task, num_examples: int = 3) -> list[str]:
    """The first examples exactly as the backbone will see them, the answer marked off by ``⟶``."""
    config = dataclasses.replace(model.config.learning, is_truncating=True)
    decode = model.backbone.renderer.tokenizer.decode
    shown = []
    for item, example in zip(
        training_rows(model, task, task.examples[:num_examples], config), task.examples, strict=False
    ):
        answer = decode(item.row.target) if item.row.target else example.target
        shown.append(f"{decode(item.row.prompt)} ⟶ {answer}")
    return shown


def check_learnable(model: ScalableLM, task: Task) -> None:
    """Refuse a task whose name is taken, or which the backbone cannot answer.

    Raises:
        TaskError: it is so.
    """
    # In the store, not among the tasks of the model, which may be restricted to some.
    if any(record.name == task.name for record in model.store.tasks()):
        raise TaskError(f"task {task.name!r} is already learned: forget it first or choose another name")
    if model.backbone.kind is BackboneKind.ENCODER and task.kind is TaskKind.GENERATION:
        raise TaskError(
            f"task {task.name!r} asks for free text, which the encoder {model.backbone.source!r} cannot "
            "write: use a causal or sequence-to-sequence backbone, 'smollm2' say"
        )


def _smallest_size(model: ScalableLM) -> int:
    """Bytes of the increments of a new task, which takes a little more."""
    layers, retrieval = model.backbone.reparameterizer.layers, model.config.retrieval
    num_increments = retrieval.cosine.keys_per_task if retrieval.form == "cosine" else 1
    width = sum(sum(layers[name].shape) for name in model.targets)
    return torch.float16.itemsize * model.config.increments.rank * width * num_increments


def _check_checkpoints(folder: str | None) -> None:
    """Make the folder of checkpoints, and refuse one that cannot be written before anything is computed."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoints cannot be kept at {folder} ({error.strerror}): name a folder you may write to"
        ) from error


def _knowledge_settings(config: LearningConfig) -> dict[str, Any]:
    """The settings that what is learned depends on: not where checkpoints lie, nor what is shown."""
    return {k: v for k, v in config.as_dict().items() if k not in ("checkpoint_folder", "has_progress")}


def _with_own_checkpoints(
    model: ScalableLM, task: Task, config: LearningConfig, started: Mapping[str, Any]
) -> LearningConfig:
    """The same settings with a folder of this learning's own, so that none resumes another's checkpoint."""
    if config.checkpoint_folder is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "several processes learn together only with checkpoint_folder set: give a folder that all of "
                "them can reach"
            )
        return config
    shape, retrieval = model.config.increments.as_dict(), model.config.retrieval.as_dict()
    what = [model.backbone.fingerprint, task.digest(), shape, retrieval, _knowledge_settings(config)]
    what += [started] if started else []
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    folder = Path(config.checkpoint_folder) / f"{task.name}-{digest[:12]}"
    return dataclasses.replace(config, checkpoint_folder=str(folder))


def _assign(queries: Tensor, task: Task, num_keys: int | None, seed: int) -> Tensor:
    """The key of each row, (B,) int64: one per label of two prompts or more, or k-means clusters."""
    if num_keys is None and task.labels:
        numbers = torch.tensor([task.labels.index(e.target or "") for e in task.examples])
        occurring: Tensor = torch.unique(numbers, return_inverse=True)[1]
        return join_single(occurring, _distinct(task, occurring))
    num_prompts = len({fold(example.prompt_text) for example in task.examples})
    return cluster(queries, most_keys(num_keys or 1, num_prompts), seed)


def _distinct(task: Task, assigned: Int[Tensor, " B"]) -> list[int]:
    """The first row of each prompt and key: repeated, a prompt is still known from one text alone."""
    rows: dict[tuple[str, int], int] = {}
    for row, (example, key) in enumerate(zip(task.examples, assigned.tolist(), strict=True)):
        rows.setdefault((fold(example.prompt_text), key), row)
    return list(rows.values())


def _prompt(example: Example) -> Any:
    if isinstance(example.prompt, str):
        return example.prompt
    return [{"role": message.role, "content": message.content} for message in example.prompt]
