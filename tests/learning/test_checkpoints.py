import dataclasses
import json
import shutil
from itertools import product

import pytest
import torch

from slm import ScalableLM, Task
from slm.backbone.load import load_backbone
from slm.config import Config, RetrievalConfig
from slm.learning import learn_task
from slm.learning.checkpoints import last_checkpoint
from tests.backbone.families import load, save

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


class KilledError(Exception):
    """Stands for what ends a process in the middle of learning."""


WORDS = ["sun", "moon", "tree", "car", "dog", "cat", "house", "river", "road", "bird", "fish"]
NOISE = Task.from_rows(
    "noise",
    [{"text": f"{WORDS[n % 11]} {WORDS[(7 * n + 3) % 11]} {n}", "label": "abba"[n % 4]} for n in range(60)],
)
NUM_EPOCHS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(save("BERT", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def stopping(tiny, tmp_path):
    """Learns noise, which early stopping soon ends, and stops early in a pass where one is given."""
    model = ScalableLM.create(
        tmp_path / "store", tiny, Config(retrieval=RetrievalConfig(has_background=False))
    )

    def learn(folder: str, stop_in: int | None = None):
        def on_step(done: int, num_steps: int) -> None:
            if stop_in is not None and done == (stop_in - 1) * num_steps // NUM_EPOCHS + 1:
                raise KilledError

        settings = {"num_epochs": NUM_EPOCHS, "patience": 2, "validation_share": 0.3, "has_progress": False}
        try:
            report = learn_task(
                model, NOISE, on_step=on_step, checkpoint_folder=str(tmp_path / folder), **settings
            )
        except KilledError:
            return None
        record = model.store.task("noise")
        found = report.num_epochs, model.store.head(record)["weight"], record.metadata["num_epochs"]
        model.forget("noise")
        return found

    return learn


def checkpoints(folder):
    (own,) = folder.iterdir()
    return sorted(own.iterdir(), key=lambda path: int(path.name.split("-")[1]))


def test_what_was_interrupted_is_resumed_to_the_same_end(stopping, tmp_path):
    num_epochs, head, _ = stopping("whole")
    assert 2 < num_epochs < NUM_EPOCHS  # early stopping ended it
    for epoch in range(2, int(num_epochs) + 1):
        assert stopping(f"cut-{epoch}", epoch) is None
        again = stopping(f"cut-{epoch}")
        assert again[0] == num_epochs
        assert torch.equal(again[1], head)


def test_a_training_that_had_ended_is_not_continued(stopping, tmp_path, monkeypatch):
    whole = stopping("whole")
    with monkeypatch.context() as patched:
        patched.setattr("slm.learning.learner._commit", raise_killed)
        assert stopping("ended") is None
    again = stopping("ended")
    assert again[0] == again[2] == whole[0]
    assert torch.equal(again[1], whole[1])


def raise_killed(*_, **__):
    raise KilledError


def test_a_checkpoint_cut_short_is_passed_over(stopping, tmp_path):
    assert stopping("cut", 3) is None
    first, last = checkpoints(tmp_path / "cut")
    assert last_checkpoint(first.parent).path == last
    names = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for number, (name, is_missing) in enumerate(product(names, (True, False))):
        copy = shutil.copytree(first.parent, tmp_path / "copies" / str(number))
        cut = copy / last.name / name
        if is_missing:
            cut.unlink()
        else:
            cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        assert last_checkpoint(copy).path == copy / first.name
    (last / "trainer_state.json").unlink()
    (num_epochs, head, _), whole = stopping("cut"), stopping("whole")
    assert num_epochs == whole[0]
    assert torch.equal(head, whole[1])


def test_a_checkpoint_whose_best_weights_are_gone_is_passed_over(stopping, tmp_path):
    assert stopping("cut", 3) is None
    first, last = checkpoints(tmp_path / "cut")
    state = last / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": str(first)}))
    (first / "model.safetensors").unlink()
    assert last_checkpoint(first.parent) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
