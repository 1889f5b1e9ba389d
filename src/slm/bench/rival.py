"""What every method of a comparison has to offer, our own included."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm.answer import Answer
from slm.backbone.backbone import Backbone
from slm.backbone.prompts import Prompt
from slm.bench.suite import nearest
from slm.config import Config
from slm.errors import ConfigError
from slm.tasks import Stream, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all methods of one cell share.

    Attributes:
        backbone: loaded and frozen; a method that changes its weights loads a copy of its own.
        config: window, rank and training settings, the same for every method.
        seed: of initialisation and order of the rows.
        scratch: an empty folder of this cell's own, gone when the cell is done.
        learned: a folder that cells of one run share: what is learned there in isolation, whatever the order
            of the stream, is learned once.
        settings: of this method alone, as the suite gives them.
        max_new_tokens: longest written answer.
    """

    backbone: Backbone
    config: Config
    seed: int
    scratch: Path
    learned: Path
    settings: dict[str, float]
    max_new_tokens: int = 32


class Rival(abc.ABC):
    """One method: learns tasks in turn and answers questions of all of them.

    Args:
        setup: what it shares with the others of its cell.

    Raises:
        ConfigError: the suite gives a setting that the method does not have.

    Attributes:
        name: on the command line and in result files.
        title: in tables and figures.
        needs_task_id: whether ``ask`` has to be told which task a question is of; such a method is a bound.
        replayed_share: part of each earlier task's rows that it keeps, 0 to 1.
        is_joint: whether it sees all tasks at once, with :meth:`learn_all`; such a method is a bound.
        defaults: settings of the method, and their values where a suite gives none.
        settings: the defaults, and what the suite gives instead.
        borrowed_s: seconds of learning that an earlier cell of the run has spent in this one's place, less
            those that this one spent on waiting for it and on taking it over.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_task_id: ClassVar[bool] = False
    replayed_share: ClassVar[float] = 0.0
    is_joint: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, float]] = {}

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.settings = settle(setup.settings, self.defaults)
        self.borrowed_s = 0.0

    @abc.abstractmethod
    def learn(self, task: Task) -> None:
        """Learn one task; the ones before are gone."""

    def learn_all(self, stream: Stream) -> None:
        """Learn all tasks of a stream; one after another unless the method is joint."""
        for task in stream:
            self.learn(task)

    @abc.abstractmethod
    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answer questions of any task learned so far, in one shuffled list.

        Args:
            questions: texts or conversations; nothing in them says which task they are of.
            tasks: the task of each; given to a method that ``needs_task_id`` and to no other.
        """

    def ask_again(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """As :meth:`ask`, by a method that may remember its answers as long as they cannot have changed."""
        return self.ask(questions, tasks)

    @property
    @abc.abstractmethod
    def size_bytes(self) -> int:
        """Bytes kept for the tasks learned so far, beyond the frozen backbone, replayed rows included."""

    def nearest(self, questions: Sequence[Prompt]) -> list[str] | None:
        """The task each question is routed to, refused or not; None for a method that routes nothing."""
        return None

    def losses(self, texts: Sequence[str]) -> list[float] | None:
        """Mean negative log-likelihood of each text's own tokens, as the method would read it; in nats.

        None for a method that writes nothing, as every method of an encoder.
        """
        return None


def settle(given: Mapping[str, float], defaults: Mapping[str, float]) -> dict[str, float]:
    """The settings of a method: the defaults, and what is given instead.

    Raises:
        ConfigError: a given one is none of the method's.
    """
    for name in given:
        if name not in defaults:
            raise ConfigError(f"there is no {nearest('setting', name, defaults)}")
    return {**defaults, **given}
