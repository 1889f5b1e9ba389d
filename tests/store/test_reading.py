"""What asking for one of many stored increments costs: one file, and no more memory than the budget."""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import slm.store.folders
import slm.store.values
from slm.errors import StoreError
from slm.increments.increment import Increment, LowRankPair
from slm.increments.pool import IncrementPool
from slm.retrieval.keys import TaskKeys
from slm.store import TaskKnowledge
from slm.store.folders import TaskFolders
from slm.store.records import describe_task
from slm.store.values import ADAPTER_MODEL, tensors_to_bytes

NUM_TASKS = 400
WIDTH = 4096  # two tensors of 8 x 4096 float32: 256 KiB an increment


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of many tasks as the store writes them, without waiting for the disk."""
    root = tmp_path_factory.mktemp("many")
    (root / "tasks").mkdir()
    folders, records = TaskFolders(root), []
    keys = TaskKeys(
        torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.long), torch.ones(3), radius=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        for number in range(NUM_TASKS):
            pair = LowRankPair(torch.full((8, WIDTH), float(number)), torch.ones(WIDTH, 8))
            knowledge = TaskKnowledge(keys, (Increment({"layer": pair}, 8, 16.0),))
            record = describe_task(f"task-{number}", "generation", (), 1, knowledge, {})
            records.append(dataclasses.replace(record, files=folders.write(record, knowledge, "b")))
    return root, records


@pytest.fixture
def opened(stored, monkeypatch):
    """Every file below the store that is opened, by Python or by safetensors, in order."""
    root, _ = stored
    found: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if found_here and event == "open" and str(arguments[0]).startswith(str(root)):
            found.append(str(Path(str(arguments[0])).relative_to(root)))

    found_here = [True]
    sys.addaudithook(note)
    original = slm.store.values.safe_open

    def counted(file: str, **options: object) -> object:
        found.append(str(Path(file).relative_to(root)))
        return original(file, **options)

    monkeypatch.setattr(slm.store.values, "safe_open", counted)
    yield found
    found_here.clear()  # an audit hook stays for ever


def test_asking_for_one_of_many_tasks_reads_its_one_file(stored, opened):
    root, records = stored
    folders, file = TaskFolders(root), f"{records[77].folder}/increment-0/{ADAPTER_MODEL}"
    increment = folders.increment(records[77], 0)
    assert (increment.rank, increment.scale, float(increment.pairs["layer"].A[0, 0])) == (8, 2.0, 77.0)
    assert opened == [file, file]  # its digest, then its values, both through memory maps
    del opened[:]
    folders.increment(records[77], 0)
    assert opened == [file]


def test_the_pool_asks_the_disk_only_for_what_it_does_not_hold(stored, opened):
    root, records = stored
    folders, pool = TaskFolders(root), IncrementPool(20 * 2 * 8 * WIDTH * 4)
    for number in [*range(30), *range(29, 9, -1), 0]:
        pool.get({number: partial(folders.increment, records[number], 0)})
    assert len({*opened}) == 30
    assert len(opened) == 2 * 30 + 1  # only task 0 was read again, with its digest known


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_resident_memory_stays_within_the_budget_and_a_fixed_overhead(stored):
    root, records = stored
    budget, size = 16 << 20, 2 * 8 * WIDTH * 4
    folders, pool = TaskFolders(root), IncrementPool(budget)
    pool.get({0: partial(folders.increment, records[0], 0)})
    gc.collect()
    before, most = resident_bytes(), 0
    for number, record in enumerate(records):
        (found,) = pool.get({number: partial(folders.increment, record, 0)})
        assert float(found.pairs["layer"].A[0, 0]) == number
        assert pool.size_bytes <= budget
        most = max(most, resident_bytes() - before)
    assert NUM_TASKS * size > 6 * budget
    assert budget - 2 * size < pool.size_bytes
    assert most < budget + (16 << 20)


def test_values_are_copied_out_so_that_the_file_may_go(stored, tmp_path):
    root, records = stored
    increment = TaskFolders(root).increment(records[5], 0)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(root) not in mapped.read_text()
    assert increment.pairs["layer"].A.untyped_storage().nbytes() == 8 * WIDTH * 4


def test_a_file_exchanged_between_check_and_read_is_refused(stored, monkeypatch):
    root, records = stored
    folders, record = TaskFolders(root), records[9]
    file = root / record.folder / "increment-0" / ADAPTER_MODEL
    good, original = file.read_bytes(), slm.store.folders.load_increment

    def swapped(place: Path, *arguments: object) -> Increment:
        other = place.with_name("other")
        other.write_bytes(good[:-4] + torch.tensor([6.0]).numpy().tobytes())
        other.replace(place)
        return original(place, *arguments)

    monkeypatch.setattr(slm.store.folders, "load_increment", swapped)
    with pytest.raises(StoreError, match=r"was exchanged while it was read: restore it from a copy"):
        folders.increment(record, 0)
    file.write_bytes(good)


def test_stores_that_keep_rank_and_alpha_in_the_settings_only_are_still_read(stored):
    root, records = stored
    record = records[11]
    file = root / record.folder / "increment-0" / ADAPTER_MODEL
    good = file.read_bytes()
    names = [f"base_model.model.layer.lora_{half}.weight" for half in "AB"]
    file.write_bytes(tensors_to_bytes(dict(zip(names, (torch.ones(8, 3), torch.ones(4, 8)), strict=True))))
    files = tuple(
        slm.store.folders.file_record(root / record.folder, f.path) if f.path.endswith(ADAPTER_MODEL) else f
        for f in record.files
    )
    found = TaskFolders(root).increment(dataclasses.replace(record, files=files), 0)
    assert (found.rank, found.scale) == (8, 2.0)
    file.write_bytes(good)


def test_the_same_increment_is_the_same_bytes():
    """safetensors itself orders metadata by chance."""
    tensors = {"a": torch.ones(2), "ü": torch.zeros(3)}
    metadata = {"rank": "8", "alpha": "16.0", "format": "pt"}
    assert len({tensors_to_bytes(tensors, metadata) for _ in range(20)}) == 1
