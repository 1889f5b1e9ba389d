"""Tasks in the order in which they arrive."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from slm.errors import ConfigError, DataError, TaskError
from slm.tasks.sampling import rank
from slm.tasks.task import Example, Task, draw


@final
@dataclass(frozen=True)
class Stream:
    """Ordered tasks with unique names.

    Attributes:
        tasks: the tasks, first to arrive first.

    Raises:
        TaskError: two tasks have one name.
    """

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        repeated = _repeated(self.names)
        if repeated:
            raise TaskError(f'two tasks of the stream are named "{repeated}", names must differ: rename one')

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks in order."""
        return tuple(task.name for task in self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, key: int | str) -> Task:
        if isinstance(key, int):
            return self.tasks[key]
        if key not in self.names:
            raise TaskError(_unknown(key, self.names))
        return self.tasks[self.names.index(key)]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        names: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> Stream:
        """Read a folder of tasks, `<folder>/<name>/train.jsonl` and, where there is one, `test.jsonl`.

        Args:
            folder: folder of the tasks' folders.
            names: tasks to read, in this order; None reads all, by name.
            limit: most examples of each task; None keeps all.
            test_limit: most test examples of each task; None keeps all.
            seed: chooses what is drawn under a limit.

        Raises:
            DataError: the folder or a file in it cannot be used.
            TaskError: a name is unknown or given twice.
            ConfigError: a limit is below 1.
        """
        root = Path(folder)
        known = sorted(path.parent.name for path in root.glob("*/train.jsonl"))
        if not known:
            raise DataError(f"{root} holds no tasks, expected <name>/train.jsonl inside it: check the path")
        for name in names or ():
            if name not in known:
                raise TaskError(_unknown(name, known))
        if test_limit is not None and test_limit < 1:
            raise ConfigError(f"test_limit must be at least 1, got {test_limit}: raise it or leave it out")
        chosen = known if names is None else names
        return cls(tuple(_load(root / name, limit, test_limit, seed) for name in chosen))

    def order(self, names: Sequence[str]) -> Stream:
        """Return the named tasks as a stream in this order; tasks that are not named are left out.

        Raises:
            TaskError: a name is unknown or given twice.
        """
        return Stream(tuple(self[name] for name in names))

    def mixed_test(self, limit_per_task: int, seed: int = 0) -> list[tuple[str, Example]]:
        """Draw test examples of every task and shuffle them into one list.

        Args:
            limit_per_task: most test examples of each task, drawn in proportion to its labels.
            seed: chooses the draw and the order.

        Returns:
            Pairs of task name and test example, the tasks mixed.

        Raises:
            TaskError: a task has no test examples.
            ConfigError: limit_per_task is below 1.
        """
        if limit_per_task < 1:
            raise ConfigError(f"limit_per_task must be at least 1, got {limit_per_task}: raise it")
        for task in self.tasks:
            if not task.test:
                raise TaskError(f'task "{task.name}" has no test examples: load it with a test file')
        drawn = [(t.name, example) for t in self for example in draw(t.test, t.kind, limit_per_task, seed)]
        return sorted(
            drawn, key=lambda pair: rank(seed, f"{pair[0]}\n{pair[1].prompt_text}\n{pair[1].target}")
        )


def _load(folder: Path, limit: int | None, test_limit: int | None, seed: int) -> Task:
    test = folder / "test.jsonl"
    task = Task.load(
        folder.name, folder / "train.jsonl", test=test if test.exists() else None, limit=limit, seed=seed
    )
    if test_limit is None:
        return task
    held_out = draw(task.test, task.kind, test_limit, seed)
    return Task(task.name, task.kind, task.examples, task.labels, held_out)


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for position, name in enumerate(names) if name in names[:position]), None)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    mend = f'did you mean "{near[0]}"?' if near else "use one of these"
    return f"task {name!r} is unknown, known are {', '.join(known)}: {mend}"
