"""Suites: a benchmark is a versioned YAML file, and this is how it is read."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from slm.config import Config
from slm.errors import ConfigError

SOURCES = "sources"
"""The file beside the suites that says where their tasks come from."""
ALONE = "alone-"
"""Begins the name of an order of one task, with which forward transfer is measured."""
PROMPTS = ("plain", "chat")
TRUNCATIONS = ("middle",)
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
    """

    path: str
    train: str
    test: str
    configuration: str = ""


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
        version: goes up when anything in the file changes what is measured.
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
            raise ConfigError(f"suite {self.name!r} has no {_nearest('preset', name, list(self.presets))}")
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
        every cell says which commit and which settings it is of.
        """
        held = dataclasses.asdict(dataclasses.replace(self, presets={preset.name: preset}))
        for name in ("orders", "seeds", "methods", "about", "config"):  # these choose cells, or stand in them
            held["presets"][preset.name].pop(name)
        return hashlib.sha256(json.dumps([held, METRICS], sort_keys=True).encode()).hexdigest()


def suite_names() -> tuple[str, ...]:
    """Names of the suites that come with the package."""
    found = (Path(str(entry)).stem for entry in _folder().iterdir() if str(entry).endswith(".yaml"))
    return tuple(sorted(name for name in found if name != SOURCES))


def load_suite(name: str | Path) -> Suite:
    """Read a suite that comes with the package, or a .yaml file of one's own.

    Raises:
        ConfigError: there is none of that name, or the file does not describe a suite.
    """
    text, origin = _read(str(name))
    found = _parse(text, origin)
    sources = _parse(_folder().joinpath(f"{SOURCES}.yaml").read_text(encoding="utf-8"), SOURCES)["sources"]
    sources = {**sources, **found.pop("sources", {})}
    try:
        return _build(Path(str(name)).stem, found, sources, origin)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{origin} describes no suite ({what}): compare it with one of slm's own") from None


def _build(name: str, found: dict[str, Any], sources: Mapping[str, Any], origin: str) -> Suite:
    if found["prompt"] not in PROMPTS or found["truncation"] not in TRUNCATIONS:
        raise ConfigError(
            f"{origin}: prompt must be one of {', '.join(PROMPTS)} and truncation {', '.join(TRUNCATIONS)}, "
            f"got {found['prompt']!r} and {found['truncation']!r}: correct them"
        )
    if found["metrics"] != METRICS:
        raise ConfigError(
            f"{origin} was written for version {found['metrics']} of the metrics, this is {METRICS}: check "
            "its numbers against the newer formulas, then raise it"
        )
    tasks, outside = tuple(found["tasks"]), tuple(found.get("outside", ()))
    missing = [task for task in (*tasks, *outside) if task not in sources]
    if missing:
        raise ConfigError(f"{origin}: {', '.join(missing)} has no source: add it under sources")
    orders = {str(key): tuple(order) for key, order in found["orders"].items()}
    for key, order in orders.items():
        if sorted(order) != sorted(tasks):
            raise ConfigError(f"{origin}: order {key} is no order of the suite's tasks: name each one once")
    return Suite(
        name=name,
        version=int(found["version"]),
        title=str(found["title"]),
        tasks=tasks,
        orders=orders,
        sources={task: _source(sources[task]) for task in sorted({*tasks, *outside})},
        outside=outside,
        label_words=dict(found.get("label_words", {})),
        has_lower_case_labels=bool(found.get("has_lower_case_labels", False)),
        presets={
            key: _preset(key, value, found["prompt"], orders) for key, value in found["presets"].items()
        },
    )


def _source(found: Mapping[str, Any]) -> Source:
    hub = found.get("hub")
    return Source(**{**found, "hub": HubData(**hub) if hub else None})


def _preset(
    name: str, found: Mapping[str, Any], prompt: str, orders: Mapping[str, tuple[str, ...]]
) -> Preset:
    values = dict(found)
    config = dict(values.pop("config", {}))
    config["backbone"] = {"prompt_format": prompt, **config.get("backbone", {})}
    for key in ("orders", "seeds", "per_label"):
        if key in values:
            values[key] = tuple(values[key])
    if "per_label" in values:
        values["per_label"] = tuple(None if number == "all" else number for number in values["per_label"])
    for order in values["orders"]:
        if order not in orders:
            raise ConfigError(f"preset {name!r} has no {_nearest('order', order, list(orders))}")
    return Preset(name=name, config=Config.from_mapping(config), settings=config, **values)


def _read(name: str) -> tuple[str, str]:
    if name.endswith((".yaml", ".yml")):
        try:
            return Path(name).read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} cannot be read ({error}): check the path") from None
    if name not in suite_names():
        raise ConfigError(f"there is no {_nearest('suite', name, list(suite_names()))}, or give a .yaml file")
    return _folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"), f"suite {name}"


def _parse(text: str, origin: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is no YAML ({' '.join(str(error).split())[:200]}): mend it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{origin} describes no suite: compare it with one of slm's own")
    return found


def _folder() -> Any:
    return files("slm.bench").joinpath("suites")


def _nearest(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    mend = f"did you mean {near[0]!r}?" if near else "use one of these"
    return f"{what} {name!r}, known are {', '.join(known)}: {mend}"
