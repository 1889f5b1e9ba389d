from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
from datetime import datetime
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import slm.store.catalogue
import slm.store.lock
import slm.store.tables
from slm.errors import StoreError, TaskError
from slm.store import FileRecord, Manifest, Store
from slm.store.migrations import FORMAT_VERSION
from slm.store.tables import Tables


def _same(found, expected):
    return all(
        torch.equal(getattr(found, n), getattr(expected, n))
        for n in ("means", "counts", "scatter", "increments")
    )


def altered(keys, **change):
    """A copy with other fields, past the tests' shape checks: what a careless caller could build."""
    copy = object.__new__(type(keys))
    for field in dataclasses.fields(keys):
        object.__setattr__(copy, field.name, change.get(field.name, getattr(keys, field.name)))
    return copy


def test_what_is_committed_comes_back_bit_for_bit_after_reopening(store, worker):
    worker.commit(store, "first", 1, has_head=True)
    worker.commit(store, "second", 2)
    again, wanted = Store.open(store.path), worker.knowledge(1, has_head=True)
    record = again.task("first")
    assert _same(again.keys(record), wanted.keys)
    assert again.keys(record).radius == wanted.keys.radius
    for index, increment in enumerate(wanted.increments):
        found = again.increment(record, index)
        assert (found.rank, found.alpha) == (increment.rank, increment.alpha)
        assert all(
            torch.equal(found.pairs[n].A, p.A) and torch.equal(found.pairs[n].B, p.B)
            for n, p in increment.pairs.items()
        )
    assert {n: t.tolist() for n, t in again.head(record).items()} == {
        n: t.tolist() for n, t in wanted.head.items()
    }
    assert again.head(again.task("second")) is None
    assert again.manifest == store.manifest


def test_a_record_tells_what_was_learned(store, worker):
    made = worker.commit(store, "first", 1)
    (record,) = store.tasks()
    assert record == made
    assert (record.name, record.kind, record.labels, record.num_examples) == (
        "first",
        "classify",
        ("no", "yes"),
        10,
    )
    assert (record.num_keys, record.num_increments, record.has_head) == (3, 2, False)
    assert record.metadata == {"seed": 1}
    assert record.folder == f"tasks/first-{record.commit_id[:8]}"
    assert datetime.fromisoformat(record.created).utcoffset().total_seconds() == 0
    folder = store.path / record.folder
    assert store.size_bytes(record) == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_tasks_come_in_the_order_they_were_learned_whatever_their_names(store, worker):
    for seed, name in enumerate(["zebra", "ant", "mole"]):
        worker.commit(store, name, seed)
    store.forget("ant")
    worker.commit(store, "ant", 5)
    assert [record.name for record in store.tasks()] == ["zebra", "mole", "ant"]
    assert [keys.radius for keys in store.all_keys(store.tasks())] == [1.5, 3.5, 6.5]


def test_an_infinite_radius_and_no_labels_come_back(store, worker):
    knowledge = worker.knowledge(1)
    knowledge = dataclasses.replace(knowledge, keys=dataclasses.replace(knowledge.keys, radius=math.inf))
    record = store.commit("t", "generate", [], 0, knowledge)
    assert store.tasks()[0].labels == ()
    assert store.keys(record).radius == math.inf


def test_learning_and_forgetting_leave_every_older_file_as_it_was(store, worker, contents):
    worker.commit(store, "first", 1, has_head=True)
    worker.commit(store, "second", 2)
    before = contents(store.path / "tasks")
    worker.commit(store, "third", 3)
    after = contents(store.path / "tasks")
    assert {name: after[name] for name in before} == before
    store.forget("third")
    assert contents(store.path / "tasks") == before
    assert store.check() == []


def test_a_taken_name_is_refused_and_nothing_is_left_of_the_attempt(store, worker, contents):
    worker.commit(store, "first", 1)
    before = contents(store.path / "tasks")
    with pytest.raises(TaskError) as caught:
        worker.commit(store, "first", 2)
    assert (
        str(caught.value)
        == f"task 'first' is already in {store.path}: forget it first or choose another name"
    )
    assert contents(store.path / "tasks") == before
    assert store.check() == []


