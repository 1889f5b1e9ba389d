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


def write_tasks(root: Path, num_tasks: int, num_layers: int, width: int, rank: int) -> list[TaskRecord]:
    """Folders of tasks with one random increment each."""
    (root / "tasks").mkdir()
    folders, records = TaskFolders(root), []
    zero = torch.zeros(1, 2, dtype=torch.float64)
    keys = TaskKeys(zero, torch.ones(1, dtype=torch.long), torch.ones(3), radius=1.0)
    for number in range(num_tasks):
        pairs = {
            f"layers.{i}": LowRankPair(torch.randn(rank, width), torch.randn(width, rank))
            for i in range(num_layers)
        }
        knowledge = TaskKnowledge(keys, (Increment(pairs, rank, 16.0),))
        record = describe_task(f"task-{number}", "generation", (), 1, knowledge, {})
        records.append(dataclasses.replace(record, files=folders.write(record, knowledge, "none")))
    return records


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> None:
    """Write, ask at random, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=2_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--budget-mib", type=int, default=64)
    args = parser.parse_args()
    opened: list[str] = []
    original = slm.store.values.safe_open
    slm.store.values.safe_open = lambda file, **o: (opened.append(file), original(file, **o))[1]
    with tempfile.TemporaryDirectory() as folder:
        os.fsync = lambda _: None  # only the writing of this benchmark's own files
        records = write_tasks(Path(folder), args.tasks, args.layers, args.width, args.rank)
        folders, pool = TaskFolders(Path(folder)), IncrementPool(args.budget_mib << 20)
        draw = random.Random(0)
        size = pool.get({"first": partial(folders.increment, records[0], 0)})[0].size_bytes
        pool.drop("first")
        del opened[:]
        before, most, misses, hits = resident_mib(), 0.0, [], []
        for _ in range(args.asked):
            number = draw.randrange(args.tasks)
            seen, begun = len(opened), time.perf_counter()
            pool.get({number: partial(folders.increment, records[number], 0)})
            (misses if len(opened) > seen else hits).append(1e3 * (time.perf_counter() - begun))
            most = max(most, resident_mib() - before)
    stored = args.tasks * size / 2**20
    print(f"{args.tasks} tasks, {size / 2**20:.3f} MiB each, {stored:.0f} MiB stored")
    print(f"asked {args.asked} at random: {len(hits)} were kept, {len(misses)} cost {len(opened)} files")
    print(
        f"from disk {statistics.median(misses):.2f} ms"
        + (f", kept {statistics.median(hits):.3f} ms" if hits else "")
    )
    print(
        f"budget {args.budget_mib} MiB, pool {pool.size_bytes / 2**20:.1f} MiB, "
        f"resident memory grew by {most:.1f} MiB at most"
    )


if __name__ == "__main__":
    main()
