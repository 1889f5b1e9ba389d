"""From the rows of one prefill to their mixtures: routed, forced or none, each row for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from slm.backbone.reparameterize import Mixture
from slm.knowledge import Knowledge, Share, Shares, shares_of
from slm.model import ScalableLM
from slm.retrieval.retriever import Reread
from slm.serving.refusals import unknown_task
from slm.serving.work import Asked, Decided
from slm.store import TaskRecord


@final
class Routing:
    """The decision for the rows of one prefill.

    Args:
        model: gives increments.
        knowledge: what is decided from.
        rows: the requests.
        adapters: loaded by name.

    Raises:
        Refused: a row's own task or adapter is gone.
    """

    def __init__(
        self,
        model: ScalableLM,
        knowledge: Knowledge,
        rows: Sequence[Asked],
        adapters: Mapping[str, TaskRecord],
    ) -> None:
        self._model, self._rows, self.knowledge = model, rows, knowledge
        stored = {record.name: record for record in knowledge.records}
        self._own = [_own(row, adapters, stored) for row in rows]
        self.shares: list[Shares] = [()] * len(rows)
        self.mixture: Mixture | None = None
        self._numbers = {record.commit_id: n for n, record in enumerate(knowledge.records)}

    @property
    def needs_queries(self) -> bool:
        """Whether any row is routed, or chooses among increments of its task."""
        if not self.knowledge.records:
            return False
        return any(
            row.is_routed or (own is not None and own.num_increments > 1)
            for row, own in zip(self._rows, self._own, strict=True)
        )

    @property
    def needs_two_passes(self) -> bool:
        """Whether a row may bend the very layers that make the query."""
        bent = (own.metadata.get("needs_two_passes") for own in self._own if own is not None)
        return self.knowledge.needs_two_passes or any(bent)

    def decide(self, queries: Tensor | None = None, reread: Reread | None = None) -> Mixture:
        """The mixture of all rows.

        Args:
            queries: (B, C); None where no row needs them.
            reread: reads the query of a row by itself.
        """
        by_choice: dict[str | None, tuple[TaskRecord | None, list[int]]] = {}
        for number, (row, own) in enumerate(zip(self._rows, self._own, strict=True)):
            if own is not None or (row.is_routed and queries is not None):
                by_choice.setdefault(None if own is None else own.commit_id, (own, []))[1].append(number)
        for own, numbers in by_choice.values():
            for number, shares in zip(numbers, self._choose(own, numbers, queries, reread), strict=True):
                self.shares[number] = shares
        self.mixture = self._model.supply.mixture(self.shares)
        return self.mixture

    def used(self, row: int) -> dict[int, float]:
        """Weight per task number of one row, largest first."""
        weights: dict[int, float] = {}
        for share in self.shares[row]:
            number = self._numbers.get(share.record.commit_id)
            if number is None:  # an adapter of no store: it writes, and has no labels
                continue
            weights[number] = weights.get(number, 0.0) + share.weight
        return dict(sorted(weights.items(), key=lambda item: -item[1]))

    def told(self, row: int) -> Decided:
        """What the client is told of a row."""
        weights: dict[str, float] = {}
        for share in self.shares[row]:
            weights[share.record.name] = weights.get(share.record.name, 0.0) + share.weight
        names = sorted(weights.items(), key=lambda item: -item[1])
        asked = self._rows[row]
        is_abstained = asked.is_routed and not names
        return Decided(tuple(names), is_abstained, self.knowledge.version, len(asked.row.prompt))

    def _choose(
        self, own: TaskRecord | None, rows: Sequence[int], queries: Tensor | None, reread: Reread | None
    ) -> Sequence[Shares]:
        known = self.knowledge
        if own is not None:
            if own.num_increments == 1:
                return [[Share(own, 0, 1.0)]] * len(rows)
            known = self._model.reader.read([own], known.version, is_abstaining=False)
        assert known.retriever is not None
        assert queries is not None
        by_place = None if reread is None else lambda place: reread(rows[place])
        return shares_of(known.retriever(queries[list(rows)], by_place), known.records)


def _own(
    row: Asked, adapters: Mapping[str, TaskRecord], stored: Mapping[str, TaskRecord]
) -> TaskRecord | None:
    """The adapter or the task that a row forces; they may have one name, but not one model."""
    if row.task is None:
        return None
    found = (adapters if row.task == row.model else stored).get(row.task)
    if found is None:
        raise unknown_task(row.task)
    return found