def test_even_without_a_lock_the_second_of_two_writers_loses_and_cleans_up(store, worker, monkeypatch):
    monkeypatch.setattr(slm.store.catalogue, "writing", lambda path: contextlib.nullcontext())
    add_keys, rivals = Tables.add_keys, [Store.open(store.path)]

    def overtaken(tables, *arguments):
        digest = add_keys(tables, *arguments)
        if rivals:
            worker.commit(rivals.pop(), "same", 2)
        return digest

    monkeypatch.setattr(Tables, "add_keys", overtaken)
    with pytest.raises(TaskError, match="task 'same' is already in"):
        worker.commit(store, "same", 1)
    assert [record.metadata for record in store.tasks()] == [{"seed": 2}]
    assert store.check() == []


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "a/b", "a\\b", "a b", "-x", "a\n", "x" * 101, "é", "a'b"]
)
def test_a_name_that_is_no_safe_folder_name_is_refused(store, worker, name):
    with pytest.raises(TaskError) as caught:
        worker.commit(store, name, 1)
    assert str(caught.value) == (
        f"task name {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' or '-', "
        "beginning with a letter or digit"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"means": torch.ones(3, 6)},
            "means must be (3, 6) torch.float64, got (3, 6) torch.float32: convert it first",
        ),
        (
            {"means": torch.full((3, 6), torch.nan).double()},
            "means holds NaN or infinity: learn the task again",
        ),
        ({"means": torch.zeros(0, 6).double()}, "means must be (N, C) with N at least 1, got (0, 6)"),
        ({"counts": torch.ones(2).long()}, "counts must be (3,) torch.int64, got (2,) torch.int64"),
        ({"counts": torch.tensor([1, -1, 1])}, "counts must not be negative, got -1"),
        ({"scatter": torch.ones(20)}, "scatter must be (21,) torch.float32, got (20,)"),
        ({"scatter": torch.full((21,), torch.inf)}, "scatter holds NaN or infinity"),
        ({"increments": torch.tensor([0, 1, 2])}, "keys must name increments 0..1, got [0, 1, 2]"),
        ({"radius": math.nan}, "radius must be 0 or more, got nan"),
    ],
)
def test_keys_that_could_not_be_used_again_are_refused_before_anything_is_written(
    store, worker, change, said
):
    knowledge = worker.knowledge(1)
    knowledge = dataclasses.replace(knowledge, keys=altered(knowledge.keys, **change))
    with pytest.raises(StoreError) as caught:
        store.commit("t", "classify", [], 1, knowledge)
    assert str(caught.value).startswith("knowledge of the task cannot be stored: ")
    assert said in str(caught.value)
    assert store.tasks() == []
    assert store.check() == []


@pytest.mark.parametrize("name", ["means", "scales", "radius"])
def test_keys_that_are_no_numbers_are_told_by_their_task(store, worker, name):
    good = worker.knowledge(1).keys
    bad = torch.full_like(getattr(good, name), torch.nan) if name != "radius" else -1.0
    record = worker.commit(store, "t", 1)
    store._tables.delete_keys([record.commit_id])
    store._tables.add_keys(record.commit_id, "t", dataclasses.replace(good, **{name: bad}))
    with pytest.raises(
        StoreError, match=r"keys of task 't' are damaged \(they hold NaN or infinity\): restore"
    ):
        store.all_keys([record], has_scatter=False)


def test_keys_that_are_not_what_was_written_are_told_by_their_task(store, worker):
    worker.commit(store, "s", 2)
    record = worker.commit(store, "t", 1)
    keys = store.keys(record)
    altered = keys.means.clone()
    altered[1, 2] = torch.nextafter(altered[1, 2], torch.tensor(9.0, dtype=torch.float64))
    store._tables.delete_keys([record.commit_id])
    store._tables.add_keys(record.commit_id, "t", dataclasses.replace(keys, means=altered))
    said = (
        "keys of task 't' are damaged (they are not what was written): "
        "restore the catalogue from a copy or forget the task"
    )
    with pytest.raises(StoreError) as caught:
        store.keys(record)
    assert str(caught.value) == said
    assert store.check() == [said]
    store._tables._keys.update(where=f"commit_id = '{record.commit_id}'", values_sql={"count": "NULL"})
    with pytest.raises(StoreError, match=r"keys of task 't' are damaged \(numbers are missing\)"):
        store.keys(record)
    store.forget("t")
    assert store.check() == []
    assert [keys.num_keys for keys in store.all_keys(store.tasks())] == [3]


