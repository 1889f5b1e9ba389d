"""Replay: keep a share of each earlier task's rows and mix them into every batch of a later one.

A batch of a new task is as slm's and has kept rows on top, ``replayed_per_row`` of them for every new row,
drawn evenly from all that is kept. The new rows are thus seen as often as by every other method, and what
is replayed is extra computation in replay's favour.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import overload

from slm.bench.baselines.rows import label_rows
from slm.bench.baselines.shared_increment import SharedRival
from slm.bench.rival import Setup
from slm.learning.trainer import TrainingRow
from slm.tasks import Example, Task
from slm.tasks.task import draw


class Mixed(Sequence[TrainingRow]):
    """New rows, each of which brings kept rows along when it is taken: ``per_row`` of them on average.

    Kept rows take turns in a shuffled order, so that all are replayed equally often.
    """

    def __init__(self, new: Sequence[TrainingRow], kept: Sequence[TrainingRow], per_row: float, seed: int):
        self.new, self.kept, self.per_row = new, kept, per_row
        self._turns = self._shuffled(random.Random(seed))
        self._due = 0.0

    def _shuffled(self, generator: random.Random) -> Iterator[TrainingRow]:
        while True:
            yield from generator.sample(list(self.kept), len(self.kept))

    def __len__(self) -> int:
        return len(self.new)

    @overload
    def __getitem__(self, index: int) -> TrainingRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TrainingRow]: ...
    def __getitem__(self, index: int | slice) -> TrainingRow | Sequence[TrainingRow]:
        """A new row with its companions."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._due += self.per_row
        num_due = int(self._due)
        self._due -= num_due
        return dataclasses.replace(
            self.new[index], companions=tuple(next(self._turns) for _ in range(num_due))
        )


class _Replay(SharedRival):
    defaults = {**SharedRival.defaults, "replayed_per_row": 0.5}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.kept: list[tuple[str, Example]] = []

    def mix(self, rows: list[TrainingRow]) -> Sequence[TrainingRow]:
        """The new rows, with what is kept of earlier tasks."""
        if not self.kept:
            return rows
        old = [
            row
            for name, example in self.kept
            for row in label_rows(
                self.setup.backbone, [example], self.knowledge.labels, self.config.is_truncating, name
            )
        ]
        return Mixed(rows, old, self.settings["replayed_per_row"], self.setup.seed)

    def after(self, task: Task, rows: Sequence[TrainingRow]) -> None:
        """Keep a share of the task's rows, at least one, drawn in proportion to its labels."""
        num_kept = max(1, round(self.replayed_share * len(task.examples)))
        chosen = draw(task.examples, task.kind, num_kept, self.setup.seed)
        self.kept += [(task.name, example) for example in chosen]

    @property
    def size_bytes(self) -> int:
        """Bytes of increment and head, and of the kept rows' words."""
        texts = [text for _, example in self.kept for text in (example.prompt_text, example.target or "")]
        return super().size_bytes + sum(len(text.encode()) for text in texts)


class Replay1(_Replay):
    """1% of each earlier task's rows, as in the paper."""

    name = "replay-1"
    title = "replay 1%"
    replayed_share = 0.01


class Replay10(_Replay):
    """10% of each earlier task's rows."""

    name = "replay-10"
    title = "replay 10%"
    replayed_share = 0.1
