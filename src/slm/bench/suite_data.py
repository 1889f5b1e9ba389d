"""The tasks of a suite, read from a folder or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from slm.bench.suite import Preset, Source, Suite
from slm.errors import DataError, TaskError
from slm.tasks import Example, Stream, Task
from slm.tasks.load import open_data_set
from slm.tasks.rows import Row, collect_labels, to_examples


def load_tasks(suite: Suite, data: Path | None, names: Iterable[str]) -> dict[str, Task]:
    """Read tasks whole, with their test examples, and write their labels as the suite wants them.

    Args:
        suite: says where a task comes from.
        data: a folder of ``<task>/{train,test}.jsonl``; None reads the hub.
        names: tasks of the suite.

    Raises:
        DataError: something cannot be read, or a task is on no hub.
        TaskError: the folder lacks a task or its test examples.
    """
    tasks = {}
    for name in names:
        source = suite.sources[name]
        task = _from_hub(name, source) if data is None else Stream.load(data, [name])[name]
        if not task.test:
            raise TaskError(f"task {name!r} has no test examples: add {data}/{name}/test.jsonl")
        if task.kind.value != source.kind:
            raise TaskError(f"task {name!r} should be a {source.kind}, its rows are a {task.kind.value}")
        tasks[name] = _in_words(task, suite)
    return tasks


def training_task(task: Task, preset: Preset, per_label: int | None, seed: int) -> Task:
    """What is learned of a task: a draw of its examples, the same for every method.

    Args:
        task: with all its examples.
        preset: says how many at most.
        per_label: so many of each label, where labels are; a task of free text takes four times as many.
        seed: of the draw.
    """
    if per_label is not None and task.labels:
        return task.sample_per_label(per_label, seed).sample(preset.train, seed)
    return task.sample(preset.train if per_label is None else 4 * per_label, seed)


def _in_words(task: Task, suite: Suite) -> Task:
    if not task.labels or not (suite.label_words or suite.has_lower_case_labels):
        return task

    def word(label: str | None) -> str:
        label = label or ""
        return suite.label_words.get(label, label.lower() if suite.has_lower_case_labels else label)

    def reworded(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(example, target=word(example.target)) for example in examples)

    return Task(
        task.name,
        task.kind,
        reworded(task.examples),
        tuple(sorted({word(label) for label in task.labels})),
        reworded(task.test),
    )


def _from_hub(name: str, source: Source) -> Task:
    hub = source.hub
    if hub is None:
        raise DataError(f"task {name!r} is on no hub: give a folder that holds it with --data")
    kind, train = to_examples(_rendered(name, source, hub.train), source.kind, origin=hub.path)
    _, test = to_examples(_rendered(name, source, hub.test), source.kind, origin=hub.path)
    return Task(name, kind, tuple(train), collect_labels(train, kind, origin=hub.path), tuple(test))


def _rendered(name: str, source: Source, split: str) -> list[Row]:
    from jinja2 import StrictUndefined
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    assert source.hub is not None
    # Autoescaping is for HTML; these are plain texts.
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_or_nothing
    )
    question, answer = environment.from_string(source.input), environment.from_string(source.target)
    columns = ("text", "label") if source.kind == "classification" else ("prompt", "completion")
    rows = []
    hub = source.hub
    data = open_data_set(hub.path, split, hub.configuration or None, hub.revision or None)
    for number, fields in enumerate(data, start=1):
        if fields.get("label", 0) == -1:
            continue  # a row without a gold label
        try:
            pair = question.render(fields).strip(), answer.render(fields).strip()
        except TemplateError as error:
            raise DataError(
                f"{source.hub.path} row {number} does not fit the template of {name!r} ({error}): "
                "mend input and target of its source"
            ) from None
        if source.kind == "generation" and not pair[1]:
            continue  # a question without an answer
        rows.append(Row(source.hub.path, "row", number, dict(zip(columns, pair, strict=True))))
    return rows


def _or_nothing(value: object) -> object:
    """What a template writes of a value: an empty text in place of null, which Jinja would call None."""
    return "" if value is None else value