def test_a_head_metadata_labels_or_counts_that_cannot_be_stored_are_refused(store, worker):
    good = worker.knowledge(1)
    bad_head = dataclasses.replace(good, head={"weight": torch.tensor([torch.nan])})
    with pytest.raises(StoreError, match="head 'weight' holds NaN or infinity"):
        store.commit("t", "classify", [], 1, bad_head)
    with pytest.raises(StoreError, match="it has no increment; give at least one"):
        store.commit("t", "classify", [], 1, dataclasses.replace(good, increments=()))
    with pytest.raises(StoreError, match="metadata of task 't' cannot be written as JSON"):
        store.commit("t", "classify", [], 1, good, {"when": datetime.now()})
    for kind, labels, num_examples in [
        ("k", "label", 1),
        ("k", [1], 1),
        ("k", ["\ud800"], 1),
        (None, [], 1),
        ("k", [], -1),
    ]:
        with pytest.raises(StoreError, match="kind is a text, labels are a list of texts"):
            store.commit("t", kind, labels, num_examples, good)
    assert store.check() == []


def test_keys_with_other_channels_than_the_stores_are_refused(store, worker, monkeypatch):
    worker.commit(store, "first", 1)
    monkeypatch.setattr(worker, "CHANNELS", 7)
    with pytest.raises(StoreError) as caught:
        worker.commit(store, "second", 2)
    assert str(caught.value) == (
        f"keys must have 6 channels like those in {store.path}, got 7: "
        "use the extractor the store was made with"
    )


def test_the_version_changes_with_every_commit_and_every_forgetting_seen_from_anywhere(store, worker):
    other, versions = Store.open(store.path), [store.version]
    for seed in range(3):
        worker.commit(store, f"t{seed}", seed)
        versions.append(other.version)
    store.forget("t1")
    versions.append(other.version)
    assert versions == sorted(set(versions))
    assert other.version == versions[-1]


def test_keys_without_scatters_read_no_file(store, worker):
    record = worker.commit(store, "first", 1)
    (store.path / record.folder / "statistics.safetensors").unlink()
    (keys,) = Store.open(store.path).all_keys([record], has_scatter=False)
    assert torch.equal(keys.means, worker.knowledge(1).keys.means)
    assert keys.scatter.shape == (0,)


def test_the_scatter_sum_is_that_of_the_tasks_asked_for(store, worker):
    records = [worker.commit(store, f"t{seed}", seed) for seed in range(5)]
    scatters = [worker.knowledge(seed).keys.scatter.tolist() for seed in range(5)]
    assert store.scatter_sum(records).tolist() == [
        math.fsum(column) for column in zip(*scatters, strict=True)
    ]
    assert store.scatter_sum(records[3:1:-1]).tolist() == [
        a + b for a, b in zip(scatters[2], scatters[3], strict=True)
    ]
    assert store.scatter_sum([]).shape == (0,)
    assert store.scatter_sum(records).dtype == torch.float64


def test_forgetting_gives_back_the_scatter_sum_bit_for_bit(store, worker):
    sums = []
    for seed in range(6):
        worker.commit(store, f"t{seed}", seed)
        sums.append(store.scatter_sum(store.tasks()))
    for seed in range(5, 0, -1):
        store.forget(f"t{seed}")
        assert torch.equal(store.scatter_sum(store.tasks()), sums[seed - 1])


def test_a_damaged_or_missing_snapshot_changes_no_sum_and_is_made_anew(store, worker):
    for seed in range(3):
        worker.commit(store, f"t{seed}", seed)
    expected = store.scatter_sum(store.tasks())
    (snapshot,) = (store.path / "pooled").iterdir()
    snapshot.write_bytes(snapshot.read_bytes()[:-1] + b"\x7f")
    assert torch.equal(store.scatter_sum(store.tasks()), expected)
    snapshot.unlink()
    assert torch.equal(store.scatter_sum(store.tasks()), expected)
    assert snapshot.exists()


def test_a_commit_reads_no_other_tasks_files(store, worker):
    for seed in range(3):
        record = worker.commit(store, f"t{seed}", seed)
        (store.path / record.folder / "statistics.safetensors").unlink()
    expected = sum(worker.knowledge(seed).keys.scatter.double() for seed in range(3))
    torch.testing.assert_close(store.scatter_sum(store.tasks()), expected, rtol=1e-15, atol=0)


def test_forgetting_an_unknown_name_names_the_nearest(store, worker):
    worker.commit(store, "news-topics", 1)
    with pytest.raises(TaskError) as caught:
        store.forget("news-topic")
    assert (
        str(caught.value)
        == f"no task 'news-topic' among the 1 tasks of {store.path}: did you mean news-topics?"
    )
    with pytest.raises(TaskError, match=rf"slm tasks {store.path} lists them$"):
        store.forget("q")


