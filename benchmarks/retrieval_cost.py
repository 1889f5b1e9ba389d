"""What retrieval costs as a store grows: searching its keys, and taking in one more task.

    OMP_NUM_THREADS=1 python benchmarks/retrieval_cost.py

Two tables. *Engines*: clustered keys in 384 channels, searched by the exact index and by the vector index,
with the share of the exact nearest keys that the latter finds; clusters of 1,000 keys (what a task may have
at most) and, harder because they overlap, of 100. *Adding*: one task after the other into one store, the time
of the commit, of the model taking it in, and of the first decision that needs its threshold.
Writes ``<out>/retrieval_cost.json`` and ``<out>/retrieval_cost.md``. Needs about 12 GB of memory at 1,000,000
keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm import Config, ScalableLM
from slm.config import BackboneConfig, RetrievalConfig
from slm.increments.increment import Increment, LowRankPair
from slm.retrieval.index import ExactIndex, KeyIndex, VectorIndex
from slm.retrieval.keys import learn_keys
from slm.retrieval.retriever import NUM_CANDIDATES
from slm.store import TaskKnowledge
from slm.tasks.packaged import question_topics

NUM_CHANNELS = 384
KEYS_PER_CLUSTER = (1000, 100)
WITHIN = 0.5
"""Spread of a cluster's keys, relative to the spread of the clusters' centres."""


def clustered(num_keys: int, keys_per_cluster: int, num_queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys, (N, 384) float64, and queries drawn from the same clusters, (B, 384) float64.

    Channel j has standard deviation (j + 1)^-1/2, between and within clusters: like principal components of
    real features it makes neighbours of clusters, which isotropic clusters in many channels hardly have.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, NUM_CHANNELS + 1).float().rsqrt()
    num_clusters = max(1, num_keys // keys_per_cluster)
    centres = torch.randn(num_clusters, NUM_CHANNELS, generator=generator) * scale

    def draw(num: int) -> Tensor:
        chosen = torch.randint(len(centres), (num,), generator=generator)
        points = torch.randn(num, NUM_CHANNELS, generator=generator).mul_(WITHIN * scale)
        return points.add_(centres[chosen]).double()

    return draw(num_keys), draw(num_queries)


def time_ms(action: Callable[[], object], num_times: int) -> float:
    """Milliseconds of the fastest call but two; slower ones waited for other programs."""
    times = []
    for i in range(num_times + 2):
        begun = time.perf_counter()
        action()
        if i >= 2:
            times.append(time.perf_counter() - begun)
    return min(times) * 1e3


def measure_search(index: KeyIndex, queries: Tensor, num_times: int = 60) -> dict[str, float]:
    """Milliseconds a row at batch 1 and 64, each call with other queries."""
    found = {}
    for batch_size in (1, 64):
        batches = list(queries.split(batch_size))
        turn = iter(range(num_times + 2))
        elapsed = time_ms(
            lambda n=batch_size, b=batches, t=turn: index.search(b[next(t) % len(b)], NUM_CANDIDATES),
            num_times,
        )
        found[f"batch {batch_size}"] = elapsed / batch_size
    return found


def recall(index: KeyIndex, exact: KeyIndex, queries: Tensor, num: int) -> float:
    """Share of the exact nearest ``num`` keys that an index finds among its nearest ``num``."""
    wanted, found = exact.search(queries, NUM_CANDIDATES)[1], index.search(queries, NUM_CANDIDATES)[1]
    hits = (wanted[:, :num, None] == found[:, None, :num]).any(2)
    return float(hits.double().mean())


def measure_engines(num_keys: int, keys_per_cluster: int, num_queries: int = 256) -> dict[str, Any]:
    """Both engines on the same clustered keys."""
    keys, queries = clustered(num_keys, keys_per_cluster, num_queries)
    begun = time.perf_counter()
    exact = ExactIndex(keys)
    built = time.perf_counter()
    vector = VectorIndex(keys)
    vector_build_s = time.perf_counter() - built
    return {
        "keys": num_keys,
        "keys per cluster": keys_per_cluster,
        "exact": {"build_s": built - begun, **measure_search(exact, queries)},
        "vector": {"build_s": vector_build_s, **measure_search(vector, queries)},
        "recall": {num: recall(vector, exact, queries, num) for num in (2, 8, NUM_CANDIDATES)},
    }


def teach_s(model: ScalableLM, name: str) -> float:
    """Seconds of teaching the same real task under another name."""
    begun = time.perf_counter()
    model.learn(dataclasses.replace(question_topics(), name=name), has_progress=False)
    return time.perf_counter() - begun


def measure_adding(
    num_tasks: int, rows_per_task: int = 100
) -> tuple[dict[str, list[float]], dict[int, float]]:
    """Milliseconds of commit, taking in and first decision for each of many tasks of 384 channels.

    The tasks are made up, their increments tiny: what is measured is the store and DTKR, not learning. Then,
    by the number of tasks in the store, the seconds it takes to teach a real one.
    """
    config = Config(
        backbone=BackboneConfig(dtype="float32"), retrieval=RetrievalConfig(layers=(3,), pooling="mean")
    )
    times: dict[str, list[float]] = {"commit": [], "take in": [], "first decision": []}
    with tempfile.TemporaryDirectory() as folder:
        model = ScalableLM.create(Path(folder) / "store", "minilm", config)
        teach_s(model, "warm-up")
        learned = {1: teach_s(model, "first")}
        generator = torch.Generator().manual_seed(0)
        pair = LowRankPair(torch.zeros(1, NUM_CHANNELS), torch.zeros(NUM_CHANNELS, 1))
        for number in range(num_tasks):
            centre = torch.randn(NUM_CHANNELS, generator=generator)
            rows = centre + 0.5 * torch.randn(rows_per_task, NUM_CHANNELS, generator=generator)
            keys = learn_keys(rows, torch.zeros(rows_per_task, dtype=torch.long))
            knowledge = TaskKnowledge(keys, (Increment({"encoder.layer.5": pair}, 1, 1.0),))
            marks = [time.perf_counter()]
            model.store.commit(f"task-{number}", "classification", ("a", "b"), rows_per_task, knowledge)
            marks.append(time.perf_counter())
            known = model.knowledge
            assert len(known.records) == number + 3
            marks.append(time.perf_counter())
            assert known.retriever is not None
            known.retriever(rows[:1])
            marks.append(time.perf_counter())
            for name, begun, ended in zip(times, marks[:-1], marks[1:], strict=True):
                times[name].append((ended - begun) * 1e3)
        learned[len(model.tasks)] = teach_s(model, "last")
    return times, learned


def summarize_adding(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Medians over ten tasks around the 1st, 10th, 100th ... and the last."""
    num_tasks = len(times["commit"])
    marks = sorted({min(10**i, num_tasks) for i in range(1, 10) if 10 ** (i - 1) < num_tasks})
    rows: list[dict[str, Any]] = []
    for mark in marks:
        window = slice(max(0, mark - 10), mark)
        medians = {name: statistics.median(own[window]) for name, own in times.items()}
        rows.append({"tasks": f"{window.start + 1}-{mark}", **medians, "sum": sum(medians.values())})
    return rows


