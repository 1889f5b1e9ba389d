"""Running the cells of a suite: several at once, each written when it is done, none of them twice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from slm.bench.cells import Cell, RunFolder
from slm.bench.environment import environment
from slm.bench.scratch import clear_scratch, scratch_folder
from slm.bench.suite import ALONE, METRICS, Preset, Suite
from slm.bench.suite_data import load_tasks, training_task
from slm.errors import ConfigError, DataError, LearningError, SlmError
from slm.tasks import Stream, Task

_BYTES_PER_CELL = 3 << 30
"""Memory that one cell of a small backbone may take; larger ones are given --jobs."""

SCRATCH = "scratch"
"""Where in a run's folder its cells have a folder each while they are computed."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is asked for.

    Attributes:
        suite: the benchmark.
        preset: its scale, changes of the command line included.
        methods: names of rivals.
        data: folder of tasks; None reads the hub.
        out: folder of the results.
        is_alone: whether every task is learned alone too, for forward transfer.
        options: what of the preset was changed, by the names of the command line.
        shots: numbers of examples of each label, from the preset's; None takes every one.
        suite_file: where a suite of one's own was read; None for one of the package.
    """

    suite: Suite
    preset: Preset
    methods: tuple[str, ...]
    data: Path | None
    out: Path
    is_alone: bool = False
    options: Mapping[str, str | int] = field(default_factory=dict)
    shots: tuple[int | None, ...] | None = None
    suite_file: str | None = None

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """Numbers of examples of each label that are run."""
        return self.shots or self.preset.per_label or (None,)

    @property
    def cells(self) -> list[Cell]:
        """Every cell, orders outermost so that methods compare early; a joint method has none alone."""
        from slm.bench.baselines import rival

        alone = self.suite.tasks if self.is_alone else ()
        return [
            Cell(method, order, seed, per_label)
            for order in (*self.preset.orders, *(ALONE + task for task in alone))
            for seed in self.preset.seeds
            for per_label in self.numbers
            for method in self.methods
            if not (order.startswith(ALONE) and rival(method).is_joint)
        ]


def run_suite(run: Run, *, num_jobs: int | None = None, on_done: Callable[[Cell, float], None]) -> int:
    """Run the cells that are not there yet.

    Args:
        run: what is asked for.
        num_jobs: cells computed at once, each in a process of its own with its share of the cores; None
            takes as many as cores and free memory allow.
        on_done: told of every finished cell and its seconds.

    Returns:
        The number of cells computed.

    Raises:
        ConfigError: the folder holds results of something else, or cannot be written.
        LearningError: cells failed; the others are kept.
    """
    tasks = load_tasks(run.suite, run.data, (*run.suite.tasks, *run.suite.outside))
    folder = RunFolder(run.out)
    folder.begin(describe(run, tasks))
    clear_scratch(run.out / SCRATCH)
    left = [cell for cell in run.cells if not folder.has(cell)]
    _expect_same_settings(run, folder)
    if num_jobs is None:
        num_jobs = jobs_that_fit()
    failures = {}
    for cell, result in _results(run, left, max(1, min(num_jobs, len(left)))):
        if isinstance(result, str):
            failures[cell.name] = result
            continue
        try:
            folder.keep(cell, result)
        except DataError as error:
            failures[cell.name] = str(error)
            continue
        on_done(cell, result["time_s"])
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise LearningError(f"{len(failures)} of {len(left)} cells failed, the others are kept: {told}")
    return len(left)


def _expect_same_settings(run: Run, folder: RunFolder) -> None:
    """Refuse to go on beside cells whose method had other settings than it would have now."""
    from slm.bench.baselines import rival
    from slm.bench.rival import settle

    for cell in run.cells:
        if not folder.has(cell):
            continue
        held = folder.result(cell)["settings"]
        wanted = settle(run.preset.methods.get(cell.method, {}), rival(cell.method).defaults)
        for name, value in wanted.items():
            if held.get(name, value) != value:
                raise ConfigError(
                    f"{folder.path} holds {cell.name} with {name} {held[name]:g}, this run gives it "
                    f"{value:g}: choose another --out"
                )


def describe(run: Run, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """What ``run.json`` says of a run, given its tasks, those outside included."""
    per_label = run.numbers[0]
    examples = [
        example
        for name in run.suite.tasks
        for example in training_task(tasks[name], run.preset, per_label, 0).examples
    ]
    size = sum(len(e.prompt_text.encode()) + len((e.target or "").encode()) for e in examples)
    return {
        "suite": run.suite.name,
        "suite_file": run.suite_file,
        "version": run.suite.version,
        "title": run.suite.title,
        "preset": run.preset.name,
        "about": run.preset.about,
        "backbone": run.preset.backbone,
        "options": dict(run.options),
        "digest": run.suite.digest(run.preset),
        "data": {name: tasks[name].digest() for name in sorted(run.suite.tasks)},
        "outside_data": {name: tasks[name].digest() for name in sorted(run.suite.outside)},
        "metrics_version": METRICS,
        "bytes_per_task_of_1_percent": size / 100 / len(run.suite.tasks),
        "per_label_of_1_percent": per_label,
        "num_examples_of_1_percent": len(examples),
    }


def jobs_that_fit() -> int:
    """Cells that cores and free memory allow at once; a single one where they would share a GPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return 1
    free = int(psutil.virtual_memory().available)
    return max(1, min(len(os.sched_getaffinity(0)), free // _BYTES_PER_CELL))


def _results(run: Run, cells: Sequence[Cell], num_jobs: int) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Results as they come; a text where a cell failed."""
    if num_jobs == 1:
        for cell in cells:
            yield cell, _attempt(run, cell, None)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    pool = ProcessPoolExecutor(
        num_jobs, get_context("spawn"), initializer=_leave_with, initargs=(os.getpid(),)
    )
    try:
        pending = {pool.submit(_attempt, run, cell, threads): cell for cell in cells}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            ended = {pending.pop(future): future for future in done}
            yield from ((cell, future.result()) for cell, future in ended.items() if not future.exception())
            for cell, future in ended.items():
                if isinstance(future.exception(), BrokenProcessPool):
                    raise LearningError(
                        f"a process of {cell.name} or beside it was killed, perhaps for want of memory: "
                        "run the same command again, with --jobs 1 if it happens again"
                    )
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with(parent: int) -> None:
    """End this process when the one it works for is gone, killed perhaps; it would compute for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _attempt(run: Run, cell: Cell, num_threads: int | None) -> dict[str, Any] | str:
    """The result of a cell, or what went wrong: a defect in one must not cost the others."""
    try:
        return run_cell(run, cell, num_threads)
    except SlmError as error:
        return str(error)
    except Exception as error:
        if os.environ.get("SLM_DEBUG"):
            raise
        return f"{type(error).__name__} ({error}), a defect: SLM_DEBUG=1 shows the traceback"


def run_cell(run: Run, cell: Cell, num_threads: int | None = None) -> dict[str, Any]:
    """Live through one stream with one method and return all that is measured, ready for JSON."""
    import torch

    from slm.bench.baselines import rival
    from slm.bench.drift import measure_drift
    from slm.bench.rival import Setup
    from slm.bench.run import run_rival

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    suite, preset = run.suite, run.preset
    circumstances = environment()
    begun, started = time.perf_counter(), datetime.now(UTC)
    loaded = _tasks(suite, run.data)
    order = suite.order(cell.order)
    stream = Stream(tuple(training_task(loaded[n], preset, cell.per_label, cell.seed) for n in order))
    learning = replace(preset.config.learning, seed=cell.seed)
    with scratch_folder(run.out / SCRATCH) as scratch:
        setup = Setup(
            backbone=_backbone(preset),
            config=replace(preset.config, learning=learning),
            seed=cell.seed,
            scratch=scratch,
            learned=run.out / "learned",
            settings=dict(preset.methods.get(cell.method, {})),
            max_new_tokens=preset.max_new_tokens,
        )
        method = rival(cell.method)(setup)
        found = run_rival(method, stream, limit=preset.test, metrics=suite.metrics)
        outside = {name: loaded[name] for name in suite.outside}
        drift = (
            measure_drift(method, outside, preset.outside_test, suite.metrics)
            if outside and not method.needs_task_id and len(order) > 1
            else None
        )
    return {
        "cell": asdict(cell),
        "title": method.title,
        "needs_task_id": method.needs_task_id,
        "is_joint": method.is_joint,
        "replayed_share": method.replayed_share,
        "tasks": list(order),
        "metrics": [suite.metrics[name] for name in order],
        "num_examples": [len(task.examples) for task in stream],
        **asdict(found),
        "drift": drift,
        "settings": method.settings,
        "config": setup.config.as_dict(),
        "digest": suite.digest(preset),
        "started": started.isoformat(timespec="seconds"),
        "time_s": round(time.perf_counter() - begun, 1),
        "environment": circumstances,
    }


_KEPT: dict[str, tuple[Any, Any]] = {}
"""What a process that computes cells loads once: "tasks" and "backbone", each with what it is of."""


def _once(name: str, of: Any, load: Callable[[], Any]) -> Any:
    if name not in _KEPT or _KEPT[name][0] != of:
        _KEPT[name] = (of, load())
    return _KEPT[name][1]


def _tasks(suite: Suite, data: Path | None) -> dict[str, Task]:
    names = (*suite.tasks, *suite.outside)
    found: dict[str, Task] = _once("tasks", (suite, data), lambda: load_tasks(suite, data, names))
    return found


def _backbone(preset: Preset) -> Any:
    from slm.backbone.load import load_backbone

    of = (preset.backbone, preset.config.backbone)
    return _once("backbone", of, lambda: load_backbone(*of))


def check_jobs(num_jobs: int | None) -> None:
    """Refuse a number of jobs that is none.

    Raises:
        ConfigError: it is below 1.
    """
    if num_jobs is not None and num_jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {num_jobs}: raise it or leave it out")