def test_what_is_forgotten_can_be_read_nowhere_on_the_disk(store, worker):
    secret = "a-secret-label"
    for seed in range(30):  # many, so that deleted rows would stay inside a joined file
        worker.commit(store, f"t{seed}", seed)
    store.commit("told", "classify", [secret], 1, worker.knowledge(99))
    for seed in range(30, 40):
        worker.commit(store, f"t{seed}", seed)
    mean = worker.knowledge(99).keys.means[0].numpy().tobytes()
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert any(secret.encode() in path.read_bytes() for path in files)
    assert any(mean[:8] in path.read_bytes() for path in files)
    store.forget("told")
    for path in store.path.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert secret.encode() not in data
        assert mean[:8] not in data
    assert len(store.tasks()) == 40
    assert store.check() == []
    with pytest.raises(TaskError, match="task 't3' is already in"):  # the table's key survived
        worker.commit(store, "t3", 1)


def test_a_damaged_task_can_be_forgotten(store, worker):
    worker.commit(store, "first", 1)
    record = worker.commit(store, "second", 2)
    (store.path / record.folder / "statistics.safetensors").write_bytes(b"")
    store.forget("second")
    assert torch.equal(store.scatter_sum(store.tasks()), worker.knowledge(1).keys.scatter.double())


def test_a_row_that_leads_out_of_the_store_is_forgotten_without_touching_what_it_leads_to(
    store, worker, tmp_path
):
    (tmp_path / "precious").mkdir()
    record = worker.commit(store, "first", 1)
    odd = dataclasses.replace(record, name="odd", commit_id="f" * 32, folder="../precious", sequence=2)
    store._tables.insert(odd)
    assert any("is not its own place in the store" in problem for problem in store.check())
    store.forget("odd")
    assert (tmp_path / "precious").is_dir()
    assert [r.name for r in store.tasks()] == ["first"]


def test_an_interrupted_forgetting_of_a_name_does_not_hinder_learning_it_again(store, worker, monkeypatch):
    worker.commit(store, "first", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Tables, "delete_keys", lambda *arguments: (_ for _ in ()).throw(StoreError("struck")))
        with pytest.raises(StoreError, match="struck"):
            store.forget("first")
    record = worker.commit(store, "first", 2)
    assert _same(store.keys(record), worker.knowledge(2).keys)


def test_a_missing_key_row_is_noticed(store, worker):
    record = worker.commit(store, "first", 1)
    store._tables._keys.delete("index = 1")
    with pytest.raises(StoreError) as caught:
        store.keys(record)
    assert str(caught.value) == (
        "keys of task 'first' are damaged (2 rows for 3 keys): "
        "restore the catalogue from a copy or forget the task"
    )


def test_a_store_is_made_only_in_a_new_or_empty_folder(tmp_path):
    manifest = Manifest("a/backbone", "f", {})
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(StoreError) as caught:
        Store.create(tmp_path / "used", manifest)
    assert str(caught.value) == (
        f"{tmp_path / 'used'} is not empty: open it if it is a store, or choose another folder"
    )
    with pytest.raises(
        StoreError, match=r"no store can be made at .*file \(Not a directory\): choose another folder"
    ):
        Store.create(tmp_path / "used" / "file", manifest)
    (tmp_path / "empty").mkdir()
    assert Store.create(tmp_path / "empty", manifest).tasks() == []


def test_a_folder_with_an_odd_name_will_do(tmp_path, worker):
    store = Store.create(str(tmp_path / "a store, 100 % #é?"), Manifest("a/backbone", "f", {}))
    worker.commit(store, "first", 1)
    assert Store.open(str(store.path)).check() == []
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]


