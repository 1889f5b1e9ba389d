"""Settings given on the command line: a file, and ``--set name=value`` on top of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm.config import Config
from slm.errors import ConfigError


def read_config(file: Path | None, assignments: Sequence[str]) -> Config:
    """Build a store's settings.

    Args:
        file: a .json, .yaml or .yml file with settings; None for the defaults.
        assignments: "name=value" with a dotted name, such as "retrieval.top_k=1"; they win over the file.

    Raises:
        ConfigError: the file cannot be read, an assignment has no "=", or a setting is wrong.
    """
    values = {} if file is None else _read_file(file)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                f"setting {assignment!r} has no value: write --set name=value, such as retrieval.top_k=1"
            )
        _assign(values, name.strip(), _parse(text.strip()))
    return Config.from_mapping(values)


def _assign(values: dict[str, Any], name: str, value: object) -> None:
    *rooms, last = name.split(".")
    for room in rooms:
        inner = values.setdefault(room, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"setting {name!r} lies in {room!r}, which is set to {inner!r}: drop one of them"
            )
        values = inner
    values[last] = value


def _parse(text: str) -> object:
    """A number, true, false, null or a list as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_file(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_bytes().decode("utf-8-sig")
        found = json.loads(text) if file.suffix.lower() == ".json" else yaml.load(text, _loader())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): check the path") from None
    except json.JSONDecodeError as error:
        place = f"{file} line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{place}: broken JSON ({error.msg}): mend it") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} holds no readable settings ({reason}): mend it") from None
    if found is not None and not isinstance(found, dict):
        raise ConfigError(
            f"{file} must hold settings by name, got a {type(found).__name__}: see slm init --help"
        )
    return found or {}


def _loader() -> Any:
    """YAML that also takes numbers such as 5e-4, which YAML 1.1 reads as text and JSON does not."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader
