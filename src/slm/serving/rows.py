"""The answers that are being written: one row each, all of them one token further with every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from slm.backbone.backbone import BackboneKind
from slm.backbone.bank import LowRank
from slm.backbone.decode import Prefill
from slm.backbone.reparameterize import Mixture
from slm.backbone.slots import slots_of
from slm.model import ScalableLM
from slm.serving.refusals import Refused, too_late
from slm.serving.routing import Routing
from slm.serving.work import Asked, Failed
from slm.serving.writing import Answer


@dataclass(slots=True)
class _Row:
    """One answer, and the increments it keeps to its end."""

    asked: Asked
    answer: Answer
    parts: tuple[tuple[LowRank, float], ...]


@final
class Rows:
    """Answers of a backbone that writes, in the order of their slots.

    Args:
        model: what is asked; hold its backbone's lock during every call.
    """

    def __init__(self, model: ScalableLM) -> None:
        self._backbone = model.backbone
        self._slots = slots_of(model.backbone)
        self._rows: list[_Row] = []
        self._is_bound = False
        own: Any = getattr(model.backbone.model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        tokens = {model.backbone.renderer.tokenizer.eos_token_id}
        tokens |= set(ends) if isinstance(ends, list) else {ends}
        self._ends = frozenset(tokens - {None})
        is_apart = model.backbone.kind is BackboneKind.SEQUENCE_TO_SEQUENCE
        self._first = getattr(own, "forced_bos_token_id", None) if is_apart else None

    def __len__(self) -> int:
        return len(self._rows)

    def release(self) -> None:
        """Give the backbone back frozen, for something else to be computed before the next step."""
        self._backbone.reparameterizer.release()
        self._is_bound = False

    def rest(self) -> None:
        """The same, and nothing is asked for a while."""
        self._backbone.reparameterizer.rest()
        self._is_bound = False

    def fits(self, routing: Routing, rows: Sequence[int]) -> bool:
        """Whether the increments of some rows of a prefill can be used beside those in use."""
        parts = [part for row in self._rows for part in row.parts]
        parts += [part for row in rows for part in _parts_of(routing, row)]
        distinct = {id(increment): increment for increment, _ in parts}
        return self._backbone.reparameterizer.bank.fits(list(distinct.values()))

    def admit(self, asked: Asked, routing: Routing, row: int, start: Prefill, max_tokens: int) -> None:
        """Take over a row of a prefill, once for each answer it is to have, and write the first tokens."""
        parts = _parts_of(routing, row)
        kind = "generation" if parts else "frozen"
        logits = start.logits[row : row + 1].float()
        if self._first is not None:  # the first token of some decoders is not chosen
            logits = torch.full_like(logits, -torch.inf)
            logits[:, self._first] = 0.0
        tokenizer = self._backbone.renderer.tokenizer
        for index in range(asked.wish.num_answers):
            answer = Answer(index, asked.wish, max_tokens, tokenizer, self._ends, kind)
            new = _Row(asked, answer, parts)
            self._take([new], logits)
            if answer.reason is None:
                self._slots.admit(start, row)
                self._rows.append(new)
        self._is_bound = False

    def step(self) -> None:
        """One token more for every row."""
        if not self._is_bound:
            self._backbone.reparameterizer.bind(_mixture(self._rows))
            self._is_bound = True
        logits = self._slots.step(torch.tensor([row.answer.last_token for row in self._rows]))
        self._take(self._rows, logits.float())
        self._remove([place for place, row in enumerate(self._rows) if row.answer.reason is not None])

    def drop_dead(self) -> None:
        """Let go of rows nobody waits for any more, and of those that are late."""
        gone = []
        for place, row in enumerate(self._rows):
            if row.asked.is_late and not row.asked.is_cancelled:
                row.asked.is_cancelled = True
                row.asked.tell(Failed(too_late(row.asked.deadline_s)))
            if row.asked.is_cancelled:
                gone.append(place)
        self._remove(gone)

    def fail(self, refusal: Refused) -> None:
        """Give up on all rows."""
        for row in self._rows:
            if not row.asked.is_cancelled:
                row.asked.is_cancelled = True
                row.asked.tell(Failed(refusal))
        self._rows = []
        self._slots.clear()
        self._backbone.reparameterizer.release()
        self._is_bound = False

    def _take(self, rows: list[_Row], logits: Tensor) -> None:
        """Choose the next token of each row and tell what is settled; logits are (n, V) float32."""
        likeliest, totals = logits.argmax(-1).tolist(), logits.logsumexp(-1).tolist()
        for row, own, token, total in zip(rows, logits, likeliest, totals, strict=True):
            chosen = row.answer.choose(own, token)
            piece = row.answer.add(chosen, own, total)
            if piece is not None:
                row.asked.tell(piece)
            if row.answer.reason is not None:
                row.asked.tell(row.answer.finish())

    def _remove(self, places: list[int]) -> None:
        for place in reversed(places):
            self._slots.remove(place)
            last = self._rows.pop()
            if place < len(self._rows):
                self._rows[place] = last
        if places:
            self._is_bound = False


def _parts_of(routing: Routing, row: int) -> tuple[tuple[LowRank, float], ...]:
    """The increments that a row of a prefill uses, and how much of each."""
    mixture = routing.mixture
    if mixture is None:
        return ()
    slots, weights = mixture.slots[row].tolist(), mixture.weights[row].tolist()
    return tuple((mixture.increments[s], w) for s, w in zip(slots, weights, strict=True) if w > 0)


def _mixture(rows: list[_Row]) -> Mixture:
    """The mixture of all rows, from the increments they keep."""
    places: dict[int, int] = {}
    increments: list[LowRank] = []
    num_kept = max((len(row.parts) for row in rows), default=0) or 1
    slots, weights = torch.zeros(len(rows), num_kept, dtype=torch.long), torch.zeros(len(rows), num_kept)
    for number, row in enumerate(rows):
        for column, (increment, weight) in enumerate(row.parts):
            if id(increment) not in places:
                places[id(increment)] = len(increments)
                increments.append(increment)
            slots[number, column], weights[number, column] = places[id(increment)], weight
    return Mixture(increments, slots, weights)
