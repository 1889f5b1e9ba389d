"""What ``retrieval.py`` measures with fine-tuned tasks: what a confusion costs, and where mixing pays.

MiniLM learns the 15 classifications of the long stream; every test row is answered by its own task's
knowledge, by the nearest task's alone (K = 1) and by the mixture (the default K). Then a store whose tasks
truly overlap: each of three data sets cut at random into two tasks, either of which fits every row,
three times over.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slm import Answer, Config, ScalableLM, Stream, Task
from slm.config import BackboneConfig, LearningConfig, RetrievalConfig
from slm.store import TaskKnowledge

OVERLAPPING = ("agnews", "sst2", "yahoo")
NUM_CUTS = 3

Rights = Mapping[str, Sequence[bool]]


def settings(top_k: int, num_epochs: int) -> Config:
    """MiniLM on two cores; no row is refused, so that routing is all that differs."""
    return Config(
        backbone=BackboneConfig(max_tokens=128),
        retrieval=RetrievalConfig(top_k=top_k, is_abstaining=False),
        learning=LearningConfig(num_epochs=num_epochs, batch_size=16, is_truncating=True),
    )


def learn(stream: Stream, folder: Path, num_epochs: int) -> dict[int, ScalableLM]:
    """Teach the tasks once, to a store that mixes two, and hand the same knowledge to one that takes one."""
    models = {
        top_k: ScalableLM.create(folder / str(top_k), "minilm", settings(top_k, num_epochs))
        for top_k in (2, 1)
    }
    for number, task in enumerate(stream):
        models[2].learn(task, seed=number)
        record = models[2].store.task(task.name)
        increments = tuple(models[2].store.increment(record, i) for i in range(record.num_increments))
        knowledge = TaskKnowledge(models[2].store.keys(record), increments, models[2].store.head(record))
        models[1].store.commit(
            record.name, record.kind, record.labels, record.num_examples, knowledge, record.metadata
        )
    return models


def answer(model: ScalableLM, task: Task) -> list[Answer]:
    """Answers to a task's test rows."""
    return model.ask([example.prompt for example in task.test], is_truncating=True)


def rights(answers: Sequence[Answer], task: Task) -> list[bool]:
    """Whether each answer is the row's label."""
    return [a.text == example.target for a, example in zip(answers, task.test, strict=True)]


def confusion_costs(stream: Stream, folder: Path, num_epochs: int = 2) -> dict[str, Any]:
    """Accuracy of every task three ways, and of the rows that another task got."""
    models = learn(stream, folder, num_epochs)
    tasks: dict[str, dict[str, float]] = {}
    pairs: dict[str, dict[str, int]] = {}
    for task in stream:
        own = rights(answer(models[2].restricted([task.name]), task), task)
        single, mixed = answer(models[1], task), answer(models[2], task)
        alone, both = rights(single, task), rights(mixed, task)
        num = len(task.test)
        tasks[task.name] = {
            "own knowledge": sum(own) / num,
            "K = 1": sum(alone) / num,
            "K = 2": sum(both) / num,
            "mixed rows": sum(len(a.tasks) > 1 for a in mixed) / num,
        }
        for a, by_own, by_one, by_two in zip(single, own, alone, both, strict=True):
            routed = a.tasks[0][0]
            if routed == task.name:
                continue
            pair = pairs.setdefault(
                f"{task.name} → {routed}", dict.fromkeys(("rows", "own", "one", "two"), 0)
            )
            for name, right in (("rows", True), ("own", by_own), ("one", by_one), ("two", by_two)):
                pair[name] += right
    return {"tasks": tasks, "confusions": pairs}


def halves(stream: Stream, seed: int = 0) -> Stream:
    """Each task cut at random into two tasks with the same test rows."""
    parts = []
    for task in stream:
        examples = list(task.examples)
        random.Random(seed).shuffle(examples)
        for i in range(2):
            parts.append(dataclasses.replace(task, name=f"{task.name}-{i}", examples=tuple(examples[i::2])))
    return Stream(tuple(parts))


def overlap(stream: Stream, folder: Path, num_epochs: int = 3) -> dict[str, dict[str, float]]:
    """Accuracy of K = 1 and K = 2 where every row belongs to two tasks alike, over several cuts.

    ``error`` is the standard error of the difference of the two, the rows being drawn anew.
    """
    singles, mixtures, num_mixed = ({task.name: [] for task in stream} for _ in range(3))
    for seed in range(NUM_CUTS):
        models = learn(halves(stream, seed), folder / str(seed), num_epochs)
        for task in stream:
            single, mixed = answer(models[1], task), answer(models[2], task)
            singles[task.name].append(rights(single, task))
            mixtures[task.name].append(rights(mixed, task))
            num_mixed[task.name].append(sum(len(a.tasks) > 1 for a in mixed))
    found = {}
    for task in stream:
        one, two = (torch.tensor(cuts[task.name]).double().mean(0) for cuts in (singles, mixtures))
        found[task.name] = {
            "rows": len(task.test),
            "K = 1": float(one.mean()),
            "K = 2": float(two.mean()),
            "error": float((two - one).std()) / len(task.test) ** 0.5,
            "mixed rows": sum(num_mixed[task.name]) / NUM_CUTS / len(task.test),
        }
    return found
