"""A second process for the store's tests: ``python worker.py <command> <store> <arguments>``."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slm.errors import SlmError
from slm.increments.increment import Increment, LowRankPair
from slm.retrieval.keys import TaskKeys
from slm.store import Store, TaskKnowledge
from slm.store.folders import TaskFolders
from slm.store.sums import Snapshots
from slm.store.tables import Tables

CHANNELS = 6
# Where a writer can be struck down: the call, and whether before or after it.
STEPS: dict[str, tuple[type, str, str]] = {
    "before any file": (TaskFolders, "write", "before"),
    "between two files": (Path, "mkdir", "third"),
    "before the folder is in place": (Path, "rename", "before"),
    "before the keys": (Tables, "add_keys", "before"),
    "before the commit": (Tables, "insert", "before"),
    "after the commit": (Tables, "insert", "after"),
    "before the snapshot": (Snapshots, "write", "before"),
    "before the task is forgotten": (Tables, "delete_task", "before"),
    "after the task is forgotten": (Tables, "delete_task", "after"),
    "before its files are removed": (TaskFolders, "remove", "before"),
    "before its rows are erased": (Tables, "erase_deleted", "before"),
}


def knowledge(seed: int, num_keys: int = 3, num_increments: int = 2, has_head: bool = False) -> TaskKnowledge:
    """Random knowledge with C = 6 channels and rank 2."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    keys = TaskKeys(
        means=draw(num_keys, CHANNELS).double() / 3,
        counts=torch.arange(1, num_keys + 1) * (seed + 1),
        scatter=draw(CHANNELS * (CHANNELS + 1) // 2) * 10.0 ** (seed % 7),
        increments=torch.arange(num_keys) % num_increments,
        radius=1.5 + seed,
    )
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    increments = tuple(
        Increment({name: LowRankPair(draw(2, 5), draw(4, 2)) for name in names}, rank=2, alpha=4.0)
        for _ in range(num_increments)
    )
    return TaskKnowledge(keys, increments, {"weight": draw(3, 5), "bias": draw(3)} if has_head else None)


def commit(store: Store, name: str, seed: int, **changes: object) -> object:
    """Commit random knowledge under ``name``."""
    return store.commit(name, "classify", ["no", "yes"], 10, knowledge(seed, **changes), {"seed": seed})


def _strike(step: str) -> None:
    owner, method, when = STEPS[step]
    original, calls = getattr(owner, method), []

    def struck(*arguments: object, **options: object) -> object:
        calls.append(method)
        if when == "before" or (when == "third" and len(calls) == 3):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method, struck)


def _wait_for(file: str) -> None:
    while not Path(file).exists():
        time.sleep(0.001)


def _read_until(store: Store, stop: str) -> None:
    num_reads, num_seen = 0, 0
    while True:
        is_last = Path(stop).exists()
        records = store.tasks()
        assert len(records) >= num_seen, "a task vanished"
        num_seen = len(records)
        for record, keys in zip(records, store.all_keys(records), strict=True):
            assert torch.equal(keys.means, knowledge(record.metadata["seed"]).keys.means)
        store.scatter_sum(records)
        num_reads += 1
        if is_last:
            _say(f"{num_reads} {num_seen}")
            return
        Path(stop).with_name("reading").touch()


def _num_keys(store: Store) -> int:
    return sum(keys.num_keys for keys in store.all_keys(store.tasks()))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(command: str, path: str, *arguments: str) -> None:
    """Run one command; an error of slm goes to standard output as ``Class: message``."""
    if "WORKER_USER" in os.environ:  # after the imports, which another user may not be able to do
        os.setgroups([])
        os.setgid(int(os.environ["WORKER_USER"]))
        os.setuid(int(os.environ["WORKER_USER"]))
    store = Store.open(path)
    actions: dict[str, Callable[..., object]] = {
        "commit": lambda name, seed: commit(store, name, int(seed)),
        "race": lambda name, seed, start: (_wait_for(start), commit(store, name, int(seed))),
        "die": lambda step, name, seed: (_strike(step), commit(store, name, int(seed))),
        "die-forgetting": lambda step, name: (_strike(step), store.forget(name)),
        "read-until": lambda stop: _read_until(store, stop),
        "look": lambda: _say(f"{[r.name for r in store.tasks()]} {store.check()} {_num_keys(store)}"),
    }
    if command == "race":
        Path(arguments[2]).with_name(f"ready-{arguments[1]}").touch()
    try:
        actions[command](*arguments)
    except SlmError as error:
        _say(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
