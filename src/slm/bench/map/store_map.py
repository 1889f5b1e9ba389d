"""What a map of a store holds: places of keys and questions in DTKR's own space, and where questions went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from slm.evaluation.metrics import false_refusal_rate, misrouting
from slm.retrieval.plane import Place, Polygon

ABSTAINED = "abstained"
"""Name of the column of a confusion matrix that counts refused questions."""


@dataclass(frozen=True, slots=True)
class MappedKey:
    """One key on the map.

    Attributes:
        task: that owns it.
        place: where it is drawn.
        threshold: largest distance to it that is not refused; infinite where the store never abstains.
    """

    task: str
    place: Place
    threshold: float


@dataclass(frozen=True, slots=True)
class MappedQuestion:
    """One question on the map, and what DTKR decided for it.

    Attributes:
        text: its words.
        task: the task it is of; None where nobody said.
        is_of_store: whether that task was learned; True where nobody said.
        nearest: task of its nearest key, refused or not.
        weights: (task, weight) of the knowledge it was given; empty when abstained.
        distance: relative distance of the nearest key (method section 2d).
        threshold: largest such distance that is not refused.
        is_abstained: whether it was refused.
        place: where it is drawn.
        region: task whose region it is drawn in.
    """

    text: str
    task: str | None
    is_of_store: bool
    nearest: str
    weights: tuple[tuple[str, float], ...]
    distance: float
    threshold: float
    is_abstained: bool
    place: Place
    region: str

    @property
    def is_misrouted(self) -> bool:
        """Whether it is of a learned task and nearest to another's key, refused or not."""
        return self.task is not None and self.is_of_store and self.nearest != self.task


@dataclass(frozen=True, slots=True)
class Confusion:
    """Questions by the task they are of and the task they were given.

    Attributes:
        rows: tasks of the questions, learned ones first.
        num_learned: how many of the rows are learned tasks.
        columns: the tasks of the store, then ``abstained``.
        counts: questions of each row and column.
    """

    rows: tuple[str, ...]
    num_learned: int
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def mistakes(self) -> list[tuple[str, str, int, int]]:
        """(task, given, questions, questions of the task) of every confusion, the most frequent first.

        To be refused is a mistake of a learned task's question, not to be refused one of another's.
        """
        found = [
            (row, column, count, sum(line))
            for number, (row, line) in enumerate(zip(self.rows, self.counts, strict=True))
            for column, count in zip(self.columns, line, strict=True)
            if count and column != (row if number < self.num_learned else ABSTAINED)
        ]
        return sorted(found, key=lambda item: -item[2])


@final
@dataclass(frozen=True)
class StoreMap:
    """Everything that is drawn of a store.

    Attributes:
        form: of retrieval, ``gaussian`` or ``cosine``.
        tasks: names in learning order.
        keys: every key.
        questions: those asked, labelled ones first.
        num_axes: directions of the space that are drawn. With 2 a place is a projection of the query; with 1
            its height is the distance beyond the threshold of the nearest key, above 0 refused (where the
            store never abstains the distance); with 0 its x is the question's number as well.
        num_directions: directions in which the keys differ.
        drawn_share: share of what separates the keys that the axes hold.
        regions: task -> outlines of where it has the nearest key on the map.
        borders: lines between the regions of different tasks.
        reaches: (task, outline) of each key, outside which it refuses; of two axes only.
        is_exact: the regions are where DTKR's decision changes, not its projection.
        is_reach_exact: inside its outline a nearest key does not refuse.
        is_abstaining: whether the store refuses at all.
    """

    form: str
    tasks: tuple[str, ...]
    keys: tuple[MappedKey, ...]
    questions: tuple[MappedQuestion, ...]
    num_axes: int
    num_directions: int
    drawn_share: float
    regions: Mapping[str, Sequence[Polygon]]
    borders: Sequence[Polygon]
    reaches: Sequence[tuple[str, Polygon]]
    is_exact: bool
    is_reach_exact: bool
    is_abstaining: bool

    @cached_property
    def confusion(self) -> Confusion | None:
        """The confusion matrix of the labelled questions; None without any."""
        asked = [q for q in self.questions if q.task is not None]
        if not asked:
            return None
        given = [(q.task, ABSTAINED if q.is_abstained else q.nearest) for q in asked]
        present = {q.task for q in asked}
        learned = [name for name in self.tasks if name in present]
        strange = dict.fromkeys(q.task for q in asked if q.task is not None and not q.is_of_store)
        rows, columns = (*learned, *strange), (*self.tasks, ABSTAINED)
        counts = Counter(given)
        lines = tuple(tuple(counts[row, column] for column in columns) for row in rows)
        return Confusion(rows, len(learned), columns, lines)

    @property
    def agreement(self) -> float | None:
        """Share of the questions drawn in the region of their nearest key's task; None without questions."""
        return _share([q.region == q.nearest for q in self.questions])

    @property
    def misrouting(self) -> float | None:
        """Misrouting of the questions of learned tasks (method section 5); None without any."""
        own = self._own()
        numbers = {name: number for number, name in enumerate(self.tasks)}
        owners = [numbers[str(q.task)] for q in own]
        return misrouting(owners, [numbers[q.nearest] for q in own]) if own else None

    @property
    def false_refusal_rate(self) -> float | None:
        """Share of the questions of learned tasks that were refused; None without any."""
        own = self._own()
        return false_refusal_rate([q.is_abstained for q in own]) if own else None

    @property
    def outsiders_let_in(self) -> float | None:
        """Share of the questions of tasks never learned that were not refused; None without any."""
        return _share([not q.is_abstained for q in self.questions if not q.is_of_store])

    def as_dict(self) -> dict[str, Any]:
        """The numbers behind the map, JSON-ready."""
        confusion = self.confusion
        table = confusion and {
            "tasks": list(confusion.rows),
            "given": list(confusion.columns),
            "counts": [list(line) for line in confusion.counts],
        }
        return {
            "form": self.form,
            "tasks": list(self.tasks),
            "num_keys": len(self.keys),
            "num_questions": len(self.questions),
            "num_axes": self.num_axes,
            "num_directions": self.num_directions,
            "drawn_share": self.drawn_share,
            "is_exact": self.is_exact,
            "agreement": self.agreement,
            "misrouting": self.misrouting,
            "false_refusal_rate": self.false_refusal_rate,
            "outsiders_let_in": self.outsiders_let_in,
            "confusion": table,
        }

    def _own(self) -> list[MappedQuestion]:
        return [q for q in self.questions if q.task is not None and q.is_of_store]


def _share(is_so: Sequence[bool]) -> float | None:
    return sum(is_so) / len(is_so) if is_so else None
