"""``store.json``: which backbone a store belongs to and how it was set up; written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from slm.errors import StoreError
from slm.store.values import replace_bytes

MANIFEST_NAME = "store.json"
_PARTS = {"tasks", "pooled", "catalogue", "background.safetensors"}  # made before it


def utc_now() -> str:
    """The time now as ISO 8601 text in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What every task of a store has in common.

    Attributes:
        backbone_source: name on the Hugging Face hub or folder of the frozen backbone.
        backbone_fingerprint: digest that changes with the backbone's weights.
        config: the settings the store was made with, plain JSON values.
        created: when, ISO 8601 in UTC.
        background_sha256: of the file of the background, in hexadecimal; None where there is none.
    """

    backbone_source: str
    backbone_fingerprint: str
    config: Mapping[str, object]
    created: str = field(default_factory=utc_now)
    background_sha256: str | None = None


def manifest_bytes(path: Path, manifest: Manifest, version: int) -> bytes:
    """What ``store.json`` in the folder ``path`` shall hold.

    Raises:
        StoreError: the config holds a value JSON cannot hold.
    """
    fields = {
        "format": version,
        "backbone_source": manifest.backbone_source,
        "backbone_fingerprint": manifest.backbone_fingerprint,
        "config": dict(manifest.config),
        "created": manifest.created,
        "background_sha256": manifest.background_sha256,
    }
    try:
        text = json.dumps(fields, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"config of {path} cannot be written as JSON ({error}): use plain, finite values"
        ) from error
    return (text + "\n").encode()


def write_manifest(path: Path, manifest: Manifest, version: int) -> None:
    """Write ``store.json`` into the folder ``path``, by rename, so that it is there whole or not at all.

    Raises:
        StoreError: the config holds a value JSON cannot hold.
    """
    replace_bytes(path / MANIFEST_NAME, manifest_bytes(path, manifest, version))


def read_version(path: Path) -> int:
    """The format version of the store at ``path``, whatever else its manifest holds.

    Raises:
        StoreError: no such folder, no store, or a ``store.json`` that cannot be read as one.
    """
    version = _read(path).get("format")
    if type(version) is not int:
        raise _damaged(path / MANIFEST_NAME)
    return version


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at ``path``, which has the current format.

    Raises:
        StoreError: no such folder, no store, or a ``store.json`` that cannot be read as one.
    """
    found = _read(path)
    texts = [found.get(name) for name in ("backbone_source", "backbone_fingerprint", "created")]
    config, background = found.get("config"), found.get("background_sha256")
    source, fingerprint, created = (text if isinstance(text, str) else None for text in texts)
    if source is None or fingerprint is None or created is None or not isinstance(config, dict):
        raise _damaged(path / MANIFEST_NAME)
    if background is not None and not isinstance(background, str):
        raise _damaged(path / MANIFEST_NAME)
    return Manifest(source, fingerprint, config, created, background)


def refuse_begun(path: Path) -> None:
    """Say so where a folder holds a store whose creation was cut short, and nothing else.

    Raises:
        StoreError: it does.
    """
    try:
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".tmp-")}
        is_begun = "tasks" in names and names <= _PARTS
        is_empty = is_begun and not any(any((path / name).glob("*")) for name in ("tasks", "pooled"))
    except OSError:
        return
    if is_empty:
        raise StoreError(
            f"{path} is not a store (its creation was cut short, no task is in it): delete the folder and "
            "make the store again"
        )


def _read(path: Path) -> dict[str, object]:
    if not path.is_dir():
        raise StoreError(f"no store at {path}: make one with slm init or correct the path")
    file = path / MANIFEST_NAME
    if not file.is_file():
        refuse_begun(path)
        raise StoreError(f"{path} is not a store (it has no {MANIFEST_NAME}): give the folder of a store")
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file) from error
    if not isinstance(found, dict):
        raise _damaged(file)
    return found


def _damaged(file: Path) -> StoreError:
    return StoreError(f"{file} cannot be read as a store's manifest: restore it from a copy")
