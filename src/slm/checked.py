"""What every config shares: checking values, and the way from and to plain mappings; and a check of texts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from slm.errors import ConfigError, DataError

_C = TypeVar("_C", bound="CheckedConfig")

_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "tuple[int, ...]": ((tuple,), "a list of whole numbers"),
    "object": ((object,), "anything"),
}
"""What a value of an annotation may be, and how a message calls it."""


def _is_of(value: object, allowed: tuple[type, ...]) -> bool:
    """Whether a value is of one of these types; true and false are no numbers, a tuple holds integers."""
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, tuple):
        return tuple in allowed and all(_is_of(item, (int,)) for item in value)
    return isinstance(value, allowed)


class CheckedConfig:
    """What all configs share: checking, conversion from and to plain mappings."""

    _choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def _mistakes(self) -> Iterator[str]:
        """One line per setting that is of a wrong type or out of range."""
        mistyped = dict(self._mistyped())
        yield from mistyped.values()
        for name, allowed in self._choices.items():
            value = getattr(self, name)
            if value is not None and value not in allowed and name not in mistyped:
                near = difflib.get_close_matches(str(value), allowed, 1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                yield f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}"
        for name, (low, high) in self._ranges.items():
            value = getattr(self, name)
            if value is not None and name not in mistyped and not low <= value <= high:
                bounds = "..".join(str(v) if isinstance(v, int) else f"{v:g}" for v in (low, high))
                yield f"{name} must be in {bounds}, got {value!r}"

    def _mistyped(self) -> Iterator[tuple[str, str]]:
        """Name and message of every setting whose value is not of its annotation."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            annotation, _, optional = str(f.type).partition(" | ")
            value = getattr(self, f.name)
            if annotation not in _TYPES:
                nested: Any = f.default_factory
                if not isinstance(value, nested):
                    hint = f" (a mapping is for {type(self).__name__}.from_mapping)"
                    plain = hint if isinstance(value, Mapping) else ""
                    yield f.name, f"{f.name} must be a {annotation}, got {value!r}{plain}"
                continue
            allowed, words = _TYPES[annotation]
            if not (_is_of(value, allowed) or (optional and value is None)):
                yield f.name, f"{f.name} must be {words}, got {value!r}"

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if str(f.type).startswith("tuple[") and isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        mistakes = list(self._mistakes())
        if mistakes:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(mistakes) + ": correct these settings")

    @classmethod
    def from_mapping(cls: type[_C], mapping: Mapping[str, Any]) -> _C:
        """Build the config from a plain mapping, nested configs from nested mappings.

        Raises:
            ConfigError: names every unknown key (with the nearest known one) and every bad value.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{cls.__name__} must be a mapping of settings, got {mapping!r}: give one")
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        mistakes: list[str] = []
        values: dict[str, Any] = {}
        for key, value in mapping.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                mistakes.append(f"unknown setting {key!r}{hint}")
                continue
            factory: Any = known[key].default_factory
            nested = factory if isinstance(factory, type) and issubclass(factory, CheckedConfig) else None
            if nested and not isinstance(value, Mapping):
                mistakes.append(f"{key} must be a mapping of settings, got {value!r}")
                continue
            try:
                values[key] = nested.from_mapping(value) if nested else value
                values[key] = tuple(value) if isinstance(value, list) else values[key]
            except ConfigError as error:
                mistakes.append(str(error))
        try:
            config = cls(**values)
        except ConfigError as error:
            mistakes.append(str(error))
        if mistakes:
            raise ConfigError("; ".join(mistakes))
        return config

    def as_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values; inverse of :meth:`from_mapping`."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]


def half_character(text: str) -> str | None:
    """The first half of a character in a text, as "U+D83D": a lone surrogate, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


def check_characters(text: str, what: str) -> None:
    """Refuse half a character.

    Raises:
        DataError: there is one.
    """
    half = half_character(text)
    if half is not None:
        raise DataError(f"{what} holds half a character ({half}): remove it")
