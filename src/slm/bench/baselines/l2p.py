"""L2P-style prompt pool (Wang et al. 2022): all tasks share a pool of prompts, each with a key.

A frozen query of the row (mean of its words after the last layer) takes the N prompts of the nearest keys
by cosine. Prompts, keys and the shared head learn together; the loss is the task's plus

    pull · mean over the rows of the sum over the chosen keys of (1 − cos(query, key))

As in its release (google-research/l2p, for images), a task is learned with its own labels as the only
possible ones (``masks_labels``), keys are drawn uniformly, and no key is held back for being chosen often,
though the paper proposes it. What differs from the release:

* each row has prompts of its own; the release counts votes over a batch and gives all its rows the same, and
  its test batches are of one task each, which gives the task boundaries away;
* prompts start as embeddings of words, not uniformly drawn; keys are uniform over [−1, 1), not [0, 0.01);
* the query is the mean of the words, not a class token, and the head reads the mean of prompts and words, not
  that of prompts alone: both suit sentence encoders better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slm.answer import Answer
from slm.backbone.backbone import Backbone, BackboneKind
from slm.backbone.prompts import Batch, Prompt
from slm.bench.baselines.rows import (
    GrowingHead,
    answer_all,
    expect_finite,
    expect_room,
    learning_of,
    mask_of,
    name_labels,
    size_of,
    training_rows,
    write_freely,
)
from slm.bench.baselines.soft_prompt import Prompted, draw_prompts, prompted_pooled, prompted_prefill
from slm.bench.rival import Rival, Setup
from slm.config import LearningConfig
from slm.learning.trainer import fit
from slm.tasks import Task


class Pool(Prompted):
    """M prompts of L vectors each, and their keys.

    Args:
        backbone: frozen.
        config: of the training.
        settings: of the method.
    """

    def __init__(self, backbone: Backbone, config: LearningConfig, settings: dict[str, float]) -> None:
        super().__init__(backbone, config)
        num_prompts, length = int(settings["pool_size"]), int(settings["prompt_length"])
        words = draw_prompts(backbone, num_prompts * length, config.seed)
        seed = torch.Generator().manual_seed(config.seed)
        keys = torch.rand(num_prompts, backbone.num_channels, generator=seed) * 2 - 1
        self.prompts = nn.Parameter(words.view(num_prompts, length, -1))
        self.keys = nn.Parameter(keys)
        self.num_chosen, self.pull = int(settings["num_chosen"]), settings["pull"]
        is_encoder = backbone.kind is BackboneKind.ENCODER
        self.head = GrowingHead(backbone.num_channels) if is_encoder else None
        self.to(backbone.device)

    def queries(self, batch: Batch) -> Tensor:
        """(B, C), mean of each row's words after the last layer the frozen backbone reads them with."""
        return self.backbone.queries(batch, ((self.backbone.num_layers, "mean"),))

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (B, N) of the prompts with the nearest keys, nearest first, and their cosines (B, N)."""
        cosines = functional.normalize(queries, dim=1) @ functional.normalize(self.keys, dim=1).T
        best = cosines.topk(self.num_chosen, dim=1)
        return best.indices, best.values

    def choose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prompts of the nearest keys side by side, and how far those keys still are."""
        numbers, cosines = self.nearest(self.queries(batch))
        return self.prompts[numbers].flatten(1, 2), self.pull * (1 - cosines).sum(1).mean()

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Prompts and keys."""
        return [self.prompts, self.keys]


class PromptPool(Rival):
    """One pool for all tasks."""

    name = "l2p"
    title = "prompt pool (L2P)"
    defaults = {
        "learning_rate": 1e-2,
        "masks_labels": 1.0,
        "pool_size": 20.0,
        "num_chosen": 5.0,
        "prompt_length": 5.0,
        "pull": 0.5,
    }

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = learning_of(setup, self.settings["learning_rate"])
        expect_room(setup.backbone, int(self.settings["num_chosen"] * self.settings["prompt_length"]))
        self.pool = Pool(setup.backbone, self.config, self.settings)
        self.labels: list[str] = []

    def learn(self, task: Task) -> None:
        """Train pool, keys and head on this task."""
        backbone, head = self.setup.backbone, self.pool.head
        self.labels += [label for label in task.labels if label not in self.labels]
        with backbone.lock:
            if isinstance(head, GrowingHead):
                head.grow(len(self.labels))
                if self.settings["masks_labels"]:
                    head.open_labels = mask_of(self.labels, task.labels).to(backbone.device)
            train, validation = training_rows(backbone, task, self.labels, self.config)
            fit(self.pool, backbone, train, validation, self.config, f"{self.name} learning {task.name}")
            if isinstance(head, GrowingHead):
                head.open_labels = None
            expect_finite(self.pool, task.name, self.config.learning_rate)

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The best of all labels seen so far, or a freely written text."""
        self.pool.eval()
        return answer_all(self.setup.backbone, questions, self._answer)

    def _answer(self, batch: Batch) -> list[Answer]:
        backbone, head = self.setup.backbone, self.pool.head
        self.pool.bind()
        prompts, _ = self.pool.choose(batch)
        if head is not None:
            return name_labels(head(prompted_pooled(backbone, batch, prompts)), self.labels)
        start = prompted_prefill(backbone, batch, prompts)
        return write_freely(backbone, start, self.setup.max_new_tokens)

    @property
    def size_bytes(self) -> int:
        """Bytes of prompts, keys and head."""
        return size_of(list(self.pool.parameters()))
