"""A task that another process forgets in the middle of a request is as if it had never been taught."""

from __future__ import annotations

import shutil

import pytest

from slm.errors import StoreError, TaskError
from slm.model import ScalableLM
from slm.serving.engine import Engine
from slm.serving.settings import ServingSettings
from slm.serving.work import Failed
from slm.store import Store
from tests.backbone.families import load, save
from tests.serving.stores import COOK, GOOD, make_store
from tests.serving.test_engine import Caller


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A backbone, and a store of four tasks."""
    home = tmp_path_factory.mktemp("made")
    backbone = load(save("LLaMA", home / "model"))
    return backbone, make_store(home / "store", backbone).store.path


@pytest.fixture
def opened(made, tmp_path, monkeypatch):
    """Opens the store so that "cooking" is forgotten as soon as something of a task is read."""
    backbone, source = made
    shutil.copytree(source, tmp_path / "store")

    def prepare(what: str) -> ScalableLM:
        model = ScalableLM.open(tmp_path / "store", backbone)
        read = getattr(Store, what)

        def forget_first(store, *args, **options):
            if any(record.name == "cooking" for record in store.tasks()):
                Store.open(store.path).forget("cooking")
            return read(store, *args, **options)

        monkeypatch.setattr(Store, what, forget_first)
        return model

    return prepare


@pytest.fixture
def without(made, tmp_path):
    backbone, source = made
    shutil.copytree(source, tmp_path / "without")
    model = ScalableLM.open(tmp_path / "without", backbone)
    model.forget("cooking")
    return model


def test_ask_answers_from_what_is_left(opened, without):
    model = opened("increment")
    assert model.ask([COOK, GOOD], max_new_tokens=5) == without.ask([COOK, GOOD], max_new_tokens=5)
    assert "cooking" not in [record.name for record in model.tasks]


def test_a_snapshot_is_taken_of_what_is_left(opened, without):
    model = opened("all_keys")
    model.reader._keys.clear()
    model._current.held = model.reader.read([], -1)
    assert [record.name for record in model.tasks] == [record.name for record in without.tasks]


def test_a_server_answers_from_what_is_left(opened, without):
    engine = Engine(opened("increment"), ServingSettings())
    engine.start()
    try:
        decided, texts, _ = Caller.hear(Caller(engine).ask(COOK, max_tokens=5)[1])
    finally:
        engine.drain(10)
    expected = without.ask(COOK, max_new_tokens=5)[0]
    assert texts[0] == expected.text
    assert dict(decided.mixture) == dict(expected.tasks)


def test_a_model_of_that_task_alone_says_that_it_is_gone(opened):
    oracle = opened("increment").restricted(["cooking"], is_abstaining=False)
    with pytest.raises(StoreError, match="missing"):
        oracle.ask(COOK, max_new_tokens=5)


def test_a_file_that_is_missing_with_nothing_forgotten_is_an_error(made, tmp_path):
    backbone, source = made
    shutil.copytree(source, tmp_path / "store")
    for file in (tmp_path / "store").rglob("adapter_model.safetensors"):
        file.unlink()
    with pytest.raises(StoreError, match="missing"):
        ScalableLM.open(tmp_path / "store", backbone).ask(COOK, max_new_tokens=5)


def test_a_store_that_is_gone_fails_the_request_at_once_and_no_other(made, tmp_path):
    backbone, source = made
    shutil.copytree(source, tmp_path / "store")
    model = ScalableLM.open(tmp_path / "store", backbone)
    engine = Engine(model, ServingSettings(deadline_s=60))
    shutil.rmtree(tmp_path / "store")
    caller = Caller(engine)
    routed = [caller.ask(text, max_tokens=5)[1] for text in (COOK, GOOD)]
    frozen = caller.ask("hello", model="tiny", max_tokens=5)[1]
    engine.start()
    try:
        for events in routed:
            failed = events.get(timeout=20)
            assert isinstance(failed, Failed)
            assert failed.refusal.code == "store_unavailable"
        assert caller.hear(frozen)[2][0].num_tokens >= 1
    finally:
        engine.drain(10)


def test_a_task_that_is_gone_before_its_keys_are_read_is_unknown(opened):
    model = opened("all_keys")
    model.reader._keys.clear()
    with pytest.raises(TaskError, match="no task 'cooking' among the 3 tasks of"):
        model.restricted(["cooking", "sums"])
    assert [record.name for record in model.restricted(["sums"]).tasks] == ["sums"]


def test_a_restricted_model_reads_the_catalogue_once_and_takes_one_name(made, tmp_path, monkeypatch):
    backbone, source = made
    model, reads, tasks = ScalableLM.open(source, backbone), [], Store.tasks
    monkeypatch.setattr(Store, "tasks", lambda store: reads.append(1) or tasks(store))
    names, counts = [record.name for record in model.tasks], []
    for some in (names[:1], names[2::-1]):
        reads.clear()
        assert [record.name for record in model.restricted(some).tasks] == some
        counts.append(len(reads))
    assert counts[0] == counts[1]
    assert [record.name for record in model.restricted("moods").tasks] == ["moods"]
    with pytest.raises(TaskError, match=r"no task 'mood' among the 4 tasks .*: did you mean moods"):
        model.restricted("mood")
