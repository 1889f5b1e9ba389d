"""Knowledge that each task learns by itself: what slm, its bounds and its ablations share.

Learning looks at nothing but the task, so it gives the same bytes in every order and for every method with
the same settings of learning (``tests/test_model.py``). Cells of one run therefore keep what they have
learned under

    <learned>/<digest of backbone, settings, seed and task>/    a store with this one task

A task is learned in a temporary folder that is moved into place when it is complete, under a lock, so that a
killed cell leaves nothing half and cells that run side by side learn it once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

import slm
from slm.answer import Answer
from slm.backbone.prompts import Prompt
from slm.bench.baselines.rows import BATCH_SIZE
from slm.bench.baselines.text_losses import text_losses
from slm.bench.environment import commit
from slm.bench.rival import Rival, Setup
from slm.config import Config, RetrievalConfig
from slm.evaluation.answer_cache import AnswerCache
from slm.model import ScalableLM
from slm.retrieval.features import settle_reading
from slm.store import TaskKnowledge, TaskRecord
from slm.tasks import Task

_NAME = "task"
"""What a task is called in the folder of its own, whatever the stream calls it."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A task learned by itself.

    Attributes:
        record: what its store says of it.
        knowledge: keys, increments and head.
        time_s: seconds that learning took, now or earlier.
        is_new: whether it was learned just now.
    """

    record: TaskRecord
    knowledge: TaskKnowledge
    time_s: float
    is_new: bool


def learn_alone(setup: Setup, config: Config, task: Task) -> Learned:
    """What a task teaches with these settings, learned now or taken from an earlier cell of the run.

    Raises:
        SlmError: it cannot be learned; nothing is kept then.
    """
    # As a store does it, so that equal settings are equal whether they name their reading or not.
    retrieval = settle_reading(config.retrieval, setup.backbone.num_layers)
    config = dataclasses.replace(config, retrieval=retrieval)
    setup.learned.mkdir(parents=True, exist_ok=True)
    home = setup.learned / _digest(setup, config, task)
    is_new = False
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            is_new = True
            for left_behind in setup.learned.glob(f".building-{home.name}-*"):
                shutil.rmtree(left_behind)
            scratch = Path(tempfile.mkdtemp(prefix=f".building-{home.name}-", dir=setup.learned))
            try:
                _learn_into(scratch, setup, config, task)
                scratch.rename(home)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    model = ScalableLM.open(home / "store", setup.backbone)
    record = model.store.task(_NAME)
    knowledge = TaskKnowledge(
        model.store.keys(record),
        tuple(model.store.increment(record, i) for i in range(record.num_increments)),
        model.store.head(record),
    )
    return Learned(record, knowledge, json.loads((home / "time.json").read_text())["time_s"], is_new)


def _learn_into(folder: Path, setup: Setup, config: Config, task: Task) -> None:
    begun = time.perf_counter()
    model = ScalableLM.create(folder / "store", setup.backbone, config)
    model.learn(dataclasses.replace(task, name=_NAME, test=()), seed=setup.seed)
    (folder / "time.json").write_text(json.dumps({"time_s": time.perf_counter() - begun}))


def _digest(setup: Setup, config: Config, task: Task) -> str:
    """Of all that what is learned depends on."""
    settings = config.as_dict()
    settings["retrieval"] = settle_reading(config.retrieval, setup.backbone.num_layers).as_dict()
    del settings["pool"]  # where knowledge lies, not what it is
    for name in ("seed", "has_progress", "checkpoint_folder"):
        del settings["learning"][name]
    what = [
        slm.__version__,
        commit(),
        setup.backbone.fingerprint,
        str(setup.backbone.dtype),
        settings,
        setup.seed,
        dataclasses.replace(task, test=()).digest(),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


class IsolatedRival(Rival):
    """A method that keeps each task's knowledge apart, in a store, and answers from it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        retrieval = self.retrieval(setup.config.retrieval)
        self.model = ScalableLM.create(
            setup.scratch / "store", setup.backbone, dataclasses.replace(setup.config, retrieval=retrieval)
        )
        self.cache = AnswerCache(**options_of(setup))

    def retrieval(self, config: RetrievalConfig) -> RetrievalConfig:
        """How the method retrieves; slm's own way unless it says otherwise."""
        return config

    @property
    def learning_config(self) -> Config:
        """Settings under which a task is learned; those of the method's store unless it says otherwise."""
        return self.model.config

    def convert(self, knowledge: TaskKnowledge) -> TaskKnowledge:
        """What the method keeps of a task's knowledge; all of it unless it says otherwise."""
        return knowledge

    def learn(self, task: Task) -> None:
        """Learn the task by itself, and commit what was learned."""
        begun = time.perf_counter()
        learned = learn_alone(self.setup, self.learning_config, task)
        self.borrowed_s += learned.time_s - (time.perf_counter() - begun)
        record = learned.record
        self.model.store.commit(
            task.name,
            record.kind,
            record.labels,
            record.num_examples,
            self.convert(learned.knowledge),
            record.metadata,
        )

    def ask(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answers of the store, row by row."""
        return self.model.ask(list(questions), **options_of(self.setup))

    def ask_again(self, questions: Sequence[Prompt], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answers of the store, computed anew where a question's mixture has changed."""
        return self.cache.ask(self.model, questions)

    def nearest(self, questions: Sequence[Prompt]) -> list[str] | None:
        """The task of each question's largest weight, refused or not."""
        retrieved = self.model.retrieve(questions, is_truncating=True)
        if retrieved is None:
            return None
        names = [record.name for record in self.model.tasks]
        return [names[number] for number in retrieved.owners[retrieved.nearest].tolist()]

    def losses(self, texts: Sequence[str]) -> list[float] | None:
        """Losses under the mixture that each text, as a question, retrieves."""
        return text_losses(self.setup.backbone, texts, self._bent)

    @contextlib.contextmanager
    def _bent(self, texts: Sequence[str]) -> Iterator[None]:
        bound, retrieved = self.setup.backbone.reparameterizer, self.model.retrieve(texts, is_truncating=True)
        if retrieved is not None:
            bound.bind(self.model.mixture(retrieved))
        try:
            yield
        finally:
            bound.release()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tasks' files and keys and of the background, without the store's caches."""
        store = self.model.store
        records = store.tasks()
        kept = [own.means for own in store.all_keys(records, has_scatter=False)]
        if self.model.config.retrieval.form == "gaussian" and store.background is not None:
            kept += [store.background.mean, store.background.scatter]
        return sum(store.size_bytes(record) for record in records) + sum(half.nbytes for half in kept)


def options_of(setup: Setup) -> dict[str, Any]:
    """How a model is asked, as every rival is: over-long questions are cut, none is refused."""
    return {"max_new_tokens": setup.max_new_tokens, "batch_size": BATCH_SIZE, "is_truncating": True}
