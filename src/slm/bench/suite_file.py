"""Reading suites: every name and number of the file is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from slm.bench.baselines import NAMES
from slm.bench.suite import ALONE, METRICS, HubData, Preset, Source, Suite, nearest
from slm.config import Config
from slm.errors import ConfigError, TaskError
from slm.evaluation.scorers import SCORERS
from slm.tasks.task import check_name

SOURCES = "sources"
"""The file beside the suites that says where their tasks come from."""
PROMPTS = ("plain", "chat")
TRUNCATIONS = ("middle",)
SUITE_ENDINGS = (".yaml", ".yml")
"""Of the files that hold a suite of one's own."""

_OF_A_SUITE = [field.name for field in fields(Suite) if field.name != "name"]
_OF_A_SUITE += ["prompt", "truncation", "metrics"]
_OF_A_PRESET = [field.name for field in fields(Preset) if field.name not in ("name", "settings")]
_LEAST = {"train": 1, "test": 1, "outside_test": 0, "max_new_tokens": 1}
"""What of a preset is a whole number, and from which on."""


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
    found = _named(_parse(text, origin), _OF_A_SUITE, origin)
    sources = _parse(_folder().joinpath(f"{SOURCES}.yaml").read_text(encoding="utf-8"), SOURCES)["sources"]
    try:
        return _build(Path(str(name)).stem, found, {**sources, **(found.get("sources") or {})}, origin)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{origin} describes no suite ({what}): compare it with one of slm's own") from None


def _build(name: str, found: Mapping[str, Any], sources: Mapping[str, Any], origin: str) -> Suite:
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
        _expect_order_name(key, origin)
    return Suite(
        name=name,
        version=int(found["version"]),
        title=str(found["title"]),
        tasks=tasks,
        orders=orders,
        sources={
            task: _source(sources[task], f"{origin}, source {task}") for task in sorted({*tasks, *outside})
        },
        outside=outside,
        label_words=dict(found.get("label_words", {})),
        has_lower_case_labels=bool(found.get("has_lower_case_labels", False)),
        presets={
            key: _preset(key, value, found["prompt"], orders, f"{origin}, preset {key}")
            for key, value in found["presets"].items()
        },
    )


def _source(found: Mapping[str, Any], where: str) -> Source:
    values = _named(found, [field.name for field in fields(Source)], where)
    if values["metric"] not in SCORERS:
        raise ConfigError(f"{where}: there is no {nearest('metric', values['metric'], SCORERS)}")
    hub = values.get("hub")
    if hub:
        hub = HubData(**_named(hub, [field.name for field in fields(HubData)], f"{where}, hub"))
    return Source(**{**values, "hub": hub or None})


def _preset(
    name: str, found: Mapping[str, Any], prompt: str, orders: Mapping[str, Sequence[str]], where: str
) -> Preset:
    values = dict(_named(found, _OF_A_PRESET, where))
    config = dict(values.pop("config", {}))
    config["backbone"] = {"prompt_format": prompt, **config.get("backbone", {})}
    for key, least in _LEAST.items():
        if key in values:
            _expect_whole(values[key], key, where, least)
    values["orders"] = tuple(map(str, values["orders"]))
    for order in values["orders"]:
        if order not in orders:
            raise ConfigError(f"{where} has no {nearest('order', order, orders)}")
    for key in ("orders", "seeds", "per_label"):
        _expect_each_once(values.get(key, ()), key, where)
    values["seeds"] = tuple(_expect_whole(seed, "seeds", where) for seed in values["seeds"])
    if "per_label" in values:
        values["per_label"] = tuple(
            None if number == "all" else _expect_whole(number, "per_label", where, 1)
            for number in values["per_label"]
        )
    values["methods"] = {
        method: {key: _number(value, f"{method} {key}", where) for key, value in settings.items()}
        for method, settings in _named(values.get("methods") or {}, NAMES, f"{where}, methods").items()
    }
    return Preset(name=name, config=Config.from_mapping(config), settings=config, **values)


def _named(found: Any, known: Collection[str], where: str) -> Mapping[str, Any]:
    """What stands somewhere, if all its names are known."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} should hold names and their values, got {found!r}: correct it")
    for name in found:
        if name not in known:
            raise ConfigError(f"{where} has an unknown {nearest('name', str(name), known)}")
    return found


def _expect_whole(value: Any, name: str, where: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: {name} must be a whole number from {least}, got {value!r}: correct it")
    return value


def _expect_each_once(values: Sequence[Any], name: str, where: str) -> None:
    """Two of one name or number would be one cell, computed twice."""
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{where}: {name} has {value!r} more than once: name it once")


def _expect_order_name(name: str, origin: str) -> None:
    """An order's name stands in those of its cells' files, and must not look like that of a task alone."""
    try:
        check_name(name)
    except TaskError as error:
        raise ConfigError(f"{origin}: an order needs a name that a task may have ({error})") from None
    if name.startswith(ALONE):
        raise ConfigError(f"{origin}: order {name} begins as that of a task learned alone does: rename it")


def _number(value: Any, name: str, where: str) -> float:
    try:
        return float(value)  # YAML takes 1e5 for a text
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {name} must be a number, got {value!r}: correct it") from None


def _read(name: str) -> tuple[str, str]:
    if name.endswith(SUITE_ENDINGS):
        try:
            return Path(name).read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} cannot be read ({error}): check the path") from None
    if name not in suite_names():
        raise ConfigError(f"there is no {nearest('suite', name, suite_names())}, or give a .yaml file")
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
