"""Reading the prompts of some requests in one pass: knowledge decided, labels read, first tokens written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

from slm.backbone.backbone import BackboneKind
from slm.backbone.decode import prefill
from slm.backbone.prompts import Batch
from slm.errors import CrowdedError
from slm.extractor import words_of
from slm.knowledge import Knowledge
from slm.model import ScalableLM
from slm.reading import Chances, head_chances, is_naming, word_chances
from slm.serving.routing import Routing
from slm.serving.rows import Rows
from slm.serving.settings import ServingSettings
from slm.serving.work import Asked, Finished, Piece, TokenChance
from slm.store import TaskRecord


@final
class Reading:
    """Takes requests from their prompt to their first token, or to their whole answer where that is a label.

    Args:
        model: what is asked.
        settings: limits.
        rows: where answers go on being written.
    """

    def __init__(self, model: ScalableLM, settings: ServingSettings, rows: Rows) -> None:
        self._model, self._settings, self._rows = model, settings, rows

    def __call__(
        self, asked: Sequence[Asked], knowledge: Knowledge, adapters: Mapping[str, TaskRecord]
    ) -> None:
        """Read some prompts; hold the backbone's lock.

        Raises:
            Refused: a forced task is not among the knowledge.
            CrowdedError: their increments cannot be used in one batch, or not beside those of the rows being
                written; nothing was told to anybody.
            SlmError: an increment cannot be read; nothing was told to anybody.
        """
        model, backbone = self._model, self._model.backbone
        routing = Routing(model, knowledge, asked, adapters)
        batch = backbone.batch([request.row for request in asked])
        texts = [words_of(request.prompt) for request in asked]
        self._rows.release()
        if routing.needs_queries:
            with model.extractor.bending(batch, texts, routing.decide, is_two_pass=routing.needs_two_passes):
                self._answer(asked, batch, routing)
        else:
            backbone.reparameterizer.bind(routing.decide())
            self._answer(asked, batch, routing)

    def _answer(self, asked: Sequence[Asked], batch: Batch, routing: Routing) -> None:
        if self._model.backbone.kind is BackboneKind.ENCODER:
            pooled = self._model.backbone.pooled(batch)
            used = [routing.used(row) for row in range(len(asked))]
            found = head_chances(pooled, used, routing.knowledge.records, self._model.supply.head)
            for row, chances in enumerate(found):
                self._label(asked[row], routing, row, chances)
            return
        start = prefill(self._model.backbone, batch)
        used = [routing.used(row) for row in range(len(asked))]
        records = routing.knowledge.records
        naming = [row for row in range(len(asked)) if is_naming(used[row], records)]
        others = sorted(set(range(len(asked))) - set(naming))
        if not self._rows.fits(routing, [row for row in others if not asked[row].is_labelling]):
            raise CrowdedError("increments of running answers differ too much from a request's: ask again")
        labelled = word_chances(self._model.backbone, start, naming, used, records)
        for row, chances in zip(naming, labelled, strict=True):
            self._label(asked[row], routing, row, chances)
        for row in others:
            if asked[row].is_labelling:
                self._label(asked[row], routing, row, {})
            else:
                asked[row].tell(routing.told(row))
                self._rows.admit(asked[row], routing, row, start, self._room(asked[row]))

    def _label(self, asked: Asked, routing: Routing, row: int, chances: Chances) -> None:
        """Answer with the likeliest label; without any, an encoder has nothing to say."""
        asked.tell(routing.told(row))
        ranked = sorted(chances.items(), key=lambda item: -item[1])
        # The library's choice among equals: the first one named.
        best = max(chances, key=lambda label: chances[label]) if chances else ""
        confidence = chances[best] if chances else 0.0
        kind = "classification" if chances else "frozen"
        num_tokens = len(self._model.backbone.renderer.answer_ids(best)) if self._can_write and chances else 1
        likely = [(label, math.log(max(share, 1e-45))) for label, share in ranked]
        for index in range(asked.wish.num_answers):
            if asked.wish.num_logprobs is None or not chances:
                told: tuple[TokenChance, ...] = ()
            else:
                others = tuple(likely[: asked.wish.num_logprobs])
                told = (TokenChance(best, math.log(max(confidence, 1e-45)), others),)
            asked.tell(Piece(index, best, told))
            asked.tell(Finished(index, "stop", kind, confidence, num_tokens, tuple(ranked)))

    @property
    def _can_write(self) -> bool:
        return self._model.backbone.kind is not BackboneKind.ENCODER

    def _room(self, asked: Asked) -> int:
        """Tokens the answer may have."""
        room = self._model.backbone.window
        if not self._model.backbone.renderer.is_apart:
            room -= len(asked.row.prompt)
        return min(asked.wish.max_tokens or self._settings.default_tokens, room)
