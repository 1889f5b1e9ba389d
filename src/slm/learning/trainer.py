"""Fine-tuning the increments of one task with Hugging Face Trainer.

Logging, resuming and several processes come with Trainer.
"""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

from slm.backbone.backbone import Backbone
from slm.backbone.prompts import Batch, Row
from slm.config import LearningConfig
from slm.learning.checkpoints import last_checkpoint
from slm.learning.learnable import Learnable, Trainable


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A tokenized example.

    Attributes:
        row: prompt and answer in tokens.
        label: its index among the task's labels, 0 for free text.
        weights: how much of each of the task's U increments the row is answered with; sums to 1.
        companions: further rows of the batches that this one gets into.
    """

    row: Row
    label: int
    weights: tuple[float, ...] = (1.0,)
    companions: tuple[TrainingRow, ...] = ()


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Training rows as Trainer likes them; ``input_ids`` is there for grouping by length."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.rows[index]
        return {"input_ids": item.row.prompt + item.row.target, "item": item}


def weights_of(rows: Sequence[TrainingRow]) -> Tensor:
    """(B, U) float32, each row's weights over the task's increments."""
    return torch.tensor([item.weights for item in rows])


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How training went.

    Attributes:
        num_epochs: epochs run.
        validation_loss: best validation loss; None without a validation split.
    """

    num_epochs: float
    validation_loss: float | None


class _Progress(TrainerCallback):  # type: ignore[misc]
    """One bar for the whole fine-tuning, on standard error."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            leave=False,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix(validation_loss=f"{metrics['eval_loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Tells somebody how far the fine-tuning is: the steps done, and of how many."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state.global_step, state.max_steps)


class _Arguments(TrainingArguments):  # type: ignore[misc]
    """Trainer's settings where the backbone stays where it is: one process computes on that device alone.

    Trainer would take a device of its own choice, and copies of the module on every further GPU, but the
    backbone stands outside the module. Several processes learn together as Trainer has it.
    """

    home: torch.device | None = None
    """Where the backbone is."""

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most one."""
        found: int = super().n_gpu
        return min(found, 1)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        chosen: torch.device = super().device
        is_alone = self.parallel_mode is not ParallelMode.DISTRIBUTED
        return self.home if is_alone and self.home is not None else chosen


def fit(
    learnable: Trainable,
    backbone: Backbone,
    train: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    config: LearningConfig,
    title: str,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Fine-tune, keep the parameters of the best validation loss, and leave the backbone frozen as it was.

    Args:
        learnable: what is fine-tuned.
        backbone: it changes.
        train: rows to learn from.
        validation: rows to stop early by.
        config: how.
        title: of the progress bar.
        on_step: is told the steps done and of how many, after every step.

    Raises:
        LearningError: the loss is not finite.
    """

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [row for item in items for row in (item["item"], *item["item"].companions)]
        batch = backbone.renderer.batch([item.row for item in rows], backbone.side)
        columns = {name: getattr(batch, name) for name in Batch.__slots__}
        labels = torch.tensor([item.label for item in rows])
        return {**columns, "labels": labels, "weights": weights_of(rows)}

    with tempfile.TemporaryDirectory(prefix="slm-learn-") as scratch, _generators_kept():
        folder = Path(config.checkpoint_folder or scratch).absolute()
        last = last_checkpoint(folder) if config.checkpoint_folder else None
        callbacks: list[Any] = [_Progress(title)] if config.has_progress else []
        if on_step is not None:
            callbacks.append(_Steps(on_step))
        if validation:
            callbacks.append(EarlyStoppingCallback(config.patience))
        arguments = _arguments(config, folder, len(train), bool(validation), backbone.device)
        if last is not None and last.has_ended:
            arguments.num_train_epochs = last.num_epochs
        with _current(backbone.device):
            trainer = Trainer(
                model=learnable,
                args=arguments,
                data_collator=collate,
                train_dataset=RowDataset(train),
                eval_dataset=RowDataset(validation) if validation else None,
                optimizers=(torch.optim.AdamW(learnable.parameter_groups()), None),
                callbacks=callbacks,
            )
            trainer.remove_callback(PrinterCallback)
            learnable.bind()
            try:
                with backbone.learning_attention():
                    trainer.train(resume_from_checkpoint=str(last.path) if last else None)
            finally:
                backbone.reparameterizer.release()
        best = trainer.state.best_metric if validation else None
        return TrainingResult(float(trainer.state.epoch or 0.0), best)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Trainer seeds the generators that everybody shares; behind the block they go on as they were before."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numpy_state)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block, "cuda" without a number is this device, as Trainer and accelerate take it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _arguments(
    config: LearningConfig, folder: Path, num_rows: int, has_validation: bool, device: torch.device
) -> _Arguments:
    batch_size = config.rows_per_step(num_rows)
    num_steps = math.ceil(num_rows / batch_size) * config.num_epochs
    arguments = _Arguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4 * batch_size,
        num_train_epochs=config.num_epochs,
        max_grad_norm=config.max_grad_norm or 0.0,  # which clips nothing
        lr_scheduler_type="cosine",
        warmup_steps=round(num_steps * config.warmup_share),
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch" if has_validation else "no",
        save_strategy="epoch" if has_validation or config.checkpoint_folder else "no",
        save_only_model=config.checkpoint_folder is None,
        restore_callback_states_from_checkpoint=True,
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_loss" if has_validation else None,
        greater_is_better=False if has_validation else None,
        prediction_loss_only=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=config.seed,
        label_names=["labels"],
    )
    arguments.home = device
    return arguments


@torch.no_grad()
def validation_score(
    learnable: Learnable, backbone: Backbone, rows: Sequence[TrainingRow], batch_size: int = 64
) -> float | None:
    """Share of right labels (encoder) or of right answer tokens (others) on the validation split."""
    if not rows:
        return None
    learnable.eval()
    learnable.bind()
    correct = counted = 0
    try:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            labels = torch.tensor([item.label for item in chosen], device=backbone.device)
            weights = weights_of(chosen).to(backbone.device)
            outcome = learnable.outcome(backbone.batch([item.row for item in chosen]), labels, weights)
            correct += int(outcome.num_correct)
            counted += int(outcome.num_counted)
    finally:
        backbone.reparameterizer.release()
    return correct / counted
