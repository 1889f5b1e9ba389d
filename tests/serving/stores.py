"""Stores of a tiny random LLaMA, whose tasks have real keys and random increments: cheap, and never alike."""

from __future__ import annotations

from pathlib import Path

import torch

from slm.backbone.backbone import Backbone, BackboneKind
from slm.config import BackboneConfig, Config, RetrievalConfig
from slm.increments.increment import Increment, LowRankPair
from slm.learning.learner import prepare
from slm.model import ScalableLM
from slm.store import TaskKnowledge
from slm.tasks import Task
from tests.conftest import LANGUAGES, MOODS, SUMS, rows_of

COOKING = [
    (f"{verb} the {food} for {minutes} minutes", f"the {food} is done")
    for verb in ("boil", "fry", "bake")
    for food in ("potatoes", "onions", "fish", "rice")
    for minutes in (5, 20)
]
FRENCH, GOOD, SUM, COOK = "où est la gare", "a joy from start to end", "what is 3 plus 4?", COOKING[0][0]
OUTSIDE = "SELECT name, price FROM products WHERE price > 10 ORDER BY price DESC LIMIT 5;"


def small_tasks() -> list[Task]:
    """Two classifications and two generations."""
    return [
        Task.from_rows("languages", rows_of(LANGUAGES)),
        Task.from_rows("moods", rows_of(MOODS)),
        Task.from_rows("sums", [{"prompt": q, "completion": a} for q, a in SUMS]),
        Task.from_rows("cooking", [{"prompt": q, "completion": a} for q, a in COOKING]),
    ]


def increments(model: ScalableLM, seed: int, scale: float = 0.3, rank: int = 4) -> Increment:
    """A random increment of every target layer."""
    draw = torch.Generator().manual_seed(seed)
    layers = model.backbone.reparameterizer.layers
    pairs = {
        name: LowRankPair(
            torch.randn(rank, layers[name].shape[1], generator=draw) * layers[name].shape[1] ** -0.5,
            torch.randn(layers[name].shape[0], rank, generator=draw) * scale,
        )
        for name in model.targets
    }
    return Increment(pairs, rank, 1.0)


def commit(model: ScalableLM, task: Task, seed: int, rank: int = 4) -> None:
    """Store a task with the keys of its examples and a random increment."""
    keys = prepare(model, task, model.config.learning).keys
    head = None
    if model.backbone.kind is BackboneKind.ENCODER:
        draw = torch.Generator().manual_seed(seed)
        size = len(task.labels), model.backbone.num_channels
        head = {"weight": torch.randn(size, generator=draw), "bias": torch.zeros(size[0])}
    knowledge = TaskKnowledge(
        keys, (increments(model, seed, rank=rank),) * (int(keys.increments.max()) + 1), head
    )
    model.store.commit(task.name, task.kind.value, task.labels, len(task.examples), knowledge)


def make_store(
    folder: Path, backbone: Backbone, num_passes: int = 2, false_refusal_rate: float | None = None
) -> ScalableLM:
    """A store of the four small tasks."""
    layers = (1,) if num_passes == 1 else None
    retrieval = RetrievalConfig(num_passes=num_passes, layers=layers, false_refusal_rate=false_refusal_rate)
    loading = BackboneConfig(dtype="float32", device="cpu", max_tokens=96)
    model = ScalableLM.create(folder, backbone, Config(backbone=loading, retrieval=retrieval))
    is_encoder = backbone.kind is BackboneKind.ENCODER
    for seed, task in enumerate(small_tasks()[: 2 if is_encoder else 4]):
        commit(model, task, seed)
    return model