def render(
    engines: Sequence[dict[str, Any]], adding: Sequence[dict[str, Any]], learned: Mapping[str, float]
) -> str:
    """The tables as Markdown."""
    lines = [
        f"Milliseconds a row for the nearest {NUM_CANDIDATES} of N clustered keys, {NUM_CHANNELS} channels, "
        f"the fastest of 60 calls on {torch.get_num_threads()} thread(s); build in seconds.",
        "",
        "| keys | in clusters of | exact, batch 1 | exact, batch 64 | exact, build | vector, batch 1 | "
        "vector, batch 64 | vector, build | of the nearest 2 | of 8 | of 32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in engines:
        cells = [f"{row['keys']:,}", f"{row['keys per cluster']:,}"]
        for name in ("exact", "vector"):
            own = row[name]
            cells += [f"{own['batch 1']:.3f}", f"{own['batch 64']:.3f}", f"{own['build_s']:.1f}"]
        cells += [f"{100 * share:.2f}%" for share in row["recall"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Milliseconds to add one task, medians of ten tasks.", ""]
    lines += ["| tasks | commit | take in | first decision | sum |", "|---|---|---|---|---|"]
    for row in adding:
        numbers = [f"{row[name]:.0f}" for name in ("commit", "take in", "first decision", "sum")]
        lines.append(f"| {row['tasks']} | {' | '.join(numbers)} |")
    if learned:
        taught = "; ".join(f"{number} tasks, {seconds:.1f} s" for number, seconds in learned.items())
        lines += ["", f"Teaching a real task of 200 examples, all of it, by what the store holds: {taught}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write, after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[1_000, 3_000, 10_000, 30_000, 100_000, 1_000_000]
    )
    parser.add_argument("--tasks", type=int, default=1000, help="tasks added one after the other")
    parser.add_argument("--parts", default="engines,adding", help="the other part stays as the files have it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "retrieval_cost.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found["machine"] = {
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }

    def keep() -> None:
        parts = found.get("engines", []), found.get("adding", []), found.get("learned", {})
        found["tables"] = render(*parts)
        file.write_text(json.dumps(found, indent=1) + "\n")
        file.with_suffix(".md").write_text(found["tables"])

    if "engines" in options.parts.split(","):
        found["engines"] = []
        for num_keys, keys_per_cluster in itertools.product(options.sizes, KEYS_PER_CLUSTER):
            found["engines"].append(measure_engines(num_keys, keys_per_cluster))
            keep()
    if "adding" in options.parts.split(","):
        times, learned = measure_adding(options.tasks)
        found["adding"] = summarize_adding(times)
        found["learned"] = {f"{number:,}": seconds for number, seconds in learned.items()}
        keep()
    print(found["tables"])


if __name__ == "__main__":
    main()
