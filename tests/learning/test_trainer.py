"""What Trainer is kept from: other devices than the backbone's, and the generators of everybody else."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from slm.config import Config, LearningConfig, RetrievalConfig
from slm.errors import TaskError
from slm.learning import learn_task, learner
from slm.learning.trainer import _arguments
from slm.model import ScalableLM
from slm.tasks import Task
from tests.backbone.families import load, save
from tests.conftest import MOODS, rows_of

QUICK = LearningConfig(num_epochs=1, has_progress=False)
FILMS = Task.from_rows("films", rows_of(MOODS))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load(save("BERT", tmp_path_factory.mktemp("bert")))


def new_model(folder, backbone) -> ScalableLM:
    return ScalableLM.create(
        folder, backbone, Config(retrieval=RetrievalConfig(has_background=False), learning=QUICK)
    )


def test_a_machine_with_several_gpus_learns_on_the_one_that_holds_the_backbone(
    tmp_path, backbone, monkeypatch
):
    class Copies(nn.DataParallel):
        def __init__(self, *_, **__):
            raise AssertionError("the module was copied to other devices")

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    monkeypatch.setattr(nn, "DataParallel", Copies)
    assert new_model(tmp_path / "store", backbone).learn(FILMS).num_epochs == 1


def test_trainer_computes_where_the_backbone_is(tmp_path):
    arguments = _arguments(QUICK, tmp_path, 8, False, torch.device("cpu"))
    assert arguments.device == torch.device("cpu")
    arguments.home = torch.device("cuda:1")
    assert arguments.device == torch.device("cuda:1")
    assert arguments.train_batch_size == 4


def test_learning_leaves_the_generators_of_everybody_else_as_they_were(tmp_path, backbone, monkeypatch):
    states, fit = [], learner.fit

    def state() -> tuple[object, ...]:
        numbers = numpy.random.get_state()[1].tolist()
        return random.getstate(), numbers, torch.get_rng_state().tolist()

    def watched(*args, **options):
        states.append(state())
        result = fit(*args, **options)
        states.append(state())
        return result

    monkeypatch.setattr(learner, "fit", watched)
    new_model(tmp_path / "store", backbone).learn(FILMS)
    assert states[0] == states[1]


def test_gradients_are_learned_from_unclipped_where_no_norm_is_given(tmp_path, backbone):
    model = new_model(tmp_path / "store", backbone)
    model.learn(FILMS, max_grad_norm=None)
    assert model.tasks[0].metadata["learning"]["max_grad_norm"] is None


def test_a_name_that_is_taken_in_the_store_is_refused_by_a_restricted_model_before_it_learns(
    tmp_path, backbone
):
    model = new_model(tmp_path / "store", backbone)
    model.learn(FILMS)
    steps = []
    with pytest.raises(TaskError, match="task 'films' is already learned: forget it first"):
        learn_task(model.restricted([]), FILMS, on_step=lambda done, _: steps.append(done))
    assert steps == []
