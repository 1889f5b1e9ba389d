import dataclasses

import pytest
import torch

from slm import ScalableLM, Task
from slm.backbone.load import load_backbone
from slm.config import Config, RetrievalConfig

ROWS = [("a joy", "good"), ("a mess", "bad"), ("a delight", "good"), ("a bore", "bad"), ("lovely", "good")]
ROWS += [("awful", "bad"), ("superb", "good"), ("dull", "bad"), ("great fun", "good"), ("a waste", "bad")]
SETTINGS = {"num_epochs": 2, "has_progress": False}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("minilm")


def films(name: str, labels: dict[str, str]) -> Task:
    return Task.from_rows(name, [{"text": text, "label": labels[label]} for text, label in ROWS])


def test_no_task_starts_from_the_checkpoint_of_another(backbone, tmp_path):
    first = films("first", {"good": "a", "bad": "b"})
    second = films("second", {"good": "b", "bad": "a"})
    alone = ScalableLM.create(tmp_path / "alone", backbone)
    alone.learn(second, **SETTINGS)
    after = ScalableLM.create(tmp_path / "after", backbone)
    after.learn(first, **SETTINGS, checkpoint_folder=str(tmp_path / "checkpoints"))
    after.learn(second, **SETTINGS, checkpoint_folder=str(tmp_path / "checkpoints"))
    expected, found = (model.store.head(model.store.task("second")) for model in (alone, after))
    assert torch.equal(found["weight"], expected["weight"])


def test_the_store_remembers_no_setting_that_changes_nothing_learned(backbone, tmp_path):
    model = ScalableLM.create(tmp_path / "store", backbone)
    model.learn(films("films", {"good": "a", "bad": "b"}), **SETTINGS, checkpoint_folder=str(tmp_path / "ck"))
    (record,) = model.tasks
    remembered = record.metadata["learning"]
    assert remembered["num_epochs"] == 2
    assert (model.config.learning.batch_size, remembered["batch_size"]) == (None, 4)
    assert not {"checkpoint_folder", "has_progress"} & set(remembered)


def test_no_task_starts_from_a_checkpoint_of_other_keys(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("slm.learning.learner._remove_checkpoints", lambda config: None)
    task, folder = films("films", {"good": "a", "bad": "b"}), tmp_path / "checkpoints"
    for form in ("gaussian", "cosine"):
        config = Config(retrieval=RetrievalConfig(form=form))
        model = ScalableLM.create(tmp_path / form, backbone, config)
        model.learn(task, **SETTINGS, checkpoint_folder=str(folder))
    assert len(list(folder.iterdir())) == 2


def test_what_was_learned_is_not_resumed_when_it_is_learned_again(backbone, tmp_path):
    model, task = ScalableLM.create(tmp_path / "store", backbone), films("films", {"good": "a", "bad": "b"})
    heads, folder = [], tmp_path / "checkpoints"
    for _ in range(2):
        model.learn(task, num_epochs=3, has_progress=False, checkpoint_folder=str(folder))
        heads.append(model.store.head(model.store.task("films"))["weight"])
        assert list(folder.iterdir()) == []
        model.forget("films")
    assert torch.equal(*heads)


def test_a_label_without_examples_has_no_key(backbone, tmp_path):
    config = Config(retrieval=RetrievalConfig(keys_per_task=None))
    model = ScalableLM.create(tmp_path / "store", backbone, config)
    task = films("films", {"good": "a", "bad": "c"})
    model.learn(dataclasses.replace(task, labels=("a", "b", "c")), **SETTINGS)
    (keys,) = model.store.all_keys(model.tasks, has_scatter=False)
    assert keys.counts.tolist() == [5, 5]
    assert torch.isfinite(keys.means).all()
