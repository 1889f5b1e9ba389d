"""What asking for one of many stored increments costs: files opened, time, resident memory.

    python benchmarks/increment_pool.py --tasks 10000 --budget-mib 64

The folders are written as the store writes them; the catalogue, whose keys are held by retrieval, stays out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

import slm.store.values
from slm.increments.increment import Increment, LowRankPair
from slm.increments.pool import IncrementPool
from slm.retrieval.keys import TaskKeys
from slm.store import TaskKnowledge, TaskRecord
from slm.store.folders import TaskFolders
from slm.store.records import describe_task


def write_tasks(
    root: Path, num_tasks: int, shapes: Mapping[str, tuple[int, int]], rank: int
) -> list[TaskRecord]:
    """Folders of tasks with one random increment each, for layers of I and O features by name."""
    (root / "tasks").mkdir()
    sync, os.fsync = os.fsync, lambda _: None  # these files need not outlive the machine
    folders, records = TaskFolders(root), []
    zero = torch.zeros(1, 2, dtype=torch.float64)
    keys = TaskKeys(zero, torch.ones(1, dtype=torch.long), torch.ones(3), radius=1.0)
    for number in range(num_tasks):
        pairs = {
            name: LowRankPair(torch.randn(rank, num_in), torch.randn(num_out, rank))
            for name, (num_in, num_out) in shapes.items()
        }
        knowledge = TaskKnowledge(keys, (Increment(pairs, rank, 16.0).in_float16(),))
        record = describe_task(f"task-{number}", "generation", (), 1, knowledge, {})
        records.append(dataclasses.replace(record, files=folders.write(record, knowledge, "none")))
    os.fsync = sync
    return records


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def measure(
    num_tasks: int, num_asked: int, num_layers: int = 8, width: int = 384, rank: int = 8, budget_mib: int = 64
) -> dict[str, float]:
    """Write, ask at random: files opened, milliseconds, resident memory."""
    opened: list[str] = []
    original = slm.store.values.safe_open
    slm.store.values.safe_open = lambda file, **o: (opened.append(file), original(file, **o))[1]
    shapes = {f"layers.{i}": (width, width) for i in range(num_layers)}
    with tempfile.TemporaryDirectory() as folder:
        records = write_tasks(Path(folder), num_tasks, shapes, rank)
        folders, pool = TaskFolders(Path(folder)), IncrementPool(budget_mib << 20)
        draw = random.Random(0)
        size = pool.get({"first": partial(folders.increment, records[0], 0)})[0].size_bytes
        pool.drop("first")
        del opened[:]
        before, most, misses, hits = resident_mib(), 0.0, [], []
        for _ in range(num_asked):
            number = draw.randrange(num_tasks)
            seen, begun = len(opened), time.perf_counter()
            pool.get({number: partial(folders.increment, records[number], 0)})
            (misses if len(opened) > seen else hits).append(1e3 * (time.perf_counter() - begun))
            most = max(most, resident_mib() - before)
    slm.store.values.safe_open = original
    return {
        "tasks": num_tasks,
        "increment_mib": size / 2**20,
        "kept": len(hits),
        "read": len(misses),
        "files": len(opened),
        "read_ms": statistics.median(misses),
        "kept_ms": statistics.median(hits) if hits else float("nan"),
        "budget_mib": budget_mib,
        "pool_mib": pool.size_bytes / 2**20,
        "resident_mib": most,
    }


def render(found: Mapping[str, float]) -> str:
    """What was found, in words."""
    stored = found["tasks"] * found["increment_mib"]
    return (
        f"{found['tasks']} tasks, {found['increment_mib']:.3f} MiB each, {stored:.0f} MiB stored. "
        f"Asked at random: {found['kept']} were kept ({found['kept_ms']:.3f} ms), {found['read']} cost "
        f"{found['files']} files ({found['read_ms']:.2f} ms).\n"
        f"Budget {found['budget_mib']} MiB, pool {found['pool_mib']:.1f} MiB, "
        f"resident memory grew by {found['resident_mib']:.1f} MiB at most."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=2_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--budget-mib", type=int, default=64)
    args = parser.parse_args()
    print(render(measure(args.tasks, args.asked, args.layers, args.width, args.rank, args.budget_mib)))


if __name__ == "__main__":
    main()
