from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from slm.store import Manifest, Store

COMMIT_STEPS = [
    "before any file",
    "between two files",
    "before the folder is in place",
    "before the keys",
    "before the commit",
    "after the commit",
    "before the snapshot",
]
FORGET_STEPS = [
    "before the task is forgotten",
    "after the task is forgotten",
    "before its files are removed",
    "before its rows are erased",
]


def _wait_for(file: Path, process) -> None:
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_reader_in_another_process_follows_every_commit(store, worker, start, tmp_path):
    worker.commit(store, "task-0", 0)
    reader = start("read-until", store.path, tmp_path / "stop")
    _wait_for(tmp_path / "reading", reader)
    for seed in range(1, 40):  # across a compaction
        worker.commit(store, f"task-{seed}", seed)
    (tmp_path / "stop").touch()
    output, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0, errors
    num_reads, num_seen = map(int, output.split())
    assert num_seen == 40
    assert num_reads > 2


def test_an_open_store_sees_what_another_process_commits_and_its_version_changes(store, worker, start):
    version = store.version
    process = start("commit", store.path, "far", 3)
    assert process.communicate(timeout=60) == ("", "")
    assert [record.name for record in store.tasks()] == ["far"]
    assert store.version > version
    assert store.increment(store.task("far"), 1).rank == 2


def test_of_two_processes_racing_for_a_name_one_wins_and_the_other_leaves_nothing(
    store, worker, start, tmp_path
):
    racers = [start("race", store.path, "same", seed, tmp_path / "go") for seed in (1, 2)]
    for seed, racer in enumerate(racers, start=1):
        _wait_for(tmp_path / f"ready-{seed}", racer)
    (tmp_path / "go").touch()
    outputs = sorted(racer.communicate(timeout=60) for racer in racers)
    message = f"TaskError: task 'same' is already in {store.path}: forget it first or choose another name\n"
    assert outputs == [("", ""), (message, "")]
    assert [record.name for record in store.tasks()] == ["same"]
    assert store.check() == []


@pytest.mark.parametrize("step", COMMIT_STEPS)
def test_a_writer_killed_while_committing_loses_and_half_writes_nothing(step, store, worker, start, contents):
    worker.commit(store, "old", 1)
    before, rows = contents(store.path / "tasks"), store.tasks()
    process = start("die", store.path, step, "new", 2)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    after = contents(store.path / "tasks")
    assert {name: after[name] for name in before} == before
    is_committed = step in ("after the commit", "before the snapshot")
    reopened = Store.open(store.path)
    assert [record.name for record in reopened.tasks()] == ["old", "new"][: 2 if is_committed else 1]
    assert reopened.tasks()[:1] == rows
    assert torch.equal(reopened.keys(rows[0]).means, worker.knowledge(1).keys.means)
    assert len(reopened.check()) == {"before any file": 0, "before the commit": 2}.get(step, 1)
    reopened.repair()
    assert reopened.check() == []
    if not is_committed:
        worker.commit(reopened, "new", 2)
    expected = sum(worker.knowledge(seed).keys.scatter.double() for seed in (1, 2))
    assert torch.equal(reopened.scatter_sum(reopened.tasks()), expected)


@pytest.mark.parametrize("step", FORGET_STEPS)
def test_a_writer_killed_while_forgetting_leaves_the_task_whole_or_gone(step, store, worker, start, contents):
    worker.commit(store, "old", 1)
    before = contents(store.path / "tasks")
    worker.commit(store, "gone", 2)
    process = start("die-forgetting", store.path, step, "gone")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    names = [record.name for record in store.tasks()]
    assert names == (["old", "gone"] if step == "before the task is forgotten" else ["old"])
    store.repair()
    assert store.check() == []
    if len(names) == 2:
        store.forget("gone")
    assert contents(store.path / "tasks") == before
    assert torch.equal(store.scatter_sum(store.tasks()), worker.knowledge(1).keys.scatter.double())


def test_a_store_without_write_permission_opens_and_answers(worker, start):
    place = Path(tempfile.mkdtemp())  # not below tmp_path, which other users may not enter
    try:
        store = Store.create(place / "knowledge", Manifest("a/backbone", "f", {}))
        worker.commit(store, "one", 1)
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        other = {"WORKER_USER": "65534"} if os.geteuid() == 0 else {}
        assert start("look", store.path, **other).communicate(timeout=60) == ("['one'] [] 3\n", "")
        output, errors = start("commit", store.path, "two", 2, **other).communicate(timeout=60)
        assert errors == ""
        assert output == (
            f"StoreError: {store.path} cannot be written (Permission denied): "
            "see that the disk is neither full nor read-only\n"
        )
    finally:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(place)
