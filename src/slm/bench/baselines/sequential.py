"""Sequential fine-tuning: all weights, one task after another, nothing done against forgetting.

The usual lower bound of continual learning. One encoder and one head over every label seen so far are
trained on each task in turn; at test time the best of all labels is the answer, with no task-ID.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from slm.answer import Answer
from slm.config import Config
from slm.learning.trainer import RowDataset, TrainingRow
from slm.model import ScalableLM
from slm.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialConfig:
    """Settings of the baseline.

    Attributes:
        learning_rate: of every weight; the usual value for full fine-tuning of small encoders.
        num_epochs: passes over each task.
        batch_size: rows per step.
        seed: of order and head.
    """

    learning_rate: float = 5e-5
    num_epochs: int = 4
    batch_size: int = 16
    seed: int = 0


class _WholeModel(nn.Module):
    """Backbone and head, all of it trained."""

    def __init__(self, model: ScalableLM) -> None:
        super().__init__()
        self.network = model.backbone.model.float().requires_grad_(True)
        self.head: nn.Linear | None = None
        self._num_channels = model.backbone.num_channels

    def grow(self, num_labels: int) -> None:
        """Add outputs for labels not seen before; the others keep their weights."""
        old, self.head = self.head, nn.Linear(self._num_channels, num_labels)
        if old is not None:
            with torch.no_grad():
                self.head.weight[: old.out_features] = old.weight
                self.head.bias[: old.out_features] = old.bias

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (B, Y), and their cross-entropy where labels (B,) are given."""
        hidden = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert self.head is not None, "grow() comes first"
        marked = mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * marked).sum(1) / marked.sum(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


class SequentialFineTuning:
    """The baseline, with the verbs of :class:`slm.ScalableLM`.

    Args:
        backbone: an encoder, loaded afresh: its weights are changed.
        config: window and dtype of the rival it stands beside.
        settings: of the fine-tuning.
    """

    def __init__(self, backbone: str, config: Config, settings: SequentialConfig | None = None) -> None:
        self.settings = settings or SequentialConfig()
        torch.manual_seed(self.settings.seed)
        plain = replace(config, backbone=replace(config.backbone, dtype="float32"))
        with tempfile.TemporaryDirectory(prefix="slm-sequential-") as folder:
            # Only the backbone of the empty store is used; nothing is ever written to it.
            self.model = ScalableLM.create(Path(folder) / "store", backbone, plain)
        self.whole = _WholeModel(self.model)
        self.labels: list[str] = []

    def learn(self, task: Task) -> None:
        """Train everything on this task alone."""
        self.labels += [label for label in task.labels if label not in self.labels]
        self.whole.grow(len(self.labels))
        rows = [
            TrainingRow(row, self.labels.index(example.target or ""))
            for row, example in zip(self._rows([e.prompt for e in task.examples]), task.examples, strict=True)
        ]
        with tempfile.TemporaryDirectory(prefix="slm-sequential-") as scratch:
            trainer = Trainer(
                model=self.whole,
                args=TrainingArguments(
                    output_dir=scratch,
                    per_device_train_batch_size=self.settings.batch_size,
                    num_train_epochs=self.settings.num_epochs,
                    learning_rate=self.settings.learning_rate,
                    weight_decay=0.01,
                    warmup_steps=10,
                    bf16=self.model.backbone.device.type == "cuda" or _has_bfloat16(),
                    use_cpu=self.model.backbone.device.type == "cpu",
                    train_sampling_strategy="group_by_length",
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                    dataloader_pin_memory=False,
                    seed=self.settings.seed,
                    label_names=["labels"],
                ),
                data_collator=self._collate,
                train_dataset=RowDataset(rows),
            )
            trainer.remove_callback(PrinterCallback)
            with self.model.backbone.learning_attention():
                trainer.train()

    @torch.inference_mode()
    def ask(self, questions: Sequence[Any], *, batch_size: int = 32, **_: Any) -> list[Answer]:
        """The best of all labels seen so far, for each question."""
        self.whole.eval()
        rows = self._rows(questions)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        answers: list[Answer] = [Answer(None, "frozen", 0.0, (), True)] * len(rows)
        is_fast = _has_bfloat16()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.model.backbone.batch([rows[i] for i in chosen])
            with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=is_fast):
                logits = self.whole(batch.ids, batch.mask)["logits"]
            for i, row in zip(chosen, logits.float().softmax(-1), strict=True):
                best = int(row.argmax())
                answers[i] = Answer(self.labels[best], "classification", float(row[best]), (), False)
        return answers

    def _rows(self, prompts: Sequence[Any]) -> list[Any]:
        return [
            self.model.backbone.row(prompt, is_truncating=True, where=f"question {i}")
            for i, prompt in enumerate(prompts, start=1)
        ]

    def _collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.model.backbone.batch([item["item"].row for item in items])
        labels = torch.tensor([item["item"].label for item in items])
        return {"ids": batch.ids, "mask": batch.mask, "labels": labels}


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