def test_a_writer_that_waits_too_long_says_for_whom(store, worker, monkeypatch):
    monkeypatch.setattr(slm.store.lock, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(store.path / "writer.lock"), pytest.raises(StoreError) as caught:
        worker.commit(store, "first", 1)
    assert str(caught.value) == (
        f"{store.path} has been locked by another writer for 0.1 s: let it finish or stop it"
    )


@pytest.mark.parametrize("table", ["tasks", "keys"])
def test_a_catalogue_without_a_table_is_refused(store, table):
    (store.path / "catalogue" / f"{table}.lance").rename(store.path / "away")
    with pytest.raises(StoreError) as caught:
        Store.open(store.path)
    assert str(caught.value) == (
        f"{store.path / 'catalogue'} has no table {table!r}: restore the folder from a copy"
    )


def test_a_damaged_catalogue_is_told_in_one_line(store, worker):
    worker.commit(store, "first", 1)
    for path in (store.path / "catalogue" / "tasks.lance" / "data").iterdir():
        path.write_bytes(b"rubbish")
    with pytest.raises(StoreError) as caught:
        Store.open(store.path).tasks()
    assert "catalogue cannot be read (" in str(caught.value)
    assert str(caught.value).endswith("): restore it from a copy")
    assert "\n" not in str(caught.value)


def test_a_listed_file_elsewhere_is_never_read(store, worker, tmp_path):
    record = worker.commit(store, "first", 1)
    (tmp_path / "secret").write_bytes(b"secret")
    (store.path / record.folder / "link").symlink_to(tmp_path / "secret")
    for path in ["../../../secret", str(tmp_path / "secret"), "link", "a\\b", "c:b", "../first/../../x"]:
        odd = dataclasses.replace(record, files=(FileRecord(path, "0" * 64, 6),))
        with pytest.raises(StoreError, match="which is not its own place in the store"):
            store._folders.read(odd, path)


def test_the_manifest_on_disk_is_plain_json(store):
    found = json.loads((store.path / "store.json").read_text())
    assert found == {
        "format": FORMAT_VERSION,
        "backbone_source": "a/backbone",
        "backbone_fingerprint": "fingerprint-1",
        "config": {"rank": 2, "targets": ["q_proj"]},
        "created": store.manifest.created,
        "background_sha256": None,
    }


def test_keys_that_need_no_scatter_are_stored_summed_and_forgotten_like_others(store, worker):
    for seed in range(2):
        knowledge = worker.knowledge(seed)
        keys = dataclasses.replace(knowledge.keys, scatter=torch.zeros(0))
        store.commit(f"t{seed}", "classify", [], 1, dataclasses.replace(knowledge, keys=keys))
    again = Store.open(store.path)
    assert again.keys(again.task("t1")).scatter.shape == (0,)
    assert torch.equal(again.keys(again.task("t1")).means, worker.knowledge(1).keys.means)
    assert again.scatter_sum(again.tasks()).shape == (0,)
    again.forget("t0")
    assert again.scatter_sum(again.tasks()).shape == (0,)
    assert again.check() == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nothing tells which file a descriptor is of")
def test_a_commit_waits_for_table_files_of_a_process_that_was_killed_before_it_did(
    store, worker, monkeypatch
):
    worker.commit(store, "first", 1)
    data = store.path / "catalogue"
    before = _table_files(data)
    with monkeypatch.context() as patch:
        patch.setattr(slm.store.tables, "_sync_new", lambda _folder, known: known)  # killed right before
        worker.commit(Store.open(store.path), "second", 2)
    left = _table_files(data) - before
    assert left

    synced, sync = set(), os.fsync

    def note(descriptor: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    worker.commit(store, "third", 3)
    assert left <= synced
    assert _table_files(data) - before <= synced
    synced.clear()
    worker.commit(store, "fourth", 1)
    assert not left & synced  # once is enough


def _table_files(folder):
    return {str(p.resolve()) for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"}


@pytest.fixture
def interrupts():
    """Interrupts as a terminal's process gets them; a shell may have the tests ignore them."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def interrupt_before(monkeypatch, owner, name):
    """Have Ctrl-C pressed just before a method is called."""
    method = getattr(owner, name)

    def pressed(*arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return method(*arguments, **settings)

    monkeypatch.setattr(owner, name, pressed)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("step", ["add_keys", "insert"])
def test_an_interrupt_waits_until_a_task_is_stored(store, worker, monkeypatch, step):
    interrupt_before(monkeypatch, Tables, step)
    with pytest.raises(KeyboardInterrupt):
        worker.commit(store, "first", 1)
    assert [record.name for record in store.tasks()] == ["first"]
    assert store.check() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("step", ["delete_task", "delete_keys", "erase_deleted"])
def test_an_interrupt_waits_until_a_task_is_forgotten(store, worker, monkeypatch, step):
    worker.commit(store, "first", 1)
    interrupt_before(monkeypatch, Tables, step)
    with pytest.raises(KeyboardInterrupt):
        store.forget("first")
    assert store.tasks() == []
    assert store.check() == []


@pytest.mark.usefixtures("interrupts")
def test_other_threads_store_tasks_as_ever(store, worker):
    thread = threading.Thread(target=worker.commit, args=(store, "first", 1))
    thread.start()
    thread.join()
    assert [record.name for record in store.tasks()] == ["first"]


def test_a_damaged_catalogue_names_no_place_in_the_sources_of_lancedb(store, worker):
    worker.commit(store, "first", 1)
    for file in (store.path / "catalogue" / "tasks.lance" / "data").iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(
        StoreError, match=r"catalogue cannot be read \(.+\): restore it from a copy$"
    ) as caught:
        Store.open(store.path).tasks()
    assert ".rs" not in str(caught.value)
