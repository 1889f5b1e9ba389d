from __future__ import annotations

import pytest

from slm.errors import StoreError
from slm.store import Store
from slm.store.sums import Snapshots
from slm.store.tables import Tables


@pytest.fixture
def record(store, worker):
    worker.commit(store, "other", 1)
    return worker.commit(store, "first", 2, has_head=True)


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("statistics.safetensors", lambda store, record: store.keys(record)),
        ("head.safetensors", lambda store, record: store.head(record)),
        # PEFT reads it, slm finds rank and alpha in the tensors' file
        (
            CONFIG := "increment-1/adapter_config.json",
            lambda store, record: store._folders.read(record, CONFIG),
        ),
        ("increment-1/adapter_model.safetensors", lambda store, record: store.increment(record, 1)),
    ],
)
def test_an_altered_shortened_or_missing_file_is_told_by_name(store, record, path, read):
    file = store.path / record.folder / path
    data = file.read_bytes()
    remedy = "restore it from a copy or forget the task 'first'"
    for damage, said in [
        (data[:-1] + bytes([data[-1] ^ 1]), "has been altered (its sha256 is wrong)"),
        (data[:-1], "has been altered (its size is wrong)"),
        (None, "is missing"),
    ]:
        file.write_bytes(damage) if damage else file.unlink()
        with pytest.raises(StoreError) as caught:
            read(Store.open(store.path), record)
        assert str(caught.value) == f"{record.folder}/{path} {said}: {remedy}"
        assert store.check() == [str(caught.value)]
        assert store.repair() == []
    file.write_bytes(data)
    assert store.check() == []
    read(store, record)


def test_an_increment_that_is_not_there_is_told_with_those_that_are(store, record):
    for index in (2, -1):
        with pytest.raises(StoreError) as caught:
            store.increment(record, index)
        assert str(caught.value) == (
            f"increment index must be in 0..1 (increments of task 'first'), got {index}: choose one of them"
        )


def test_left_overs_are_found_and_repair_removes_them_and_nothing_else(
    store, record, worker, contents, tmp_path
):
    before = contents(store.path / "tasks")
    (store.path / "tasks" / ".tmp-1" / "increment-0").mkdir(parents=True)
    (store.path / "tasks" / "ghost-12345678").mkdir()
    (store.path / "tasks" / "file").touch()
    (tmp_path / "precious").mkdir()
    (store.path / "tasks" / "link").symlink_to(tmp_path / "precious")
    store._tables.add_keys("e" * 32, "ghost", worker.knowledge(3).keys)
    assert store.check() == [
        *(
            f"tasks/{name} belongs to no task, a write was cut short: repair removes it"
            for name in (".tmp-1", "file", "ghost-12345678", "link")
        ),
        f"3 keys of commit {'e' * 32} belong to no task, a write was cut short: repair removes them",
    ]
    assert [r.name for r in store.tasks()] == ["other", "first"]
    assert len(store.repair()) == 5
    assert store.check() == []
    assert contents(store.path / "tasks") == before
    assert (tmp_path / "precious").is_dir()
    assert [keys.num_keys for keys in store.all_keys(store.tasks())] == [3, 3]


def test_an_unlisted_file_in_a_tasks_folder_and_missing_keys_are_told(store, record):
    (store.path / record.folder / "note.txt").touch()
    store._tables.delete_keys([record.commit_id])
    assert store.check() == [
        f"{record.folder}/note.txt is not in the catalogue: nothing reads it, you may delete it",
        "keys of task 'first' are damaged (0 rows for 3 keys): restore the catalogue from a copy or "
        "forget the task",
    ]
    assert store.repair() == []


@pytest.mark.parametrize("owner", [(Tables, "erase_deleted"), (Snapshots, "derive")], ids=lambda o: o[1])
def test_repair_ends_a_forgetting_that_was_cut_short(store, record, monkeypatch, owner):
    def cut_short(*_):
        raise KeyboardInterrupt

    store.scatter_sum(store.tasks())
    (pooled,) = (store.path / "pooled").iterdir()
    mean = store.keys(record).means[0].numpy().tobytes()
    with monkeypatch.context() as patch:
        patch.setattr(*owner, cut_short)
        with pytest.raises(KeyboardInterrupt):
            store.forget("first")
    store = Store.open(store.path)
    is_left = f"pooled/{pooled.name} is no sum of the present tasks, a write was cut short: repair removes it"
    assert (is_left in store.check()) == pooled.exists() == (owner[1] == "derive")
    store.repair()
    assert store.check() == []
    assert not pooled.exists()
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert not [path for path in files if mean in path.read_bytes()]
    assert not [path for path in files if record.commit_id.encode() in path.read_bytes()]
    assert [keys.num_keys for keys in store.all_keys(store.tasks())] == [3]


def test_a_sum_written_after_its_task_was_forgotten_does_not_stay(store, record, monkeypatch):
    (pooled,) = (store.path / "pooled").iterdir()
    pooled.unlink()
    write = Snapshots.write

    def write_late(*arguments):
        monkeypatch.undo()
        Store.open(store.path).forget("first")
        write(*arguments)

    monkeypatch.setattr(Snapshots, "write", write_late)
    store.scatter_sum(store.tasks())
    assert not pooled.exists()
    assert store.check() == []
