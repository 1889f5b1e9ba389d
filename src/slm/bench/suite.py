"""Suites: what a benchmark's versioned YAML file says, once it is read (:mod:`slm.bench.suite_file`)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from slm.config import Config
from slm.errors import ConfigError

ALONE = "alone-"
"""Begins the name of an order of one task, with which forward transfer is measured."""
METRICS = 1
"""Version of the formulas and scorers of :mod:`slm.evaluation`; it goes up when one of them changes."""


@dataclass(frozen=True, slots=True)
class HubData:
    """A data set on the Hugging Face hub.

    Attributes:
        path: its id, or a folder.
        train: split to learn from.
        test: split to measure on.
        configuration: of the data set; empty for its only one.
        revision: branch or commit of its files; empty for the main branch.
    """

    path: str
    train: str
    test: str
    configuration: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one task comes from, and how it is scored.

    Attributes:
        kind: classification or generation.
        metric: name of a scorer.
        hub: where it is read without a data folder; None where no hub has it.
        input: Jinja template of the input over a row's columns.
        target: Jinja template of the target.
    """

    kind: str
    metric: str
    hub: HubData | None = None
    input: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One scale of a suite.

    Attributes:
        name: of the preset.
        about: what it is for, and how long it takes.
        backbone: alias, folder or hub id.
        train: most examples of a task.
        per_label: for a curve, as many examples of each label, None for all of them (``all`` in the file);
            empty takes ``train`` in all.
        test: most test rows of a task.
        outside_test: test rows of each task that is never learned.
        max_new_tokens: longest written answer.
        orders: names of the orders that are run.
        seeds: of draw, initialisation and row order.
        config: of the store and of every method's training.
        settings: what the suite's file says of ``config``; the rest of it are the library's defaults.
        methods: settings of single methods.
    """

    name: str
    about: str
    backbone: str
    train: int
    test: int
    orders: tuple[str, ...]
    seeds: tuple[int, ...]
    config: Config
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_label: tuple[int | None, ...] = ()
    outside_test: int = 0
    max_new_tokens: int = 32
    methods: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A stream of tasks, its orders, and its presets.

    Attributes:
        name: of the file.
        version: goes up with a release that measures something else.
        title: one line.
        tasks: names.
        orders: name -> tasks in order of arrival.
        sources: of every task, those outside included.
        outside: tasks that are measured and never learned.
        label_words: written in place of labels; others stay.
        has_lower_case_labels: whether the others are written in lower case.
        presets: by name.
    """

    name: str
    version: int
    title: str
    tasks: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, Source]
    outside: tuple[str, ...]
    label_words: Mapping[str, str]
    has_lower_case_labels: bool
    presets: Mapping[str, Preset]

    def preset(self, name: str) -> Preset:
        """The preset of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.presets:
            raise ConfigError(f"suite {self.name!r} has no {nearest('preset', name, self.presets)}")
        return self.presets[name]

    def order(self, name: str) -> tuple[str, ...]:
        """The tasks of an order; ``alone-<task>`` is that task and no other."""
        task = name.removeprefix(ALONE)
        return (task,) if name.startswith(ALONE) and task in self.tasks else self.orders[name]

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> name of its scorer."""
        return {name: source.metric for name, source in self.sources.items()}

    def digest(self, preset: Preset) -> str:
        """SHA-256 of what the suite decides to measure, in hexadecimal.

        The library's own defaults are no part of it: a later version goes on with an earlier one's run, and
        every cell says which commit and which settings it is of. Nor is the revision of a data set, whose
        rows have a digest of their own.
        """
        held = dataclasses.asdict(dataclasses.replace(self, presets={preset.name: preset}))
        for name in ("orders", "seeds", "methods", "about", "config"):  # these choose cells, or stand in them
            held["presets"][preset.name].pop(name)
        for source in held["sources"].values():
            (source["hub"] or {}).pop("revision", None)
        return hashlib.sha256(json.dumps([held, METRICS], sort_keys=True).encode()).hexdigest()


def shots_text(per_label: int | None) -> str:
    """A number of examples of each label as files and command lines have it: None is all of them."""
    return "all" if per_label is None else str(per_label)


def nearest(what: str, name: str, known: Collection[str]) -> str:
    """The end of an error about a name that is none: what is known, and which of it was perhaps meant."""
    near = difflib.get_close_matches(name, known, 1)
    mend = f"did you mean {near[0]!r}?" if near else "use one of these"
    return f"{what} {name!r}, known are {', '.join(known) or 'none'}: {mend}"
