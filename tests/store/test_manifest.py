from __future__ import annotations

import json

import pytest

from slm.errors import StoreError, TaskError
from slm.store import Manifest, Store
from slm.store.manifest import read_version, write_manifest
from slm.store.migrations import FORMAT_VERSION, MIGRATIONS, pending_steps
from slm.store.tables import Tables


def test_a_missing_folder_a_file_and_a_folder_that_is_no_store_are_told_apart(tmp_path):
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "nowhere")
    assert str(caught.value) == (
        f"no store at {tmp_path / 'nowhere'}: make one with slm init or correct the path"
    )
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is not a store (it has no store.json): give the folder of a store"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_creation_cut_short_is_told_but_never_of_a_folder_with_tasks(tmp_path, monkeypatch):
    def cut_short(*_):
        raise KeyboardInterrupt

    path, manifest = tmp_path / "store", Manifest("a/backbone", "f", {})
    monkeypatch.setattr("slm.store.catalogue.write_manifest", cut_short)
    with pytest.raises(KeyboardInterrupt):
        Store.create(path, manifest)
    for attempt in (lambda: Store.open(path), lambda: Store.create(path, manifest)):
        with pytest.raises(
            StoreError, match=r"creation was cut short, no task is in it\): delete the folder"
        ):
            attempt()
    (path / "tasks" / "precious").touch()
    with pytest.raises(StoreError, match=r"it has no store.json"):
        Store.open(path)
    with pytest.raises(StoreError, match=r"is not empty"):
        Store.create(path, manifest)


def test_a_store_of_a_newer_format_is_refused(store):
    file = store.path / "store.json"
    file.write_text(json.dumps({"format": FORMAT_VERSION + 1, "something": "else"}))
    with pytest.raises(StoreError) as caught:
        Store.open(store.path)
    assert str(caught.value) == (
        f"{store.path} has store format {FORMAT_VERSION + 1}, this slm reads up to {FORMAT_VERSION}: "
        "upgrade scalable-lm"
    )


@pytest.mark.parametrize("version", [0, -1])
def test_a_format_that_never_was_is_refused(store, version):
    (store.path / "store.json").write_text(json.dumps({"format": version}))
    with pytest.raises(
        StoreError, match=rf"has store format {version}, this slm reads 1\.\.{FORMAT_VERSION}"
    ):
        Store.open(store.path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": "1"}', '{"format": true}', '{"format": 1}', "[" * 100_000],
)
def test_a_damaged_manifest_is_told_in_one_line(store, text):
    (store.path / "store.json").write_text(text)
    with pytest.raises(StoreError) as caught:
        Store.open(store.path)
    assert str(caught.value) == (
        f"{store.path / 'store.json'} cannot be read as a store's manifest: restore it from a copy"
    )


def test_a_config_json_cannot_hold_makes_no_store(tmp_path):
    for value in (object(), float("nan")):
        with pytest.raises(StoreError, match=r"cannot be written as JSON .*: use plain, finite values"):
            Store.create(tmp_path / f"s{type(value).__name__}", Manifest("a/backbone", "f", {"x": value}))
    assert list(tmp_path.iterdir()) == []


def test_every_older_format_has_a_step_and_the_current_one_needs_none(store):
    assert sorted(MIGRATIONS) == list(range(1, FORMAT_VERSION))
    assert pending_steps(FORMAT_VERSION, store.path) == []


def test_a_store_of_the_first_format_is_opened_as_one_whose_queries_are_means(store):
    config = {"retrieval": {"top_k": 3}}
    write_manifest(store.path, Manifest("minilm", "0" * 64, config), 1)
    opened = Store.open(store.path)
    assert opened.manifest.config["retrieval"] == {
        "pooling": "mean",
        "top_k": 3,
        "temperature": 1.0,
        "has_background": False,
    }
    assert read_version(store.path) == FORMAT_VERSION


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"pooling": "ends", "temperature": 2.0}, {"pooling": "split-ends", "temperature": 2.0}),
        ({"pooling": "mean"}, {"pooling": "mean", "temperature": 1.0}),
        ({}, {"pooling": "split-ends", "temperature": 1.0}),
    ],
)
def test_a_store_of_the_second_format_keeps_its_queries_and_its_temperature(store, written, read):
    write_manifest(store.path, Manifest("minilm", "0" * 64, {"retrieval": written}), 2)
    expected = {**read, "has_background": False}
    assert Store.open(store.path).manifest.config["retrieval"] == expected
    assert read_version(store.path) == FORMAT_VERSION


def test_a_store_of_the_third_format_goes_on_without_a_background(store):
    written = {"pooling": "ends", "temperature": 8.0}
    write_manifest(store.path, Manifest("minilm", "0" * 64, {"retrieval": written}), 3)
    opened = Store.open(store.path)
    assert opened.manifest.config["retrieval"] == {**written, "has_background": False}
    assert opened.background is None
    assert opened.check() == []


@pytest.mark.parametrize("is_cut_short", [False, True])
def test_a_store_of_the_fourth_format_gets_digests_of_its_keys(store, worker, is_cut_short):
    for number, name in enumerate(("first", "second")):
        worker.commit(store, name, number)
    expected = store.tasks()
    store._tables._tasks.drop_columns(["keys_sha256"])
    write_manifest(store.path, store.manifest, 4)
    if is_cut_short:
        Tables(store.path / "catalogue").note_digests()
    opened = Store.open(store.path)
    assert read_version(store.path) == FORMAT_VERSION
    assert opened.tasks() == expected
    assert all(record.keys_sha256 for record in expected)
    assert opened.check() == []
    assert [keys.num_keys for keys in opened.all_keys(opened.tasks())] == [3, 3]
    worker.commit(opened, "third", 2)
    with pytest.raises(TaskError, match="already in"):
        worker.commit(opened, "first", 2)
    opened.forget("first")
    assert [record.name for record in Store.open(store.path).tasks()] == ["second", "third"]
