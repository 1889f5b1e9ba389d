"""Tiny random backbones, two tasks for them, and what a cell of a benchmark gives a method."""

from __future__ import annotations

import dataclasses

import pytest

from slm.bench.rival import Setup
from slm.config import BackboneConfig, Config, IncrementConfig, LearningConfig
from slm.tasks import Task
from tests.backbone.families import load, save

SETTINGS = {name: {"num_groups": 4.0, "min_steps": 20.0} for name in ("slm-cosine", "slm-cosine-voting")}
"""Of methods whose defaults do not fit tiny backbones."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Gives the tiny backbone of a family, loaded once."""
    loaded = {}

    def find(family):
        if family not in loaded:
            loaded[family] = load(save(family, tmp_path_factory.mktemp("tiny")))
        loaded[family].reparameterizer.release()
        return loaded[family]

    return find


@pytest.fixture(scope="session")
def learned_folder(tmp_path_factory):
    """One folder of isolated knowledge for all tests that do not ask for their own."""
    return tmp_path_factory.mktemp("learned")


@pytest.fixture
def setup(tiny, tmp_path_factory, learned_folder):
    """Gives what a cell hands to a method."""

    def make(family="BERT", settings=None, learned=None, **learning):
        root = tmp_path_factory.mktemp("cell")
        return Setup(
            backbone=tiny(family),
            config=Config(
                backbone=BackboneConfig(dtype="float32", device="cpu", max_tokens=96),
                increments=IncrementConfig(rank=2),
                learning=LearningConfig(
                    **{"num_epochs": 1, "has_progress": False, "is_truncating": True, **learning}
                ),
            ),
            seed=0,
            scratch=root / "scratch",
            learned=learned or learned_folder,
            settings=settings or {},
            max_new_tokens=4,
        )

    return make


def colours(num_rows=20):
    """A task told by one word."""
    rows = [
        {"text": f"this thing number {i} is {c}", "label": c}
        for i in range(num_rows // 2)
        for c in ("red", "blue")
    ]
    return with_test(Task.from_rows("colours", rows))


def sizes(num_rows=20):
    """Another one, which shares a label with it in nothing."""
    rows = [
        {"text": f"how {s} was animal {i}?", "label": s}
        for i in range(num_rows // 2)
        for s in ("big", "small")
    ]
    return with_test(Task.from_rows("sizes", rows))


def with_test(task):
    return dataclasses.replace(task, test=task.examples[::3])


def texts_of(task):
    return [example.prompt for example in task.test]
