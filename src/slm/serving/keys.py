"""Bearer keys: who may ask, teach and administer. Only their hashes are ever written down."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from slm.errors import ConfigError
from slm.serving.refusals import Refused

SCOPES = ("ask", "teach", "admin")
"""What a key may be for: asking; teaching and forgetting; loading adapters. None includes another."""
_LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the file keeps it.

    Attributes:
        name: of whoever has it.
        scopes: what it allows.
        sha256: of the key, in hex; a key is 256 random bits, so nothing slower is needed.
    """

    name: str
    scopes: frozenset[str]
    sha256: str


@final
class Keys:
    """All keys of a server; None of them means that nobody needs one.

    Args:
        keys: those there are; None where no file was given.
    """

    def __init__(self, keys: Collection[Key] | None) -> None:
        self._keys = None if keys is None else {key.sha256: key for key in keys}

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return self._keys is None

    def check(self, authorization: str | None, scope: str) -> str | None:
        """The name of whoever asks; None where nobody needs a key.

        Raises:
            Refused: 401 without a known key, 403 where it is not for this.
        """
        if self._keys is None:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        # Found by its hash, so how long it takes tells nothing of any key.
        key = self._keys.get(_hash(token.strip())) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refused(
                401,
                "no valid API key was given: send one as 'Authorization: Bearer KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope not in key.scopes:
            raise Refused(403, f"this key is not for {_DOING[scope]}: use one that is", "insufficient_scope")
        return key.name


_DOING = {"ask": "asking", "teach": "teaching and forgetting", "admin": "administration"}


def read_keys(file: Path | None) -> Keys:
    """Read a keys file.

    Raises:
        ConfigError: it cannot be read or is no keys file.
    """
    if file is None:
        return Keys(None)
    return Keys(_read(file))


def add_key(file: Path, name: str, scopes: Collection[str]) -> str:
    """Make a key, add its hash to a file that only its owner can read, and return the key.

    Raises:
        ConfigError: a scope is unknown, the name is taken, or the file cannot be written.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ConfigError(f"scopes must be among {', '.join(SCOPES)}, got {', '.join(scopes)}: correct them")
    if not file.absolute().parent.is_dir():  # a lock would make it
        raise ConfigError(f"{file} cannot be written (its folder does not exist): choose another place")
    token = f"slm-{secrets.token_urlsafe(32)}"
    try:
        with FileLock(f"{file}.lock", timeout=_LOCK_TIMEOUT_S):
            kept = _read(file) if file.exists() else []
            if any(key.name == name for key in kept):
                raise ConfigError(f"{file} has a key named {name!r} already: choose another name")
            kept.append(Key(name, frozenset(scopes), _hash(token)))
            rows = [{"name": k.name, "scopes": sorted(k.scopes), "sha256": k.sha256} for k in kept]
            _write(file, json.dumps({"keys": rows}, indent=2) + "\n")
    except Timeout:
        raise ConfigError(f"{file} is being written by another process: try again") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): choose another place") from error
    return token


def _write(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=file.absolute().parent)  # readable by its owner alone
    scratch = Path(name)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _scopes_of(row: Any) -> frozenset[str]:
    scopes = row["scopes"]
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise TypeError("scopes must be a list of texts")
    return frozenset(scopes)


def _read(file: Path) -> list[Key]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["keys"]
        keys = [Key(str(row["name"]), _scopes_of(row), str(row["sha256"])) for row in rows]
    except OSError as error:
        raise ConfigError(f"keys file {file} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no keys file ({error}): make one with slm key") from error
    if unknown := sorted({scope for key in keys for scope in key.scopes} - set(SCOPES)):
        raise ConfigError(f"{file} has unknown scopes {', '.join(unknown)}: use {', '.join(SCOPES)}")
    return keys
