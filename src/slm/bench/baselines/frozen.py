"""The frozen backbone: nothing is learned. An encoder then has nothing to say, and no answer is right."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

from slm.answer import Answer
from slm.backbone.backbone import BackboneKind
from slm.backbone.decode import prefill
from slm.backbone.prompts import Prompt
from slm.bench.baselines.rows import answer_all, write_freely
from slm.bench.baselines.text_losses import text_losses
from slm.bench.rival import Rival, Setup
from slm.evaluation.answer_cache import recall
from slm.reading import SILENCE
from slm.tasks import Task


class Frozen(Rival):
    """Greedy answers of the backbone as it is."""

    name = "frozen"
    title = "frozen model"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._known: dict[str, Answer] = {}

    def learn(self, task: Task) -> None:
        """Nothing."""

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The frozen backbone's own text; none from an encoder."""
        backbone = self.setup.backbone
        if backbone.kind is BackboneKind.ENCODER:
            return [SILENCE] * len(questions)
        backbone.reparameterizer.release()
        return answer_all(
            backbone,
            questions,
            lambda batch: write_freely(backbone, prefill(backbone, batch), self.setup.max_new_tokens),
        )

    def ask_again(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """The same, from memory where a question was asked before: nothing that is learned changes it."""
        return recall(self._known, [json.dumps(question) for question in questions], questions, self.ask)

    def losses(self, texts: Sequence[str]) -> list[float] | None:
        """Losses of the backbone as it is."""
        self.setup.backbone.reparameterizer.release()
        return text_losses(self.setup.backbone, texts, contextlib.nullcontext)

    @property
    def size_bytes(self) -> int:
        """Nothing is kept."""
        return 0
