"""Stores of real queries whose tasks have keys and an idle increment: a map needs nothing fine-tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slm.config import RetrievalConfig
from slm.increments.increment import Increment, LowRankPair
from slm.learning.learner import prepare
from slm.model import ScalableLM
from slm.store import TaskKnowledge
from slm.tasks import Stream, Task
from tests.conftest import config

SUMS = [f"what is {a} plus {b}?" for a in range(2, 8) for b in range(3, 8)]
COOKING = [
    f"{verb} the {food} for {minutes} minutes"
    for verb in ("boil", "fry", "bake")
    for food in ("potatoes", "onions", "fish", "rice", "eggs")
    for minutes in (5, 20)
]

Teach = Callable[..., ScalableLM]


def pairs_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts)]


def split(name: str, texts: list[str]) -> Task:
    """A task whose every third text is a test example."""
    rows = Task.from_rows(name, pairs_of(texts))
    kept = tuple(e for i, e in enumerate(rows.examples) if i % 3)
    return Task(name, rows.kind, kept, rows.labels, rows.examples[::3])


@pytest.fixture(scope="session")
def four(languages: Task, moods: Task) -> Stream:
    """Four tasks with test examples."""
    texts = [("languages", languages), ("moods", moods)]
    known = [split(name, [e.prompt for e in task.examples]) for name, task in texts]
    return Stream((*known, split("sums", SUMS), split("cooking", COOKING)))


@pytest.fixture(scope="session")
def teach(minilm, tmp_path_factory: pytest.TempPathFactory) -> Teach:
    """Makes a store of MiniLM with the keys of some tasks."""

    def make(tasks, **settings: object) -> ScalableLM:
        folder: Path = tmp_path_factory.mktemp("maps") / "store"
        wanted = dataclasses.replace(config(1), retrieval=RetrievalConfig(**settings))
        model = ScalableLM.create(folder, minilm, wanted)
        pair = LowRankPair(torch.zeros(1, 384), torch.zeros(384, 1))
        for task in tasks:
            keys = prepare(model, task, wanted.learning).keys
            idle = (Increment({"encoder.layer.5.output.dense": pair}, 1, 1.0),)
            num_increments = int(keys.increments.max()) + 1
            knowledge = TaskKnowledge(keys, idle * num_increments)
            model.store.commit(task.name, task.kind.value, task.labels, len(task.examples), knowledge)
        return model

    return make
